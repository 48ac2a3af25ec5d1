"""Collects the counters of a trainer for `status`."""

from __future__ import annotations

from xpeer.mixing.exchanges import Exchanges
from xpeer.status import Progress
from xpeer.training.learner import Learner
from xpeer.training.measuring import Measurements
from xpeer.training.schedule import learning_rate, planned_steps
from xpeer.training.timings import Timings


def progress_of(
    learner: Learner, exchanges: Exchanges, measured: Measurements, timings: Timings
) -> Progress:
    """Collect the present counters; on any thread."""
    counters, manifest = learner.counters, learner.manifest
    return Progress(
        step=counters.step,
        window=counters.window,
        tokens=counters.tokens,
        planned_steps=planned_steps(manifest),
        loss_train=learner.loss,
        loss_train_age_s=learner.loss_age_s,
        loss_measured_step=measured.step,
        loss_measured_age_s=measured.age_s,
        loss_validation=measured.validation,
        loss_public=measured.public,
        loss_public_age=measured.age(counters),
        loss_problem=measured.problem,
        learning_rate=learning_rate(counters, manifest),
        tokens_per_s=timings.tokens_per_s,
        consensus_distance=exchanges.consensus_distance,
        merges=counters.merges,
        merges_clipped=counters.merges_clipped,
        steps_late=exchanges.steps_late,
        seconds_training=counters.seconds,
        seconds_here=timings.here_s,
        seconds_blocked=timings.blocked_s + exchanges.seconds_blocked,
        seconds_boundary=timings.boundary_s,
        seconds_saving=timings.saving_s,
        seconds_snapshot=exchanges.seconds_snapshot,
        seconds_merge=exchanges.seconds_merge,
        rest_s=timings.rest_s,
    )
