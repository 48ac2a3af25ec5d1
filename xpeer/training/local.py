"""The training loop of one peer. Knows nothing of processes, sockets or partners' addresses.

    boundary: merge, snapshot, whatever was submitted    | the only moments at which
    step:     private gradient, AdamW                    | anything touches the parameters

Everything that other threads want from the parameters is a job that runs at the next boundary, and
at once while no steps are taken. The loop never waits for the network: what it does wait for (the
ledger's disk, at most) is counted in `seconds_blocked`.
"""

from __future__ import annotations

import logging
import math
import queue
import time
from collections.abc import Callable
from typing import Any, Final

import torch

from xpeer.errors import LocalError, PeerError, Reason, TrainerError
from xpeer.manifest import Manifest
from xpeer.phase import Order, TrainerPhase
from xpeer.status import Progress
from xpeer.training import combine, rules
from xpeer.training.charging import Permits
from xpeer.training.consolidation import consolidate
from xpeer.training.exchanges import Exchanges
from xpeer.training.measuring import Measurements, require_finite
from xpeer.training.optimiser import make_optimiser
from xpeer.training.parts import Evaluation, Mechanism, Parameters
from xpeer.training.pulse import Pulse, StepAbandonedError
from xpeer.training.schedule import Counters, learning_rate, planned_steps, share_done, warmed_up
from xpeer.training.worktime import WorkTime
from xpeer.update import PrivateUpdate
from xpeer.wire.fixedpoint import grid_of

_SMOOTHING: Final = 0.9
"""Of the speed shown, per step."""
SHORT_S: Final = 5.0
"""A step that ends so soon after a stop is finished; a longer one is abandoned."""
WORSE: Final = 1.05, 0.02
"""A donor's parameters may be this much worse on the public text than those that they replace:
factor, nats."""
_LOOK_S: Final = 1.0
_USE_UP_S: Final = 5.0
"""A stop may take so long for steps that were charged."""
_HELD_S: Final = 1.0
"""Between two looks whether checkpoints can be written again."""
_STOP: Final = object()
"""A job: the last one that is looked at."""

logger = logging.getLogger("xpeer.training")


class LocalTrainer:
    """One peer's parameters, moments, counters, and the loop.

    Args:
        manifest: of the swarm.
        parameters: of the model.
        mechanism: makes the gradients.
        evaluation: measures.
        throttle: share of the time to compute in.
        awaiting: the parameters are still to be imported; nothing is trained or shown before.
    """

    def __init__(
        self,
        manifest: Manifest,
        parameters: Parameters,
        mechanism: Mechanism,
        evaluation: Evaluation,
        *,
        throttle: float = 1.0,
        awaiting: bool = False,
    ) -> None:
        self.manifest = manifest
        self.parameters = parameters
        self.mechanism = mechanism
        self.measurements = Measurements(evaluation, manifest.round)
        self.counters = Counters()
        self.awaiting = awaiting
        self.optimiser = make_optimiser(manifest, parameters)
        rule = rules.make(manifest.round)
        self.exchanges = Exchanges(
            parameters,
            manifest.round.codec,
            mechanism,
            rule,
            grid_of(manifest.round),
            combine.make(manifest.round),
        )
        self.exchanges.begin()
        self._gradients = rule if isinstance(rule, rules.GradientAveraging) else None
        self._gradient_due = False
        self.on_step: Callable[[float], None] = lambda _rest_s: None
        self.on_state: Callable[[], None] = _nothing
        self.carry_out: Callable[[Any], None] = _nobody_asks
        self._seconds_here = 0.0
        self.seconds_blocked = 0.0
        self.seconds_boundary = 0.0
        self.seconds_saving = 0.0
        self._throttle = throttle
        self._mode: Order = "train"
        self._budget_spent = False
        self.idle = False
        """There is no text: no step is taken, and the run or the budget ends as for others."""
        self._stopping = False
        self._jobs: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.permits = Permits(manifest, mechanism, lambda: self.counters)
        self._step_s = 0.0
        self._window_step = 0
        self._window_began = time.monotonic()
        self._loss_train: float | None = None
        self._stepped_at = 0.0
        self._tokens_per_s = 0.0
        self._step_time = WorkTime()
        self.pulse = Pulse()
        self._rests_until = 0.0

    # ---- what other threads may call -------------------------------------------------------

    def submit(self, job: object) -> None:
        """Have `carry_out` called with a job on the training thread, at the next boundary."""
        self._jobs.put(job)

    def stop(self) -> None:
        """Let `run` return at the next boundary; a step that is far from its end is abandoned."""
        self.pulse.end_step_within(SHORT_S)
        self.submit(_STOP)

    def begin_idle(self, *, budget_spent: bool) -> None:
        """Before `run`: there is no text."""
        self.idle, self._budget_spent = True, budget_spent

    @property
    def state(self) -> TrainerPhase:
        """What the loop does now."""
        if self._mode == "pause":
            return "paused"
        if self._mode == "mix" or self.awaiting:
            return "mixing"
        if self._gradient_due:
            return "training"
        if self.ended:
            return "closing"
        if self._budget_spent:
            return "budget-spent"
        return "mixing" if self.idle else "training"

    @property
    def ended(self) -> bool:
        """Whether the manifest's end condition is reached."""
        done = share_done(self.counters, self.manifest)
        return done is not None and done >= 1.0

    def progress(self) -> Progress:
        """The counters as `status` shows them."""
        return Progress(
            step=self.counters.step,
            window=self.counters.window,
            tokens=self.counters.tokens,
            planned_steps=planned_steps(self.manifest),
            loss_train=self._loss_train,
            loss_train_age_s=(
                None if self._loss_train is None else time.monotonic() - self._stepped_at
            ),
            loss_measured_step=self.measurements.step,
            loss_measured_age_s=self.measurements.age_s,
            loss_validation=self.measurements.validation,
            loss_public=self.measurements.public,
            loss_public_age=self.measurements.age(self.counters),
            loss_problem=self.measurements.problem,
            learning_rate=learning_rate(self.counters, self.manifest),
            tokens_per_s=self._tokens_per_s,
            consensus_distance=self.exchanges.consensus_distance,
            merges=self.counters.merges,
            merges_clipped=self.counters.merges_clipped,
            steps_late=self.exchanges.steps_late,
            seconds_training=self.counters.seconds,
            seconds_here=self._seconds_here,
            seconds_blocked=self.seconds_blocked + self.exchanges.seconds_blocked,
            seconds_boundary=self.seconds_boundary,
            seconds_saving=self.seconds_saving,
            seconds_snapshot=self.exchanges.seconds_snapshot,
            seconds_merge=self.exchanges.seconds_merge,
            rest_s=max(0.0, self._rests_until - time.monotonic()),
        )

    # ---- the loop; one thread --------------------------------------------------------------

    def run(self, steps: int | None = None) -> None:
        """Train until stopped; or, without anybody to serve, at most so many steps.

        Args:
            steps: return after so many, or as soon as no more steps may be taken.

        Raises:
            LocalError: training diverged, or the ledger can't be written.
        """
        target = None if steps is None else self.counters.step + steps
        self._window_began = time.monotonic()
        while True:
            self._boundary()
            if self._stopping:
                self._use_up()
                return
            if target is not None and self.counters.step >= target:
                return
            if self.state == "training":
                if self._gradient_due:
                    self._finish_gradient()
                else:
                    self._step_and_rest()
            elif target is not None:
                return
            else:
                self._do(self._jobs.get())

    def set_mode(self, mode: Order) -> None:
        """At a boundary: train, mix or pause from now on."""
        before, self._mode = self.state, mode
        if self.state != before:
            self._window_began = time.monotonic()
            self.on_state()

    def require_parameters(self) -> None:
        """Refuse while the parameters are only those of chance.

        Raises:
            PeerError: they are still to be imported (NOT_READY).
        """
        if self.awaiting:
            raise PeerError(Reason.NOT_READY, "the parameters have not been fetched yet")

    def snapshot(self, meeting_id: int, fragment: int, *, averaging: bool) -> PrivateUpdate:
        """At a boundary: a certified copy of a fragment.

        Raises:
            PeerError: there is nothing to show yet (NOT_READY), or as `Exchanges.take`.
        """
        self.require_parameters()
        if self._gradients is not None and not (averaging or self._gradient_due):
            raise PeerError(Reason.NOT_READY, "the window's gradient is not complete")
        step = self.counters.step
        ramp = warmed_up(self.counters, self.manifest)
        return self.exchanges.take(meeting_id, fragment, step, averaging=averaging, warmed_up=ramp)

    def merge(self, meeting_id: int) -> None:
        """At a boundary: merge what was resolved, unless it was dropped."""
        clipped = self.exchanges.merge(meeting_id, self.counters.step)
        if clipped >= 0:
            self.counters.merges += 1
            self.counters.merges_clipped += clipped

    def replace(
        self, flat: torch.Tensor, step: int, at_most: float = math.inf
    ) -> tuple[float, float]:
        """At a boundary: a donor's parameters, fresh moments, a short warm-up.

        Args:
            flat: (num_params,) float32, CPU.
            step: of the donor; ours from now on, so that both end together.
            at_most: public loss that they may have.

        Returns:
            Public loss before (NaN: there was nothing to measure) and after.

        Raises:
            PeerError: not finite (NOT_FINITE), worse than `at_most`, or than what we have
                (REFUSED); ours stay.
        """
        if not bool(torch.isfinite(flat).all()):
            raise PeerError(Reason.NOT_FINITE, "the state has values that are not finite")
        before = math.nan if self.awaiting else self.public_loss()
        with self.parameters.showing(flat):
            measured = self.measurements.public_of_others()
        factor, nats = WORSE
        if not math.isnan(before):
            at_most = min(at_most, factor * before + nats)
        if not measured <= at_most:  # or no number at all
            detail = f"public loss {measured:.3f}, at most {at_most:.3f} is taken"
            raise PeerError(Reason.REFUSED, detail)
        self.parameters.write(flat)
        self.exchanges.begin(behind=True)
        self._gradient_due = False
        self.optimiser = make_optimiser(self.manifest, self.parameters)
        self.counters.step = self.counters.moments_step = step
        self.counters.window = step // self.manifest.round.window_steps
        self.counters.joined = True
        self._window_step = step % self.manifest.round.window_steps
        was, self.awaiting = self.state, False
        after = self.measure()[0]
        if self.state != was:
            self._window_began = time.monotonic()
            self.on_state()
        return before, after

    def show(self, out: torch.Tensor) -> Callable[[], float]:
        """At a boundary: what a joiner is given, the parameters averaged with those that partners
        showed last. Of masked groups, their means alone.

        The loss that goes with it is the last one measured of our own parameters, since measuring
        takes as long as many steps: averages are hardly ever worse, and a joiner measures itself.
        A group's means may be, and are measured.

        Args:
            out: (num_params,) float32, CPU; written.

        Returns:
            To be called on any thread, before anything else happens to `out`: finishes it; the
            public loss.

        Raises:
            PeerError: there is nothing to show yet (NOT_READY).
        """
        self.require_parameters()
        if self.exchanges.common is not None:
            self.exchanges.common.read(out)
            with self.parameters.showing(out):
                measured = self.measurements.public_of_others()
            return lambda: measured
        loss = self.measurements.public
        loss = self.public_loss() if loss is None else loss
        own, received = self.parameters.read(), self.exchanges.consolidation.now()

        def finish() -> float:
            out.copy_(consolidate(own, self.exchanges.fragments, received) if received else own)
            return loss

        return finish

    def measure(self) -> tuple[float, float | None]:
        """At a boundary: public and held-out loss."""
        return self.measurements.take(self.counters)

    def public_loss(self) -> float:
        """At a boundary: loss on the public text."""
        return self.measurements.fresh_public(self.counters)

    def _boundary(self) -> None:
        began = time.perf_counter()
        while not self._stopping:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            self._do(job)
        self.seconds_boundary += time.perf_counter() - began

    def _step_and_rest(self) -> None:
        began, measured_s = time.monotonic(), self.measurements.seconds
        if not self._permit():
            return
        try:
            tokens = self._step()
        except StepAbandonedError:
            self.permits.left -= 1  # charged, and not taken
            return
        now = time.monotonic()
        worked_s = self._step_time.counted(now - began)
        self.counters.seconds += worked_s
        self._seconds_here += worked_s
        self._follow_speed(tokens / max(worked_s, 1e-9))
        self._window(now)
        worked_s += self.measurements.seconds - measured_s
        rest_s = 0.0
        if self.state == "training" and self._throttle < 1.0 and self._step_time.known:
            rest_s = worked_s * (1.0 - self._throttle) / self._throttle
        self._rests_until = time.monotonic() + rest_s
        self.on_step(rest_s)
        if self.state != "training":
            self.on_state()
        elif rest_s:
            self._serve_for(rest_s)

    def _permit(self) -> bool:
        """Have at least one charged step, or learn that the budget is spent.

        Charged steps that a window of the clock did not need serve the next one.
        """
        began, saving_s = time.perf_counter(), self.seconds_saving
        permission = self.permits.obtain(self._step_s, self._window_left)
        saved_s = self.seconds_saving - saving_s
        self.seconds_blocked += time.perf_counter() - began - saved_s
        if permission == "spent":
            self._budget_spent = True
            self._gradient_due = self._gradients is not None and self._gradients.begun
            self.on_state()
        elif permission == "held":
            self._serve_for(_HELD_S)
        return permission == "step"

    @property
    def _window_left(self) -> int:
        return max(1, self.manifest.round.window_steps - self._window_step)

    def _use_up(self) -> None:
        """Take the steps that were charged, if that is quick: the next start charges its own."""
        if self.awaiting:
            return
        self._take_the_rest()
        if self._gradients is not None and self._gradient_due:
            self._take_window_step(self._gradients)

    def _take_the_rest(self) -> None:
        if not self._step_s or self._gradient_due or self._budget_spent or self.pulse.late:
            return
        try:
            rest = self.permits.rest(self._window_left)
        except LocalError as e:  # what was taken is charged, and can be saved
            logger.warning("charged steps were not used up: %s", e)
            return
        if rest * self._step_s > _USE_UP_S:
            return
        for _ in range(rest):
            if self.ended or not self._permit():
                break
            try:
                self._step()
            except StepAbandonedError:
                self.permits.left -= 1
                break
            self._window(time.monotonic())

    def _take_window_step(self, gradients: rules.GradientAveraging) -> None:
        self._gradient_due = False
        self.parameters.write_gradients(gradients.take())
        self.optimiser.step()
        self.permits.moved()

    def _step(self) -> int:
        """Take a step; its tokens."""
        began = time.perf_counter()
        rate = learning_rate(self.counters, self.manifest)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        result = self.mechanism.step_gradient()
        self.permits.left -= 1
        if self.manifest.privacy.mode == "off":  # else partners would see what it makes us do
            require_finite(result.loss, self.counters)
        if self._gradients is None:
            self.optimiser.step()
        else:
            self._gradients.accumulate(self.parameters.read_gradients())
        self._loss_train, self._stepped_at = result.loss, time.monotonic()
        self.counters.step += 1
        self.counters.tokens += result.tokens
        self.counters.clip_norm = result.clip_norm
        took_s = time.perf_counter() - began
        self._step_s = _SMOOTHING * (self._step_s or took_s) + (1 - _SMOOTHING) * took_s
        return result.tokens

    def _follow_speed(self, speed: float) -> None:
        if self._tokens_per_s == 0.0:
            self._tokens_per_s = speed
        self._tokens_per_s = _SMOOTHING * self._tokens_per_s + (1 - _SMOOTHING) * speed

    def _window(self, now: float) -> None:
        """A window ends by steps or by the clock; the last one with the run."""
        self._window_step += 1
        rules = self.manifest.round
        late = rules.window_s is not None and now - self._window_began >= rules.window_s
        over = late or self._window_step >= rules.window_steps
        if over:
            self.counters.window += 1
            self._window_step = 0
            self._window_began = now
        if over or self.ended:  # what a short last window gathered counts, too
            self._gradient_due = self._gradients is not None
        if over:
            self.measurements.at_window_end(self.counters)
            require_finite(self.measurements.public, self.counters)
        if self._gradients is None:
            self.permits.moved()

    def _finish_gradient(self) -> None:
        """Gradient aggregation: wait for the group's gradient, then take the window's step."""
        if self._gradients is None:
            return
        began = time.monotonic()
        self._serve_for(
            self.manifest.round.deadline_s,
            lambda: self._gradients is not None and self._gradients.averaged is not None,
            most_s=2 * _LOOK_S,
        )
        self.seconds_blocked += time.monotonic() - began
        if self._stopping or self.state != "training":
            return  # paused: the gradient stays due
        self._take_window_step(self._gradients)
        if self.ended or self._budget_spent:
            self.on_state()

    def _serve_for(
        self, seconds: float, done: Callable[[], bool] = lambda: False, most_s: float = math.inf
    ) -> None:
        """Take no step for so long, or until done, or until told otherwise.

        Args:
            seconds: by the clock.
            done: looked at after every job.
            most_s: that one look at the clock may count: while nothing ran (the process was
                stopped, the machine suspended), nobody else could do anything either.
        """
        left = seconds
        while left > 0 and not (self._stopping or done()) and self.state == "training":
            began = time.monotonic()
            try:
                job = self._jobs.get(timeout=min(left, _LOOK_S))
            except queue.Empty:
                pass
            else:
                self._do(job)
            left -= min(time.monotonic() - began, most_s)

    def _do(self, job: object) -> None:
        if job is _STOP:
            self._stopping = True
        else:
            self.carry_out(job)


def _nothing() -> None:
    return None


def _nobody_asks(job: object) -> None:
    raise TrainerError(f"nobody carries out {job}")
