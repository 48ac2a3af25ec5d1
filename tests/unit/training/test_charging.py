"""What a kill costs at any moment, by the product's own loop, budget and cadence of checkpoints.

Steps, charges, copies and writes take the time of a clock that is made up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import msgspec
import pytest

from tests.factories import privacy_stamp
from tests.unit.training.clocks import Clock
from tests.unit.training.loops import Parameters, Result, manifest_with
from xpeer.accounts import budget as budgets
from xpeer.accounts.accountant import Segment
from xpeer.accounts.budget import Budget, Charged
from xpeer.errors import LocalError
from xpeer.manifest import End, Manifest
from xpeer.manifest.privacy import Privacy
from xpeer.manifest.round import Round
from xpeer.phase import Order
from xpeer.status import PrivacySpent
from xpeer.trainer import saving
from xpeer.trainer.answers import SaveFailed
from xpeer.trainer.saving import SHARE_SAVING, Saving
from xpeer.training import learner, loop, measuring, pacing, timings
from xpeer.training.charging import Permits
from xpeer.training.loop_parts import make_loop
from xpeer.training.measuring import Evaluation
from xpeer.update import PrivateUpdate, RawUpdate


@dataclass
class Machine:
    """A node whose every moment is looked at: what would a kill lose now?"""

    manifest: Manifest
    step_s: float = 0.05
    copy_s: float = 0.0
    write_s: float = 0.0
    charge_s: float = 0.001
    fails: Callable[[int], bool] = lambda _: False
    clock: Clock = field(default_factory=Clock)
    saved: int = 0
    """Charges behind the checkpoint on the disk."""
    during: int = 0
    """Charges since then that were made while a checkpoint was being written."""
    during_this: int = 0
    """The same since the copy that is being written."""
    copied_at: list[float] = field(default_factory=list)
    worst: int = 0

    def __post_init__(self) -> None:
        self.ledger = Account(self)
        self.queue = deque[tuple[float, Callable[[], None]]]()
        self.parameters = Parameters(0, self.manifest.round.fragments)
        self.mechanism = Mechanism(self)
        self.trainer = make_loop(
            self.manifest, self.parameters, cast(Any, self.mechanism), Evaluation(lambda: 1.0)
        )
        self.saving = Saving(
            self.trainer, self.capture, self.submit, lambda *_: None,
            every_s=600.0, resumed=False, clock=self.clock,
        )  # fmt: skip
        self.trainer.on_step = lambda _: self.after_step()

    @property
    def saves(self) -> int:
        return len(self.copied_at)

    def after_step(self) -> None:
        self.saving.after_step()
        while self.queue and self.queue[0][0] <= self.clock.now:
            self.queue.popleft()[1]()
        self.look()

    def capture(self) -> Callable[[], str]:
        self.copied_at.append(self.clock.now)
        self.clock.now += self.copy_s
        behind = self.trainer.counters.charges_used
        number = self.saves

        def write() -> str:
            if self.fails(number):
                raise LocalError("the disk is full")
            self.saved, self.during = behind, self.during_this
            return "path"

        self.during_this = 0
        return write

    def submit(self, write: Callable[[], None]) -> None:
        if self.write_s == 0.0:
            write()
        else:
            self.queue.append((self.clock.now + self.write_s, write))

    def look(self) -> None:
        """A kill now."""
        self.worst = max(self.worst, self.ledger.steps_charged - self.saved - self.during)


class Account:
    """A ledger in memory."""

    shared, counter, steps_charged = False, 0, 0

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def histories(self) -> list[list[Segment]]:
        return [[]]

    def charge(self, segment: Segment, _fits: object) -> int:
        machine = self.machine
        machine.clock.now += machine.charge_s
        self.steps_charged += segment.steps
        self.counter += 1
        if machine.queue:
            machine.during += segment.steps
            machine.during_this += segment.steps
        machine.look()
        return self.counter


def at_once(work: Callable[..., int], *given: int) -> Future[int]:
    """Charges and the clock belong to one thread here."""
    done: Future[int] = Future()
    done.set_result(work(*given))
    return done


class Mechanism:
    """Charges are real, steps take their time."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.budget = Budget(
            machine.ledger,  # type: ignore[arg-type]
            epsilon=1e6,
            delta=1e-5,
            noise_multiplier=1.0,
            sampling_probability=0.1,
        )

        self.budget._writer.submit = at_once  # type: ignore[method-assign, assignment]

    def charge_until(self, steps: int) -> int:
        return self.budget.begin(steps)

    def charge_ahead(self, steps: int) -> None:
        self.budget.prepare(steps)

    def charged(self) -> Charged:
        return self.budget.charged

    def step_gradient(self) -> Result:
        self.budget.use()
        self.machine.clock.now += self.machine.step_s
        return Result(1.0, 1)

    def stamp(self, raw: RawUpdate) -> PrivateUpdate:
        return PrivateUpdate(raw.values, raw.step, privacy_stamp())

    def spent(self) -> PrivacySpent:
        return PrivacySpent()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in (learner, loop, measuring, pacing, saving, timings, budgets):
        monkeypatch.setattr(module, "time", made)
    monkeypatch.setattr("xpeer.accounts.accountant.steps_within", lambda *given: given[-1])
    return made


def planned(steps: int, **changes: object) -> Manifest:
    rules = Round(window_steps=5, fragments=1)
    privacy = Privacy(noise_multiplier=1.0)
    return manifest_with(end=End(steps=steps), round=rules, privacy=privacy, **changes)


COSTS = {
    "a tiny model": {"step_s": 0.02, "charge_s": 0.005, "copy_s": 0.0003, "write_s": 0.03},
    "long steps": {"step_s": 20.0, "charge_s": 0.02, "copy_s": 0.5, "write_s": 10.0},
    "a slow disk": {"step_s": 0.05, "charge_s": 0.4, "copy_s": 0.001, "write_s": 2.0},
    "a write of many steps": {"step_s": 0.1, "charge_s": 0.001, "copy_s": 0.005, "write_s": 30.0},
}


@pytest.mark.parametrize("costs", COSTS.values(), ids=list(COSTS))
@pytest.mark.parametrize(("steps", "may_lose"), [(30, 5), (300, 5), (3000, 30)])
@pytest.mark.timeout(240)
def test_a_kill_at_any_moment_loses_a_window_or_a_hundredth_of_the_plan(
    clock: Clock, costs: dict[str, float], steps: int, may_lose: int
) -> None:
    machine = Machine(planned(steps), clock=clock, **costs)  # type: ignore[arg-type]
    machine.trainer.run(steps=steps)
    assert machine.trainer.counters.step == machine.ledger.steps_charged == steps
    assert machine.trainer.pacing.permits.most == may_lose
    assert machine.worst <= may_lose
    saving_s = machine.trainer.progress().seconds_saving
    assert saving_s == pytest.approx(machine.saves * costs["copy_s"])
    assert saving_s <= 0.02 * clock.now
    assert machine.ledger.counter <= max(1100, steps)  # rows of the ledger


def gaps(machine: Machine) -> list[float]:
    """Seconds from one checkpoint's copy to the next, by the clock that is made up."""
    return [later - earlier for earlier, later in pairwise(machine.copied_at)]


def test_where_both_bounds_collide_charges_go_first_and_the_time_is_told(clock: Clock) -> None:
    """A copy of half a second against steps of 50 ms."""
    machine = Machine(planned(300), copy_s=0.5, clock=clock)
    machine.trainer.run(steps=300)
    assert machine.worst <= 5
    assert min(gaps(machine)) < 0.5 / SHARE_SAVING
    assert machine.trainer.progress().seconds_saving == pytest.approx(0.5 * machine.saves)


def test_checkpoints_by_the_clock_alone_take_a_fiftieth_of_the_time(clock: Clock) -> None:
    machine = Machine(
        msgspec.structs.replace(planned(3000), privacy=Privacy(mode="off")),
        copy_s=0.5, clock=clock,
    )  # fmt: skip
    machine.mechanism.charged = Charged  # type: ignore[method-assign]
    machine.mechanism.charge_until = lambda steps: steps  # type: ignore[method-assign]
    machine.mechanism.budget.use = lambda: None  # type: ignore[method-assign]
    machine.saving._every_s = 0.001
    machine.trainer.run(steps=3000)
    assert machine.saves >= 5
    assert min(gaps(machine)) >= 0.5 / SHARE_SAVING


@pytest.mark.parametrize("costs", COSTS.values(), ids=list(COSTS))
@pytest.mark.parametrize("at", [1, 3, 7, 8, 22])
def test_a_clean_stop_loses_no_charge(clock: Clock, costs: dict[str, float], at: int) -> None:
    """Wherever it comes; what is charged ahead and takes long to use is at most a window."""
    machine = Machine(planned(300), clock=clock, **costs)  # type: ignore[arg-type]
    machine.trainer.run(steps=at)
    machine.trainer.stop()
    machine.trainer.run()
    machine.saving.copy()()
    assert machine.ledger.steps_charged == machine.trainer.counters.charges_used == machine.saved
    assert machine.trainer.counters.step <= at + 10


def test_with_checkpoints_that_fail_two_windows_are_charged_and_no_more(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until one can be written again; then training goes on."""
    machine = Machine(planned(300), clock=clock, fails=lambda n: 3 <= n < 6)
    held: list[float] = []

    def served(for_s: float) -> None:
        held.append(for_s)
        clock.now += for_s

    monkeypatch.setattr(machine.trainer, "_serve_for", served)
    machine.trainer.run(steps=300)
    assert machine.trainer.counters.step == 300
    assert held
    assert machine.worst <= 10 + 1


@pytest.mark.parametrize(
    "error", [LocalError("full", "free"), MemoryError("private"), RuntimeError("private")]
)
def test_a_checkpoint_that_is_not_written_is_reported_whatever_the_error(
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    """Memory can be short as well as the disk. Training goes on, and the next one may succeed."""

    def fail(number: int) -> bool:
        if number == 1:
            raise error
        return False

    machine, reports = Machine(planned(300), clock=clock, fails=fail), list[SaveFailed]()
    machine.saving._failed = reports.append
    monkeypatch.setattr(machine.trainer, "_serve_for", machine.clock.advance)  # while it is held
    machine.trainer.run(steps=300)
    assert machine.trainer.counters.step == 300
    assert machine.saved
    (report,) = reports
    said = str(error) if isinstance(error, LocalError) else type(error).__name__
    assert said in report.problem
    assert report.problem in caplog.text
    assert "private" not in report.problem


@pytest.mark.parametrize("order", ["pause", "mix"])
def test_who_takes_no_steps_takes_none_at_a_stop(clock: Clock, order: Order) -> None:
    """What was charged ahead stays charged, and the next start says so."""
    machine = Machine(planned(300), clock=clock, **COSTS["a slow disk"])  # type: ignore[arg-type]
    machine.trainer.run(steps=7)
    assert machine.mechanism.charged().left
    machine.trainer.set_mode(order)
    machine.trainer.stop()
    machine.trainer.run()
    machine.saving.copy()()
    assert machine.trainer.counters.step == machine.trainer.counters.charges_used == 7
    assert machine.saved == 7 < machine.ledger.steps_charged


def test_a_plan_without_steps_goes_by_what_the_budget_allows(clock: Clock) -> None:
    machine = Machine(msgspec.structs.replace(planned(1), end=End(seconds=5.0)), clock=clock)
    possible = machine.mechanism.budget.charged.possible
    assert machine.trainer.pacing.permits.most == possible // 100
    machine.trainer.run(steps=1000)
    assert machine.trainer.pacing.ended
    assert machine.ledger.steps_charged - machine.trainer.counters.step <= 1  # near the end: singly
    assert isinstance(machine.trainer.pacing.permits, Permits)


def test_a_ledger_that_fails_at_a_stop_costs_no_checkpoint(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    machine = Machine(planned(300), clock=clock)
    machine.trainer.run(steps=7)

    def failing(steps: int) -> int:
        raise LocalError("the disk is gone")

    machine.mechanism.charge_until = failing  # type: ignore[method-assign]
    machine.trainer.stop()
    machine.trainer.run()
    machine.saving.copy()()
    assert machine.saved == 7
    assert "not used up: the disk is gone" in caplog.text
