"""Rules with an outer optimiser; its gradient is how far a fragment moved since its last exchange.

This is called a pseudo-gradient. phi_i is the fragment's anchor, its parameters after the last
outer step. If an exchange fails, there is no outer step: training goes on, and the next
pseudo-gradient is longer.
"""

from __future__ import annotations

import torch

from xpeer.mixing.rules.base import Correction, Rule
from xpeer.policies import RULES

_ANCHOR, _MEMORY, _RESIDUAL = "anchor.", "memory.", "residual."


class _Anchored(Rule):
    """Keeps phi and a memory m per fragment.

    Args:
        rate: alpha (GASLoC: eta).
        momentum: mu (GASLoC: gamma).
        consensus: gamma (GASLoC: alpha); DiLoCo has none.
    """

    def __init__(self, rate: float, momentum: float, consensus: float) -> None:
        self._rate, self._momentum, self._consensus = rate, momentum, consensus
        self._anchor: dict[int, torch.Tensor] = {}
        self._memory: dict[int, torch.Tensor] = {}

    def begin(self, fragment: int, theta: torch.Tensor) -> None:
        """Start again: phi = theta, m = 0."""
        self._anchor[fragment] = theta.clone()
        self._memory[fragment] = torch.zeros_like(theta)

    def merged(self, fragment: int, state: tuple[torch.Tensor, ...]) -> None:
        """Replace phi and m by those that `correct` computed."""
        self._anchor[fragment], self._memory[fragment] = state

    def moved(self, fragment: int, correction: torch.Tensor) -> None:
        """Move the anchor by the correction."""
        self._anchor[fragment].add_(correction)

    def state(self) -> dict[str, torch.Tensor]:
        """Return phi and m of every fragment."""
        anchors = {f"{_ANCHOR}{f}": value for f, value in self._anchor.items()}
        return anchors | {f"{_MEMORY}{f}": value for f, value in self._memory.items()}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state` returned."""
        for kind, kept in ((_ANCHOR, self._anchor), (_MEMORY, self._memory)):
            for fragment, began in kept.items():
                kept[fragment] = state.get(f"{kind}{fragment}", began).clone()


class DiLoCo(_Anchored):
    """Nesterov momentum on the averaged pseudo-gradient.

    Douillard et al. 2023, arXiv 2311.08105, algorithm 1; FedOpt, Reddi et al. 2021:

        Delta = phi - mean_j theta_j;  m <- mu m + Delta;  phi <- phi - alpha (Delta + mu m)

    Parameters travel instead of their change, so that a peer whose anchor drifted when an exchange
    failed is pulled back by the next one. For groups smaller than the swarm there is NoLoCo.
    """

    reads_own = True

    def correct(
        self, fragment: int, theta: torch.Tensor, own: torch.Tensor, shift: torch.Tensor
    ) -> Correction:
        """Do one outer step."""
        phi, mu = self._anchor[fragment], self._momentum
        delta = phi - (own[0] + shift[0])
        velocity = mu * self._memory[fragment] + delta
        target = phi - self._rate * (delta + mu * velocity)
        return Correction(target - theta, (target, velocity))


class NoLoCo(_Anchored):
    """Momentum with a consensus term, for random small groups.

    Kolehmainen et al. 2025, arXiv 2506.10911; the rule of the authors' code:

        m <- mu m + alpha mean_j(theta_j - phi_j) + gamma (mean_j phi_j - phi_i);  phi <- phi + m

    What a codec drops of theta - phi is added to the next one (error feedback, Seide et al. 2014;
    Karimireddy et al. 2019, algorithm 2).
    """

    vectors = RULES["noloco"].vectors
    parameters_at = 1
    movements_at = 0
    reads_own = True

    def __init__(self, rate: float, momentum: float, consensus: float) -> None:
        super().__init__(rate, momentum, consensus)
        self._residual: dict[int, torch.Tensor] = {}

    def begin(self, fragment: int, theta: torch.Tensor) -> None:
        """Start again, with a residual of zero."""
        super().begin(fragment, theta)
        self._residual[fragment] = torch.zeros_like(theta)

    def outgoing(self, fragment: int, theta: torch.Tensor) -> torch.Tensor:
        """Return two vectors: theta - phi + e (the residual), then phi."""
        phi = self._anchor[fragment]
        return torch.cat((theta - phi + self._residual[fragment], phi))

    def correct(
        self, fragment: int, theta: torch.Tensor, own: torch.Tensor, shift: torch.Tensor
    ) -> Correction:
        """Do one outer step."""
        velocity = self._momentum * self._memory[fragment]
        velocity += self._rate * (own[0] + shift[0])
        velocity += self._consensus * shift[1]
        phi = self._anchor[fragment]
        target, residual = phi + velocity, theta - phi + self._residual[fragment] - own[0]
        return Correction(target - theta, (target, velocity, residual))

    def merged(self, fragment: int, state: tuple[torch.Tensor, ...]) -> None:
        """Replace phi, m and the residual by those that `correct` computed."""
        *both, self._residual[fragment] = state
        super().merged(fragment, tuple(both))

    def state(self) -> dict[str, torch.Tensor]:
        """Return phi, m and the residual of every fragment."""
        return super().state() | {f"{_RESIDUAL}{f}": e for f, e in self._residual.items()}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state` returned."""
        super().restore(state)
        for fragment, began in self._residual.items():
            self._residual[fragment] = state.get(f"{_RESIDUAL}{fragment}", began).clone()


class GASLoC(_Anchored):
    """Accelerated gossip on the parameters after local steps (arXiv 2606.11081).

        y_t = theta_t + eta g_t,  g_t = theta after the local steps - theta_t
        theta_(t+1) = y_t - alpha Lambda y_t + gamma (y_t - y_(t-1))

    Lambda is the weighted Laplacian of the slot's groups, so that -Lambda y is the shift.
    phi is theta_t, and y_(t-1) takes the place of m.
    """

    def begin(self, fragment: int, theta: torch.Tensor) -> None:
        """Start again: phi = y_(-1) = theta."""
        super().begin(fragment, theta)
        self._memory[fragment] = theta.clone()

    def outgoing(self, fragment: int, theta: torch.Tensor) -> torch.Tensor:
        """Return the extrapolated y."""
        phi = self._anchor[fragment]
        return phi + self._rate * (theta - phi)

    def correct(
        self,
        fragment: int,
        theta: torch.Tensor,
        own: torch.Tensor,
        shift: torch.Tensor,
    ) -> Correction:
        """Compute theta_(t+1) from y and the shift."""
        y = self.outgoing(fragment, theta)
        target = y + self._consensus * shift[0] + self._momentum * (y - self._memory[fragment])
        return Correction(target - theta, (target, y))

    def moved(self, fragment: int, correction: torch.Tensor) -> None:
        """Move phi and y_(t-1) by the correction."""
        super().moved(fragment, correction)
        self._memory[fragment].add_(correction)
