"""A meeting's stages: what comes too early, twice or after a drop is refused, changing nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from tests.unit.training.loops import taken, trainer_with
from xpeer.errors import PeerError, Reason, TrainerError
from xpeer.mixing.in_flight import MAX_GROUP
from xpeer.training.loop import TrainingLoop
from xpeer.update import PeerUpdate, PrivateUpdate

Act = Callable[[], object]


def acts(trainer: TrainingLoop, private: PrivateUpdate, received: PeerUpdate) -> dict[str, Act]:
    """What may be done with meeting 1, by name."""
    exchanges = trainer.exchanges
    return {
        "compress": lambda: exchanges.compress(1, private),
        "verify": lambda: exchanges.verify(1, 7, received),
        "resolve": lambda: exchanges.resolve(1, {7: 0.5}),
        "merge": lambda: exchanges.merge(1, 0),
    }


@pytest.fixture
def received() -> PeerUpdate:
    other = taken(trainer_with(seed=1), 1, 0)
    return PeerUpdate(bytes(other.payload), other.form, "peer")


@pytest.mark.parametrize(
    ("done", "next_", "said"),
    [
        ([], "verify", "certified, not sent"),
        ([], "resolve", "certified, not sent"),
        ([], "merge", "certified, not resolved"),
        (["compress"], "compress", "sent, not certified"),
        (["compress"], "resolve", "not all of .* were verified"),
        (["compress"], "merge", "sent, not resolved"),
        (["compress", "verify"], "verify", "verified before"),
        (["compress", "verify"], "merge", "sent, not resolved"),
        (["compress", "verify", "resolve"], "compress", "resolved, not certified"),
        (["compress", "verify", "resolve"], "verify", "resolved, not sent"),
        (["compress", "verify", "resolve"], "resolve", "resolved, not sent"),
    ],
)
def test_a_wrong_order_is_refused(
    received: PeerUpdate, done: list[str], next_: str, said: str
) -> None:
    trainer = trainer_with()
    before = trainer.parameters.read()
    do = acts(trainer, trainer.snapshot(1, 0, averaging=False), received)
    for name in done:
        do[name]()
    with pytest.raises(TrainerError, match=said):
        do[next_]()
    assert torch.equal(trainer.parameters.read(), before)


@pytest.mark.parametrize("done", [[], ["compress"], ["compress", "verify"]])
def test_a_dropped_meeting_is_closed_at_any_stage(received: PeerUpdate, done: list[str]) -> None:
    trainer = trainer_with()
    do = acts(trainer, trainer.snapshot(1, 0, averaging=False), received)
    for name in done:
        do[name]()
    trainer.exchanges.drop(1)
    for name in ("compress", "verify", "resolve"):
        with pytest.raises(PeerError, match=Reason.CLOSED):
            do[name]()
    assert do["merge"]() == -1
    assert not trainer.exchanges
    trainer.snapshot(2, 0, averaging=False)  # the fragment is free again


def test_what_is_dropped_while_the_helper_works_stays_dropped(received: PeerUpdate) -> None:
    trainer = trainer_with()
    taken(trainer, 1, 0)
    payloads, verify = trainer.exchanges.payloads, trainer.exchanges.payloads.verify

    def interrupted(*arguments: object) -> object:
        trainer.exchanges.drop(1)
        return verify(*arguments)  # type: ignore[arg-type] # handed on

    payloads.verify = interrupted  # type: ignore[method-assign,assignment] # likewise
    with pytest.raises(PeerError, match=Reason.CLOSED):
        trainer.exchanges.verify(1, 7, received)
    assert not trainer.exchanges


def test_a_second_helper_is_noticed(received: PeerUpdate) -> None:
    trainer = trainer_with()
    taken(trainer, 1, 0)
    payloads, verify = trainer.exchanges.payloads, trainer.exchanges.payloads.verify

    def beside_another(*arguments: object) -> object:
        payloads.verify = verify  # type: ignore[method-assign] # back to the real one
        other = threading.Thread(target=trainer.exchanges.verify, args=(1, 8, received))
        other.start()
        other.join()
        return verify(*arguments)  # type: ignore[arg-type] # handed on

    payloads.verify = beside_another  # type: ignore[method-assign,assignment] # likewise
    with pytest.raises(TrainerError, match="two helpers"):
        trainer.exchanges.verify(1, 7, received)


def test_a_meeting_has_only_so_many_partners(received: PeerUpdate) -> None:
    trainer = trainer_with()
    taken(trainer, 1, 0)
    for exchange_id in range(MAX_GROUP):
        trainer.exchanges.verify(1, exchange_id, received)
    with pytest.raises(PeerError, match=Reason.BUSY):
        trainer.exchanges.verify(1, MAX_GROUP, received)
