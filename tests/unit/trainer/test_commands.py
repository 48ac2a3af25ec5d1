"""Commands are data: whoever applies the same bytes to the same trainer gets the same of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import msgspec
import pytest
import torch

from tests.unit.training.homes import make_homes
from xpeer import manifest as manifests
from xpeer.config import Data
from xpeer.errors import LocalError, PeerError, Reason, TrainerError
from xpeer.trainer import commands, reporting
from xpeer.trainer.answers import Result, SaveFailed, Snapshotted, StateExported, Written
from xpeer.trainer.arena import Arena, Layout
from xpeer.trainer.build import assemble
from xpeer.trainer.commands import (
    NOBODY,
    AddCorrection,
    Command,
    Compress,
    Drop,
    DropLate,
    Evaluate,
    ExportState,
    FinishState,
    ImportState,
    MeasureState,
    Merge,
    Request,
    Run,
    Snapshot,
    Stop,
    Thread,
    ToTrainer,
    Verify,
    Work,
    WriteCheckpoint,
    WriteCopy,
)
from xpeer.trainer.server import Server, serve
from xpeer.trainer.setup import TrainerSetup
from xpeer.wire import codec

COMMANDS: tuple[type[Work], ...] = get_args(Command)
LATER = (Compress, FinishState, MeasureState, WriteCopy)


class Rank:
    """A trainer that is sent bytes, and carries them out on the thread of the test."""

    def __init__(self, setup: TrainerSetup) -> None:
        self.node = assemble(setup)
        self.loop = self.node.trainer
        self.arena = Arena.create(Layout.of(self.loop.manifest))
        self.server: Server = serve(lambda _message: None, self.arena, self.node, 3600.0)
        self.jobs: list[object] = []
        submit = self.loop.submit

        def seen(job: object) -> None:
            self.jobs.append(job)
            submit(job)

        self.loop.submit = seen  # type: ignore[method-assign]

    def carry_out(self, data: bytes) -> Any:
        """The answer; what the command leaves for the boundary is done, too."""
        request = msgspec.msgpack.decode(data, type=ToTrainer)
        assert isinstance(request, Request)
        outcome: Any = request.command
        while not (outcome is None or isinstance(outcome, Result)):
            outcome = outcome.apply(self.server.worker)
        self.loop.run(steps=0)
        return outcome

    def close(self) -> None:
        self.node.close()
        self.arena.close()


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Rank, Rank]]:
    """Two trainers of one home, as it was founded."""
    monkeypatch.setattr(reporting, "report_ending", lambda _pulse, _send: None)
    torch.set_num_threads(1)
    setup = make_homes(tmp_path, 1)[0]
    shutil.copytree(setup.home, tmp_path / "twin")
    config = msgspec.structs.replace(
        setup.config, data=Data(shard=[str(tmp_path / "twin" / "shard")])
    )
    twin = msgspec.structs.replace(setup, home=str(tmp_path / "twin"), config=config)
    both = Rank(setup), Rank(twin)
    yield both
    for rank in both:
        rank.close()


@pytest.mark.parametrize("kind", [*COMMANDS, *LATER], ids=lambda kind: kind.__name__)
def test_everything_that_is_carried_out_says_on_which_thread_and_how(kind: type[Work]) -> None:
    assert kind.on in get_args(Thread)
    assert callable(kind.apply)
    assert kind in COMMANDS or kind.on in ("helper", "disk", "measuring"), (
        "a copy goes to no other rank"
    )


def test_no_work_is_left_out() -> None:
    carried_out = {each for each in vars(commands).values() if hasattr(each, "apply")}
    assert carried_out == {*COMMANDS, *LATER, Work}


def test_the_same_bytes_give_the_same_answers_and_parameters(ranks: tuple[Rank, Rank]) -> None:
    before = ranks[0].loop.parameters.read()
    applied = set()

    def both(command: Command) -> Any:
        applied.add(type(command))
        data = msgspec.msgpack.encode(Request(7, command))
        first, second = (rank.carry_out(data) for rank in ranks)
        if isinstance(first, Written):
            first, second = (Written(Path(each.path).name) for each in (first, second))
        if isinstance(first, StateExported):  # each has its own clock
            first, second = (msgspec.structs.replace(each, core_s=0.0) for each in (first, second))
        assert first == second
        assert torch.equal(*(rank.loop.parameters.read() for rank in ranks))
        return first

    both(Run("mix"))
    both(Evaluate())
    sent = both(Snapshot(1, 0, averaging=True, slot=0))
    assert isinstance(sent, Snapshotted)
    values = 1e-3 * torch.randn(sent.form.num_values, generator=torch.Generator().manual_seed(1))
    payload = codec.encode(sent.form.codec, values)
    assert bytes(ranks[0].arena.slot(0, len(payload))) == bytes(
        ranks[1].arena.slot(0, len(payload))
    )
    for rank in ranks:
        rank.arena.slot(1, len(payload))[:] = payload
    both(Verify(1, 5, 1, sent.form, partner="peer"))
    both(Merge(1, {5: 0.5}))
    merged = ranks[0].loop.parameters.read()
    assert not torch.equal(merged, before)
    both(Snapshot(2, 1, averaging=True, slot=0))
    both(Drop(2))
    assert not ranks[0].loop.exchanges
    both(ExportState())
    both(ImportState(step=3))
    assert ranks[0].loop.counters.step == 3
    both(WriteCheckpoint())
    both(Stop())
    assert applied | {AddCorrection, DropLate} == set(COMMANDS)
    for rank in ranks:
        left = [type(job.command) for job in rank.jobs if isinstance(job, Request)]
        assert left == [AddCorrection, DropLate]
        for job in rank.jobs[:2]:
            assert msgspec.msgpack.decode(msgspec.msgpack.encode(job), type=Request) == job


def test_a_large_models_parameters_cross_in_bfloat16(
    ranks: tuple[Rank, Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifests, "LARGE_STATE", 1)
    donor, joiner = ranks
    form = donor.loop.manifest.state_form
    assert form.codec == "bfloat16"
    own = donor.loop.parameters.read()
    donor.carry_out(msgspec.msgpack.encode(Request(7, ExportState())))
    joiner.arena.state()[: form.num_bytes] = donor.arena.state()[: form.num_bytes]
    taken_over = ImportState(step=3, codec=form.codec)
    joiner.carry_out(msgspec.msgpack.encode(Request(8, taken_over)))
    assert torch.equal(joiner.loop.parameters.read(), own.bfloat16().float())


def test_who_only_names_commands_loads_no_torch() -> None:
    """The daemon does."""
    names = "xpeer.trainer.commands, xpeer.trainer.answers, xpeer.trainer.channel"
    code = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_what_a_command_refuses_is_refused_by_both(ranks: tuple[Rank, Rank]) -> None:
    data = msgspec.msgpack.encode(Request(7, Merge(9, {1: 0.5})))
    for rank in ranks:
        with pytest.raises(PeerError) as refused:
            rank.carry_out(data)
        assert refused.value.reason == Reason.CLOSED


class Failing:
    """A part of a trainer that has an error."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.sent: list[Any] = []

    def merge(self, meeting_id: int) -> None:
        raise self.error

    def write(self) -> str:
        raise self.error


@pytest.mark.parametrize("number", [NOBODY, 7])
def test_what_fails_without_anybody_waiting_is_logged(
    number: int, caplog: pytest.LogCaptureFixture
) -> None:
    failing = Failing(TrainerError("private words", ""))
    worker: Any = SimpleNamespace(loop=failing)
    Server(failing.sent.append, worker, cast(Any, None)).at_boundary(
        Request(number, AddCorrection(1))
    )
    logged = "AddCorrection failed: TrainerError in " in caplog.text
    assert logged == (number == NOBODY)
    assert "private words" not in caplog.text
    assert [reply.number for reply in failing.sent] == [number]


@pytest.mark.parametrize("error", [LocalError("full", "free"), MemoryError("private words")])
def test_a_checkpoint_that_was_asked_for_and_is_not_written_is_reported(error: Exception) -> None:
    failing = Failing(error)
    trainer: Any = SimpleNamespace(reports=SimpleNamespace(send=failing.sent.append))
    with pytest.raises(type(error)):
        WriteCopy(3, failing.write).apply(trainer)
    (report,) = failing.sent
    assert (type(report), report.step) == (SaveFailed, 3)
    assert "private words" not in report.problem
