"""Makes a training loop and its parts, as the manifest wants them.

Knows nothing of files: text, ledger, checkpoint and settings are `trainer/build.py`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence

from xpeer.manifest import Manifest
from xpeer.mixing import combine, rules
from xpeer.mixing.exchanges import Exchanges
from xpeer.mixing.factors import FactorPair
from xpeer.mixing.misalignment import Misalignment
from xpeer.mixing.parameters import Parameters
from xpeer.privacy.mechanism import Mechanism
from xpeer.training.gradient_window import GradientWindow
from xpeer.training.learner import Learner
from xpeer.training.loop import TrainingLoop
from xpeer.training.measuring import Evaluation, Measurements
from xpeer.training.pacing import Pacing
from xpeer.training.pulse import Pulse
from xpeer.training.schedule import Counters
from xpeer.training.timings import Timings
from xpeer.wire.fixedpoint import grid_of


def make_loop(
    manifest: Manifest,
    parameters: Parameters,
    mechanism: Mechanism,
    evaluation: Evaluation,
    *,
    adapters: Sequence[FactorPair] | None = None,
    counters: Counters | None = None,
    pulse: Pulse | None = None,
    throttle: float = 1.0,
    awaiting: bool = False,
) -> TrainingLoop:
    """Make a loop and its parts.

    Args:
        manifest: of the swarm.
        parameters: of the model.
        mechanism: computes the gradients.
        evaluation: measures the losses.
        adapters: of the model, if they alone are trained.
        counters: of a checkpoint; None = begin at zero.
        pulse: signs of life of this process.
        throttle: fraction of the time to compute in.
        awaiting: whether the parameters are still to be imported; until then nothing is trained or
            sent.
    """
    counters = Counters() if counters is None else counters
    timings, section = Timings(), manifest.round
    rule = rules.make(section)
    apart = Misalignment(adapters, parameters.fragments) if adapters is not None else None
    mixing = section.codec, mechanism, rule, grid_of(section), combine.make(section), apart
    exchanges = Exchanges(parameters, *mixing)
    exchanges.begin()
    return TrainingLoop(
        Learner(manifest, parameters, mechanism, GradientWindow(rule), counters),
        exchanges,
        Pacing(manifest, mechanism, counters, timings),
        Measurements(
            evaluation,
            section,
            None if apart is None else lambda: apart.measure(parameters.read),
        ),
        timings,
        pulse or Pulse(),
        throttle=throttle,
        awaiting=awaiting,
    )
