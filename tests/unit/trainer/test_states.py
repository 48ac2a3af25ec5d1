"""What a trainer does that awaits its parameters, has no text, or is at its run's end."""

from __future__ import annotations

import asyncio
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import torch

from tests.unit.training.homes import make_homes
from xpeer.config import Data, Home
from xpeer.errors import LocalError, ShardError
from xpeer.founding_model import LoraOptions
from xpeer.trainer import reporting
from xpeer.trainer.answers import Failure, LookedAtText, Reply
from xpeer.trainer.assembled import Assembled
from xpeer.trainer.build import assemble
from xpeer.trainer.commands import Request, WriteCheckpoint
from xpeer.trainer.reporting import look_for_text
from xpeer.trainer.server import Server, serve

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


def serving(node: Assembled) -> tuple[Server, Channel]:
    channel = Channel()
    return serve(channel.send, cast(Any, None), node, 3600.0), channel


def test_who_awaits_parameters_saves_none(tmp_path: Path) -> None:
    setup = make_homes(tmp_path, 1, privacy="record", changes=FEW)[0]
    node = assemble(msgspec.structs.replace(setup, initial="awaited", mode="mix"))
    try:
        server, channel = serving(node)
        server.handle(Request(7, WriteCheckpoint()))
        node.trainer.stop()
        node.trainer.run()
        server.worker.finish()
        (refused,) = channel.results()
        assert isinstance(refused, Failure)
        assert "not-ready" in str(refused).lower()
        assert not list(Home(Path(setup.home)).checkpoints.glob("*"))
    finally:
        node.close()


class Machine:
    """Two homes that train on one text, which can go missing."""

    def __init__(self, folder: Path) -> None:
        first, second = make_homes(folder, 2, privacy="record", changes=(*FEW, "end.steps=100"))
        self.text, self.gone = folder / "text", folder / "gone"
        shutil.copytree(first.config.data.shard[0], self.text)
        self.setups = [
            msgspec.structs.replace(
                setup,
                has_trained=True,
                config=msgspec.structs.replace(setup.config, data=Data(shard=[str(self.text)])),
            )
            for setup in (first, second)
        ]

    def train(self, home: int, steps: int) -> None:
        node = assemble(self.setups[home])
        node.trainer.run(steps=steps)
        node.checkpoints.copy()()
        node.close()

    def told(self) -> tuple[float, int, int]:
        """Epsilon, steps and the counter of the first home."""
        node = assemble(self.setups[0])
        try:
            spent = node.spent()
            return spent.epsilon_spent, spent.steps_charged, node.ledger.counter
        finally:
            node.close()


def another_home(machine: Machine) -> None:
    machine.train(1, 12)


def an_older_ledger(machine: Machine) -> None:
    ledger = Path(machine.setups[0].home) / "ledger.sqlite"
    older = shutil.copy(ledger, machine.text.parent / "older")
    machine.train(0, 12)
    shutil.copy(older, ledger)


def a_lost_register(machine: Machine) -> None:
    shutil.rmtree(machine.setups[0].config.privacy.register)


@pytest.mark.parametrize("happens", [another_home, an_older_ledger, a_lost_register])
def test_epsilon_is_the_same_with_and_without_the_text(
    tmp_path: Path, happens: Callable[[Machine], None]
) -> None:
    from xpeer_daemon.start import beginning

    machine = Machine(tmp_path)
    machine.train(0, 2)
    alone = machine.told()[0]
    happens(machine)
    if happens is not a_lost_register:  # which is mended by a start with the text
        said = beginning(Home(Path(machine.setups[0].home)), 0.0, machine.setups[0].config)
        assert f"epsilon {alone:.3g} " not in said
    machine.text.rename(machine.gone)
    without = machine.told()
    machine.gone.rename(machine.text)
    assert without == machine.told()
    assert without[0] > alone or happens is a_lost_register


def test_the_text_is_looked_at_as_long_as_there_is_no_other_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon may fail to start one, and reading may fail in ways of its own."""
    node = assemble(make_homes(tmp_path, 1)[0])
    monkeypatch.setattr(reporting, "_LOOK_FIRST_S", 0.0)
    monkeypatch.setattr(reporting, "_LOOK_LAST_S", 0.0)
    found: list[Exception | None] = [ShardError("gone"), MemoryError("private"), None, None]

    class OverError(BaseException):
        pass

    def look() -> None:
        if not found:
            raise OverError
        if (error := found.pop(0)) is not None:
            raise error

    try:
        channel = Channel()
        with pytest.raises(OverError):
            look_for_text(look, channel.send)
        told = [message.problem for message in channel.sent if isinstance(message, LookedAtText)]
        kind = r"it could not be looked at: MemoryError in xpeer\.trainer\.reporting, line \d+"
        assert (told[0], told[2:]) == ("gone", ["", ""])
        assert re.fullmatch(kind, told[1])
    finally:
        node.close()


def test_a_node_without_text_ends_with_its_run(tmp_path: Path) -> None:
    setup = make_homes(tmp_path, 1, privacy="record", changes=(*FEW, "end.steps=40"))[0]
    shutil.rmtree(setup.config.data.shard[0])
    node = assemble(msgspec.structs.replace(setup, has_trained=True, mode="mix"))
    try:
        for mode, state in (("mix", "mixing"), ("train", "mixing"), ("pause", "paused")):
            node.trainer.set_mode(mode)  # type: ignore[arg-type]
            assert node.trainer.state == state
        node.trainer.set_mode("train")
        node.trainer.replace(node.trainer.parameters.read(), 40)
        assert node.trainer.state == "closing"
    finally:
        node.close()


def test_a_node_without_text_knows_that_its_budget_is_spent(tmp_path: Path) -> None:
    changes = ("privacy.noise_multiplier=1.2", "privacy.epsilon=1", "end.steps=400")
    setup = make_homes(tmp_path, 1, privacy="record", changes=changes)[0]
    node = assemble(setup)
    node.trainer.run(steps=400)
    assert node.trainer.state == "budget-spent"
    node.checkpoints.copy()()
    node.close()
    shutil.rmtree(setup.config.data.shard[0])
    node = assemble(msgspec.structs.replace(setup, has_trained=True))
    try:
        node.trainer.set_mode("train")
        assert node.trainer.state == "budget-spent"
        assert node.spent().steps_left == 0
        assert node.beginning.text.problem
    finally:
        node.close()


@pytest.mark.parametrize(
    ("changes", "end"), [(("end.steps=6",), "closing"), (("privacy.epsilon=1",), "budget-spent")]
)
def test_the_gradients_of_a_short_last_window_are_used(
    tmp_path: Path, changes: tuple[str, ...], end: str
) -> None:
    rule = ("round.rule=gradient", "round.fragments=1", "round.group=0", "round.deadline_s=0.1")
    sigma = 2 if end == "closing" else 1.4
    told = ("optimiser.batch_records=2", f"privacy.noise_multiplier={sigma}", "end.steps=400")
    setup = make_homes(tmp_path, 1, privacy="record", changes=(*rule, *told, *changes))[0]
    node = assemble(setup)
    trainer = node.trainer
    states: list[str] = []

    def ended() -> None:
        states.append(trainer.state)
        if trainer.state == end:
            trainer.stop()

    trainer.on_state = ended
    try:
        trainer.run()
        charged = node.ledger.steps_charged
        assert states[-1] == end
        assert charged % 4, "the last window is short"
        assert charged == node.mechanism.charged().used == trainer.counters.charges_used
    finally:
        node.close()


def test_parameters_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    setup = make_homes(tmp_path, 1)[0]
    node = assemble(setup)
    try:
        values = node.trainer.parameters.read()
        values[3] = torch.nan
        node.trainer.parameters.write(values)
        write = node.checkpoints.copy()
        with pytest.raises(LocalError, match="not finite"):
            write()
        assert not list(Home(Path(setup.home)).checkpoints.glob("*"))
    finally:
        node.close()


def test_a_damaged_checkpoint_saved_nothing(tmp_path: Path) -> None:
    from xpeer.config import NodeConfig
    from xpeer_daemon.ending import Ends

    setup = make_homes(tmp_path, 1)[0]
    node, home = assemble(setup), Home(Path(setup.home))
    ends = Ends(home, NodeConfig())
    assert asyncio.run(ends.last_saved()) is None
    node.checkpoints.copy()()
    node.close()
    (home.checkpoints / "ckpt-000000100.safetensors").write_bytes(b"damaged")
    saved = asyncio.run(ends.last_saved())
    assert saved is not None
    assert saved[0] == 0


def test_what_averaging_adapters_loses_is_computed_beside_the_training_thread(
    tmp_path: Path,
) -> None:
    (setup,) = make_homes(tmp_path, 1, lora=LoraOptions(rank=2))
    node = assemble(setup)
    serving(node)
    apart = node.trainer.exchanges.misalignment
    assert apart is not None
    seen, ended = [], threading.Event()

    def work() -> None:
        seen.append(threading.current_thread())
        ended.set()

    apart.submit(work)
    assert ended.wait(60)
    assert seen != [threading.current_thread()]
    node.close()
