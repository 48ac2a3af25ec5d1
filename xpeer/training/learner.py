"""Takes one step of training: gradient, optimiser, counters. Knows nothing of partners."""

from __future__ import annotations

import time

from xpeer.manifest import Manifest
from xpeer.mixing.parameters import Parameters
from xpeer.privacy.mechanism import Mechanism
from xpeer.training.gradient_window import GradientWindow
from xpeer.training.measuring import require_finite
from xpeer.training.optimiser import allocate_moments, make_optimiser
from xpeer.training.schedule import Counters, learning_rate


class Learner:
    """One peer's parameters, moments and counters. Belongs to the training thread.

    Args:
        manifest: of the swarm.
        parameters: of the model.
        mechanism: computes the gradients.
        gradients: gathers them, if the optimiser takes one step a window.
        counters: how far training has come.

    Attributes:
        manifest, parameters, mechanism, gradients, counters: as given.
        optimiser: of local steps; `begin_at` replaces it.
        loss: loss of the last step's batch; None until the first step, and after an empty batch.
    """

    def __init__(
        self,
        manifest: Manifest,
        parameters: Parameters,
        mechanism: Mechanism,
        gradients: GradientWindow,
        counters: Counters,
    ) -> None:
        self.manifest = manifest
        self.parameters = parameters
        self.mechanism = mechanism
        self.gradients = gradients
        self.counters = counters
        self.optimiser = make_optimiser(manifest, parameters)
        self.loss: float | None = None
        self._stepped_at = 0.0
        """When the last step ended, monotonic s; 0 until the first one has."""

    @property
    def loss_age_s(self) -> float | None:
        """Seconds since `loss` was computed; None if there is none."""
        return None if self.loss is None else time.monotonic() - self._stepped_at

    def prepare(self) -> None:
        """Take the memory that steps need beside their gradients, before one is charged.

        Raises:
            ShortOfMemoryError: it is not there.
        """
        allocate_moments(self.optimiser)

    def step(self) -> int:
        """Take a charged step; returns its number of tokens.

        Raises:
            StepAbandonedError: the step was abandoned; its charge is used up.
            DivergedError: without privacy, the loss is not finite.
        """
        rate = learning_rate(self.counters, self.manifest)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        result = self.mechanism.step_gradient()
        # Under privacy, stopping on a private loss would reveal it.
        if not self.manifest.privacy.policy.hides_batches:
            require_finite(result.loss, self.counters)
        if self.gradients.in_use:
            self.gradients.add(self.parameters.read_gradients())
        else:
            self.optimiser.step()
        self.loss, self._stepped_at = result.loss, time.monotonic()
        self.counters.step += 1
        self.counters.tokens += result.tokens
        self.counters.clip_norm = result.clip_norm
        return result.tokens

    def take_window_step(self) -> None:
        """Have the optimiser take a step with the gradient of a window.

        Raises:
            ShortOfMemoryError: see `prepare`; the gradient is still there.
        """
        self.prepare()
        gradient = self.gradients.take()
        if gradient is not None:
            self.parameters.write_gradients(gradient)
            self.optimiser.step()

    def begin_at(self, step: int) -> None:
        """Go on from a donor's parameters of that step, with fresh moments and a short warm-up."""
        self.gradients.begin()
        self.optimiser = make_optimiser(self.manifest, self.parameters)
        self.counters.step = self.counters.moments_step = step
        self.counters.window = step // self.manifest.round.window_steps
        self.counters.joined = True
