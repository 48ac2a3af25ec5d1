"""Collects the counters of a trainer for `status`."""

from __future__ import annotations

from typing import Any

from xpeer.mixing.exchanges import Exchanges
from xpeer.status import Progress
from xpeer.training.learner import Learner
from xpeer.training.measuring import Measurements
from xpeer.training.schedule import learning_rate, planned_steps
from xpeer.training.timings import Timings


def progress_of(
    learner: Learner, exchanges: Exchanges, measured: Measurements, timings: Timings
) -> Progress:
    """Collect the present counters; on any thread.

    What is not computed here is counted under the field's own name, in the run's counters, the
    exchanges or the timings. The first of them that has the name gives the value.
    """
    counters, manifest = learner.counters, learner.manifest
    apart = exchanges.misalignment
    computed: dict[str, Any] = {
        "planned_steps": planned_steps(manifest),
        "loss_train": learner.loss,
        "loss_train_age_s": learner.loss_age_s,
        "loss_measured_step": measured.step,
        "loss_measured_age_s": measured.age_s,
        "loss_validation": measured.validation,
        "loss_public": measured.public,
        "loss_public_age": measured.age(counters),
        "loss_problem": measured.problem,
        "adapter_misalignment": None if apart is None else apart.latest,
        "learning_rate": learning_rate(counters, manifest),
        "seconds_training": counters.seconds,
        "seconds_here": timings.here_s,
        "seconds_blocked": timings.blocked_s + exchanges.seconds_blocked,
        "seconds_boundary": timings.boundary_s,
        "seconds_saving": timings.saving_s,
    }
    counted = {
        name: _counted(name, counters, exchanges, timings)
        for name in Progress.__struct_fields__
        if name not in computed
    }
    return Progress(**computed, **counted)


def _counted(name: str, *sources: object) -> Any:
    for source in sources:
        if hasattr(source, name):
            return getattr(source, name)
    names = ", ".join(type(source).__name__ for source in sources)
    raise AttributeError(f"Progress.{name} is counted nowhere: no {name} in {names}")
