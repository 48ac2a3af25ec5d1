"""What a trainer does that awaits its parameters, has no text, or is at its run's end."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import torch

from tests.unit.training.homes import make_homes
from xpeer.training.assemble import Assembled, assemble
from xpeer.training.ipc import Failure, Reply, Request, WriteCheckpoint
from xpeer.training.service import Service

FEW = ("privacy.noise_multiplier=2", "privacy.epsilon=8", "optimiser.batch_records=2")


class Channel:
    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, message: Any) -> None:
        self.sent.append(message)

    def results(self) -> list[Any]:
        return [message.result for message in self.sent if isinstance(message, Reply)]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def serving(node: Assembled) -> tuple[Service, Channel]:
    channel = Channel()
    return Service(cast(Any, channel), cast(Any, None), node, 3600.0), channel


def test_who_awaits_parameters_saves_none(tmp_path: Path) -> None:
    setup = make_homes(tmp_path, 1, privacy="record", changes=FEW)[0]
    node = assemble(msgspec.structs.replace(setup, initial="awaited", mode="mix"))
    try:
        service, channel = serving(node)
        service.handle(Request(7, WriteCheckpoint()))
        node.trainer.submit(node.trainer._stop)
        node.trainer.run()
        service.finish()
        (refused,) = channel.results()
        assert isinstance(refused, Failure)
        assert "not-ready" in str(refused).lower()
        assert not list(node.home.checkpoints.glob("*"))
    finally:
        node.close()
