"""A trainer process whose released gradients are given: it reads its text, samples, clips and
charges, but takes the same steps whatever the text is.
"""

from __future__ import annotations

import itertools

import torch

from xpeer.privacy.gradient import PrivateGradient
from xpeer.privacy.steps import StepResult
from xpeer.trainer.main import main


def give_gradients() -> None:
    """Put random numbers where a step leaves its noised gradient: the same in every process."""
    taken = itertools.count()
    real = PrivateGradient.step

    def step(self: PrivateGradient) -> StepResult:
        result = real(self)
        generator = torch.Generator().manual_seed(next(taken))
        for parameter in self._parameters:
            assert parameter.grad is not None
            parameter.grad.copy_(torch.randn(parameter.shape, generator=generator))
        return result

    PrivateGradient.step = step  # type: ignore[method-assign]


if __name__ == "__main__":
    give_gradients()
    main()
