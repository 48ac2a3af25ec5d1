"""What a peer could export in mid-run, against everybody's mean model.

own          theta_i
record m     theta_i[f] + sum of what it still differed by from its last m partners, / (m + 1):
             costs memory of m models, no traffic; as old as those exchanges
stale m      mean of theta_i[f] and the last values received from m partners
asked m      mean of theta_i and the present parameters of m partners, fetched for the export
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from benchmarks.simulator.exchange import Arrival, Exchange

Evaluate = Callable[[torch.Tensor], torch.Tensor]


class Records:
    """What every peer keeps of its last partners, per fragment."""

    def __init__(self, peers: int, exchange: Exchange) -> None:
        self._exchange = exchange
        # [peer][partner][fragment] -> (residual, values), oldest meeting first
        self._kept: list[dict[int, dict[int, tuple[torch.Tensor, torch.Tensor]]]] = [
            {} for _ in range(peers)
        ]

    def merged(self, arrival: Arrival, theta: torch.Tensor) -> None:
        """Called after a merge, with (N, P) as it is now."""
        own = theta[arrival.peer].index_select(0, self._exchange.indices(arrival.fragment))
        by_fragment = self._kept[arrival.peer].setdefault(arrival.fragment, {})
        for partner, difference in arrival.received.items():
            residual = difference - arrival.correction.values
            by_fragment.pop(partner, None)
            by_fragment[partner] = residual, own + residual

    def exported(self, theta: torch.Tensor, partners: int, *, stale: bool) -> torch.Tensor:
        """Every peer's export, (N, P)."""
        out = theta.clone()
        for peer, by_fragment in enumerate(self._kept):
            for fragment, kept in by_fragment.items():
                last = list(kept.values())[-partners:]
                indices = self._exchange.indices(fragment)
                own = theta[peer].index_select(0, indices)
                terms = [values - own if stale else residual for residual, values in last]
                share = torch.stack(terms).sum(dim=0) / (len(last) + 1)
                out[peer].index_add_(0, indices, share)
        return out


def measure(
    theta: torch.Tensor, records: Records, exchange: Exchange, evaluate: Evaluate
) -> dict[str, list[float]]:
    """Loss of every candidate at every peer, nats per byte; `mean model` has one entry."""
    n = theta.shape[0]
    coded = torch.stack([exchange.coded(row) for row in theta])
    candidates = {"mean model": theta.mean(dim=0, keepdim=True), "own": theta}
    for partners in sorted({1, 2, 3, n - 1}):
        if partners < n:
            candidates[f"record {partners}"] = records.exported(theta, partners, stale=False)
            candidates[f"stale {partners}"] = records.exported(theta, partners, stale=True)
            candidates[f"asked {partners}"] = _asked(theta, coded, range(1, partners + 1))
    return {name: evaluate(models).tolist() for name, models in candidates.items()}


def _asked(theta: torch.Tensor, coded: torch.Tensor, offsets: Sequence[int]) -> torch.Tensor:
    """theta_i plus the average difference from the next peers', as a pair would mix."""
    fetched = sum((coded.roll(-offset, dims=0) - coded for offset in offsets), torch.zeros(()))
    return theta + fetched / (len(offsets) + 1)
