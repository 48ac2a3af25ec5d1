"""What an attack's success says about privacy: pure numbers.

Every lower bound on epsilon holds with the stated probability, whatever the attack: if it comes out
above the claimed epsilon, the claim is wrong (or chance was, with that probability).
"""

from __future__ import annotations

import functools
import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy import stats

CONFIDENCE: Final = 0.999
"""Of each lower bound."""
_EPSILON_MAX: Final = 50.0

Floats = npt.NDArray[np.float64]


def at_most(successes: int, trials: int, error: float) -> float:
    """Upper end of the exact (Clopper-Pearson) interval of a rate, wrong with probability error."""
    if successes >= trials:
        return 1.0
    return float(stats.beta.ppf(1 - error, successes + 1, trials - successes))


def epsilon_of_rates(false_positives: float, false_negatives: float, delta: float) -> float:
    """The least epsilon for which a test may have such rates (Kairouz et al. 2015, theorem 2.1)."""
    best = 0.0
    for one, other in ((false_positives, false_negatives), (false_negatives, false_positives)):
        if one > 0 and 1 - delta - other > one:
            best = max(best, math.log((1 - delta - other) / one))
    return best


class Family:
    """Poisson-subsampled Gaussians of unknown sigma: what rates of a test they allow.

    Auditing within the family (Nasr et al. 2023, arXiv:2302.07956, section 4.2, with privacy loss
    distributions in place of Gaussian DP) needs far fewer runs than `epsilon_of_rates`, and is a
    bound only if the mechanism is of the family and nothing but its sigma may be wrong.

    Args:
        sampling_probability: q.
        steps: T.
        delta: at which epsilon is told.
    """

    def __init__(self, sampling_probability: float, steps: int, delta: float) -> None:
        self._q, self._steps, self._delta = sampling_probability, steps, delta
        self._losses = np.linspace(0.0, 12.0, 97)

    def epsilon(self, false_positives: float, false_negatives: float) -> float:
        """Of the smallest sigma that does not allow these rates; 0 if every sigma up to 64 does."""
        low, high = math.log(0.2), math.log(64.0)  # allowed below, not allowed above
        if self.allows(math.exp(high), false_positives, false_negatives):
            return 0.0
        if not self.allows(math.exp(low), false_positives, false_negatives):
            return self.epsilon_of(math.exp(low))
        for _ in range(12):
            middle = (low + high) / 2
            if self.allows(math.exp(middle), false_positives, false_negatives):
                low = middle
            else:
                high = middle
        return self.epsilon_of(math.exp(high))

    def allows(self, sigma: float, false_positives: float, false_negatives: float) -> bool:
        """Whether some test against steps with this sigma can have such rates."""
        deltas = self._deltas(sigma)
        for one, other in (
            (false_positives, false_negatives),
            (false_negatives, false_positives),
        ):
            if bool((np.exp(self._losses) * one + other < 1 - deltas - 1e-9).any()):
                return False
        return True

    def epsilon_of(self, sigma: float) -> float:
        """Of the T steps with this sigma."""
        return float(_composed(sigma, self._q, self._steps).get_epsilon_for_delta(self._delta))

    def _deltas(self, sigma: float) -> Floats:
        found = _composed(sigma, self._q, self._steps).get_delta_for_epsilon(self._losses)
        return np.asarray(found, dtype=np.float64)


@functools.lru_cache(maxsize=512)
def _composed(sigma: float, q: float, steps: int) -> Any:
    from dp_accounting.pld import privacy_loss_distribution as pld  # noqa: PLC0415 - slow

    interval = 1e-3 if sigma > 0.3 else 1e-2
    one = pld.from_gaussian_mechanism(
        sigma, sampling_prob=q, value_discretization_interval=interval, use_connect_dots=True
    )
    return one.self_compose(steps)


def one_run_p_value(
    canaries: int, guesses: int, correct: int, epsilon: float, delta: float
) -> float:
    """How probable so many correct guesses are, at most, under (epsilon, delta)-privacy.

    Steinke, Nasr and Jagielski 2023 (arXiv:2305.08846), theorem 5.2 and appendix D: each canary was
    included by a fair coin of its own, and the attacker guesses some of the coins.

    Args:
        canaries: m.
        guesses: r <= m, made on whichever canaries it likes.
        correct: v.
        epsilon: claimed.
        delta: claimed.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"{correct} of {guesses} guesses on {canaries} canaries")
    right = 1 / (1 + math.exp(-epsilon))
    beta = float(stats.binom.sf(correct - 1, guesses, right))
    masses = stats.binom.pmf(np.arange(correct - 1, -1, -1), guesses, right)
    shares = np.cumsum(masses) / np.arange(1, correct + 1)
    alpha = float(shares.max()) if correct else 0.0
    return min(1.0, beta + 2 * canaries * delta * alpha)


def one_run_epsilon(
    canaries: int, guesses: int, correct: int, delta: float, error: float = 1 - CONFIDENCE
) -> float:
    """The least epsilon that so many correct guesses do not refute."""

    def refuted(epsilon: float) -> bool:
        return one_run_p_value(canaries, guesses, correct, epsilon, delta) < error

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high) and high < _EPSILON_MAX:
        low, high = high, 2 * high
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


GUESS_SHARES: Final = (0.05, 0.1, 0.2, 0.4, 1.0)
"""Of the canaries: half of them the highest scores, half the lowest."""


def one_run_audit(scores: Floats, included: npt.NDArray[np.bool_], delta: float) -> float:
    """Lower bound on epsilon from one run: the most confident guesses, for several numbers of them
    (the error is divided among those: Bonferroni).

    Args:
        scores: (m,): higher = rather included.
        included: (m,): the coins.
        delta: claimed.
    """
    order = np.argsort(scores, kind="stable")
    best = 0.0
    for share in GUESS_SHARES:
        half = int(len(scores) * share / 2)
        if half:
            correct = int(included[order[-half:]].sum() + (~included[order[:half]]).sum())
            error = (1 - CONFIDENCE) / len(GUESS_SHARES)
            bound = one_run_epsilon(len(scores), 2 * half, correct, delta, error)
            best = max(best, bound)
    return best


def area(members: Floats, others: Floats) -> float:
    """Area under the curve: that a member scores above a non-member."""
    ranks = stats.rankdata(np.concatenate([members, others]))
    above = ranks[: len(members)].sum() - len(members) * (len(members) + 1) / 2
    return float(above / (len(members) * len(others)))


def found_at(members: Floats, others: Floats, false_positives: float = 0.01) -> float:
    """Share of members found when this share of the others is taken for members."""
    threshold = np.quantile(others, 1 - false_positives, method="higher")
    return float((members > threshold).mean())


def exposure(canary: float, others: Floats) -> float:
    """log2 of the number of candidates over the canary's rank among them, by loss, in bits.

    Carlini et al. 2019 (arXiv:1802.08232), definition 6, on a sample of the candidates. 0 to
    log2(candidates); 1.44 on average for what was never seen.
    """
    rank = 1 + int((others < canary).sum())
    return math.log2((len(others) + 1) / rank)
