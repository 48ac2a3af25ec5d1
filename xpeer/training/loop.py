"""The training loop of one node. Knows nothing of processes, sockets or partners' addresses.

    boundary: merge, snapshot, other submitted jobs    | nothing but these
    step:     private gradient, AdamW                  | touches the parameters

If another thread needs the parameters, it submits a job. Jobs are carried out at the next boundary,
or at once while no steps are taken. The loop waits for the ledger's disk, and with gradient
aggregation for the group; both count as `seconds_blocked`. Other rules never wait for the network.
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
from xpeer.mixing.exchanges import Exchanges
from xpeer.mixing.screen import RateShare
from xpeer.phase import Order, TrainerPhase
from xpeer.status import Progress
from xpeer.training.handover import copy_for_joiner, require_as_good, require_numbers, step_after
from xpeer.training.learner import Learner
from xpeer.training.measuring import Measurements, require_finite
from xpeer.training.pacing import Pacing
from xpeer.training.progress import progress_of
from xpeer.training.pulse import Pulse, StepAbandonedError
from xpeer.training.schedule import decayed, warmed_up
from xpeer.training.timings import Timings
from xpeer.update import PrivateUpdate

SHORT_S: Final = 5.0
"""After a stop, a step may go on for so long; then it is abandoned."""
_LOOK_S: Final = 1.0
"""Longest time between two looks at the clock while the loop waits."""
_USE_UP_S: Final = 5.0
"""After a stop, steps that are charged already are taken if that takes at most so long."""
_HELD_S: Final = 1.0
"""Pause before the loop checks again whether checkpoints can be written."""
_STOP: Final = object()
"""The last job of a loop."""

logger = logging.getLogger("xpeer.training")


class TrainingLoop:
    """Takes the steps of one node, and carries out jobs at the boundaries between them.

    Args:
        learner: takes the steps.
        exchanges: meetings in flight.
        pacing: says whether a step may be taken, and when windows end.
        measurements: of the losses.
        timings: counts where the time goes.
        pulse: signs of life.
        throttle: fraction of the time to compute in.
        awaiting: whether the parameters are still to be imported; until then nothing is trained or
            sent.

    Attributes:
        learner, exchanges, pacing, measurements, timings, pulse: as given.
        manifest, parameters, counters: the learner's.
        awaiting: True iff the parameters are random, and still to be imported.
        carry_out: called with each job at a boundary; if it raises, that is a bug.
        before_measuring: called at a window's end, when its steps are counted. No step has tried
            what is computed next: it may be the process's end.
        on_step: called after each step with the seconds of rest that follow.
        on_state: called when `state` has changed.
    """

    def __init__(
        self,
        learner: Learner,
        exchanges: Exchanges,
        pacing: Pacing,
        measurements: Measurements,
        timings: Timings,
        pulse: Pulse,
        *,
        throttle: float = 1.0,
        awaiting: bool = False,
    ) -> None:
        self.learner = learner
        self.exchanges = exchanges
        self.pacing = pacing
        self.measurements = measurements
        self.timings = timings
        self.pulse = pulse
        self.manifest, self.parameters = learner.manifest, learner.parameters
        self.counters = learner.counters
        self.awaiting = awaiting
        self.carry_out: Callable[[Any], None] = _nobody_asks
        self.before_measuring: Callable[[], None] = _nothing
        self.on_step: Callable[[float], None] = lambda _rest_s: None
        self.on_state: Callable[[], None] = _nothing
        self._gradients = learner.gradients
        self._throttle = throttle
        self._mode: Order = "train"
        """The daemon's last order."""
        self._stopping = False
        """True iff the loop was asked to stop, and has reached that job."""
        self._jobs: queue.SimpleQueue[object] = queue.SimpleQueue()

    # ---- what other threads may call -------------------------------------------------------

    def submit(self, job: object) -> None:
        """Have a job carried out on the training thread, at the next boundary."""
        self._jobs.put(job)

    def stop(self) -> None:
        """Let `run` return at the next boundary; a step that is far from its end is abandoned."""
        self.pulse.end_step_within(SHORT_S)
        self.submit(_STOP)

    @property
    def state(self) -> TrainerPhase:
        """The loop's present phase."""
        if self._mode == "pause":
            return "paused"
        if self._mode == "mix" or self.awaiting:
            return "mixing"
        return "training" if self._gradients.due else self.pacing.state

    def progress(self) -> Progress:
        """Collect the counters for `status`."""
        return progress_of(self.learner, self.exchanges, self.measurements, self.timings)

    # ---- at a boundary ---------------------------------------------------------------------

    def set_mode(self, mode: Order) -> None:
        """Train, mix or pause from now on."""
        before, self._mode = self.state, mode
        if self.state != before:
            self._change_state()

    def require_parameters(self) -> None:
        """Refuse while the parameters are random.

        Raises:
            PeerError: they are still to be imported (NOT_READY).
        """
        if self.awaiting:
            raise PeerError(Reason.NOT_READY, "the parameters have not been fetched yet")

    def snapshot(self, meeting_id: int, fragment: int, *, averaging: bool) -> PrivateUpdate:
        """Copy a fragment and have it certified.

        Raises:
            PeerError: there is nothing to send yet (NOT_READY), or see `Exchanges.take`.
        """
        self.require_parameters()
        if self._gradients.in_use and not (averaging or self._gradients.due):
            raise PeerError(Reason.NOT_READY, "the window's gradient is not complete")
        counters, manifest = self.counters, self.manifest
        rate = RateShare(warmed_up(counters, manifest), decayed(counters, manifest))
        return self.exchanges.take(
            meeting_id, fragment, counters.step, averaging=averaging, rate=rate
        )

    def merge(self, meeting_id: int) -> None:
        """Merge a resolved meeting, unless it was dropped."""
        clipped = self.exchanges.merge(meeting_id, self.counters.step)
        if clipped >= 0:
            self.counters.merges += 1
            self.counters.merges_clipped += clipped

    def replace(
        self, flat: torch.Tensor, step: int, at_most: float = math.inf, until: int | None = None
    ) -> tuple[float, float]:
        """Go on from a donor's parameters, with fresh moments and a short warm-up.

        Args:
            flat: (num_params,) float32, CPU.
            step: the donor's step; ours from now on, so that both end at the same time.
            at_most: highest public loss to accept.
            until: see `handover.step_after`.

        Returns:
            Public loss before (NaN = there was nothing to measure) and after.

        Raises:
            PeerError: the parameters are not finite (NOT_FINITE), their loss is above `at_most`
                (REFUSED) or ours (WORSE_THAN_OURS), or `until` is reached (NOT_AHEAD). Ours stay.
        """
        require_numbers(flat)
        if not self.awaiting:
            step = step_after(self.counters.step, step, until)
        before = math.nan if self.awaiting else self.public_loss()
        require_as_good(flat, self.parameters, self.measurements, before, at_most)
        self.parameters.write(flat)
        self.exchanges.begin(behind=True)
        self.learner.begin_at(step)
        self.pacing.begin_at(step)
        was, self.awaiting = self.state, False
        after = self.measure()[0]
        if self.state != was:
            self._change_state()
        return before, after

    def show(self, out: torch.Tensor) -> Callable[[], None]:
        """Copy the parameters for a joiner; see `handover.copy_for_joiner`.

        Raises:
            PeerError: there is nothing to give yet (NOT_READY).
        """
        self.require_parameters()
        return copy_for_joiner(out, self.parameters, self.exchanges)

    def measure(self) -> tuple[float, float | None]:
        """Measure the public and the held-out loss now."""
        return self.measurements.take(self.counters)

    def public_loss(self) -> float:
        """The present parameters' loss on the public text, measured if need be."""
        return self.measurements.fresh_public(self.counters)

    # ---- the loop; one thread --------------------------------------------------------------

    def run(self, steps: int | None = None) -> None:
        """Train until stopped; with `steps`, without waiting for jobs.

        Args:
            steps: return after so many steps, or as soon as no more may be taken.

        Raises:
            LocalError: training diverged, or the ledger can't be written.
        """
        target = None if steps is None else self.counters.step + steps
        self.pacing.restart_clock()
        while True:
            self._boundary()
            if self._stopping:
                self._use_up()
                return
            if target is not None and self.counters.step >= target:
                return
            if self.state == "training":
                if self._gradients.due:
                    self._finish_gradient()
                else:
                    self._step_and_rest()
            elif target is not None:
                return
            else:
                self._do(self._jobs.get())

    def _boundary(self) -> None:
        with self.timings.at_boundary():
            while not self._stopping:
                try:
                    job = self._jobs.get_nowait()
                except queue.Empty:
                    break
                self._do(job)

    def _do(self, job: object) -> None:
        if job is _STOP:
            self._stopping = True
        else:
            self.carry_out(job)

    def _change_state(self) -> None:
        self.pacing.restart_clock()
        self.on_state()

    def _step_and_rest(self) -> None:
        began, measured_s = time.monotonic(), self.measurements.seconds
        blocked_s = self.timings.blocked_s
        if not self._permit():
            return
        try:
            tokens = self._step()
        except StepAbandonedError:
            return  # its charge is used up
        now = time.monotonic()
        blocked_s = self.timings.blocked_s - blocked_s
        worked_s = self.timings.worked(now - began - blocked_s, tokens)
        self.counters.seconds += worked_s
        self._count_step(now)
        worked_s += self.measurements.seconds - measured_s
        throttle = self._throttle if self.state == "training" else 1.0
        rest_s = self.timings.begin_rest(worked_s, throttle)
        self.on_step(rest_s)
        if self.state != "training":
            self.on_state()
        elif rest_s:
            self._serve_for(rest_s)

    def _permit(self) -> bool:
        """Get a charged step; returns whether there is one. If the disk is full, wait a while."""
        self.learner.prepare()
        permission = self.pacing.obtain_step()
        if permission == "spent":
            self._gradients.end_budget()
            self.on_state()
        elif permission == "held":
            self._serve_for(_HELD_S)
        return permission == "step"

    def _step(self) -> int:
        with self.timings.step():
            return self.learner.step()

    def _count_step(self, now: float) -> None:
        """Count a step; at a window's end, measure the losses."""
        over = self.pacing.count_step(now)
        if over or self.pacing.ended:  # the gradient of a short last window counts, too
            self._gradients.end_window()
        if not self._gradients.in_use:
            self.pacing.permits.moved()
        if over:
            self.before_measuring()
            self.measurements.at_window_end(self.counters)
            require_finite(self.measurements.public, self.counters)

    def _finish_gradient(self) -> None:
        """Wait for the group's gradient, then take the window's step; gradient aggregation only."""
        with self.timings.waiting_for_the_group():
            self._serve_for(
                self.manifest.round.deadline_s,
                lambda: self._gradients.averaged,
                most_s=2 * _LOOK_S,
            )
        if self._stopping or self.state != "training":
            return  # e.g. paused: the gradient stays due
        self._take_window_step()
        if self.pacing.state != "training":
            self.on_state()

    def _take_window_step(self) -> None:
        self.learner.take_window_step()
        self.pacing.permits.moved()

    def _serve_for(
        self, seconds: float, done: Callable[[], bool] = lambda: False, most_s: float = math.inf
    ) -> None:
        """Carry out jobs, but take no step, for so long, or until done or another order.

        Args:
            seconds: to wait, by the clock.
            done: asked after every job.
            most_s: the most that the time between two looks at the clock may count. While the
                process was stopped or the machine suspended, others could not do anything either.
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

    # ---- the end ---------------------------------------------------------------------------

    def _use_up(self) -> None:
        """Take the steps that are charged already, if that is quick: a restart charges anew.

        A loop that was ordered to pause or to mix takes none. Its charges stay: they are forfeited.
        """
        if self.state != "training":
            return
        self._take_the_rest()
        if self._gradients.due:
            self._take_window_step()

    def _take_the_rest(self) -> None:
        step_s = self.timings.step_s
        if not step_s or self._gradients.due or self.pacing.budget_spent or self.pulse.late:
            return
        try:
            rest = self.pacing.permits.rest(self.pacing.window_left)
        except LocalError as e:  # the steps so far are charged, and can be saved
            logger.warning("charged steps were not used up: %s", e)
            return
        if rest * step_s > _USE_UP_S:
            return
        for _ in range(rest):
            if self.pacing.ended or not self._permit():
                break
            try:
                self._step()
            except StepAbandonedError:
                break
            self._count_step(time.monotonic())


def _nothing() -> None:
    return None


def _nobody_asks(job: object) -> None:
    raise TrainerError(f"nobody carries out {job}")
