"""How long things take on simulated links; no real clock."""

from __future__ import annotations

from benchmarks.simulator.model import NUM_PARAMS
from benchmarks.simulator.spec import Link


class Links:
    """Every peer sends one payload after the other over its own connection.

    Args:
        link: everybody's; None: transfers take no time.
        peers: N.
    """

    def __init__(self, link: Link | None, peers: int) -> None:
        self._link = link
        self._free_s = [0.0] * peers
        self.bytes_sent = [0.0] * peers
        """By each peer, as payloads of the simulated model: not scaled to the link's."""

    def send(self, peer: int, payload_bytes: float, now_s: float) -> float:
        """Queue a payload; returns when its last byte arrives."""
        self.bytes_sent[peer] += payload_bytes
        if self._link is None:
            return now_s
        start = max(now_s, self._free_s[peer])
        self._free_s[peer] = start + self._duration_s(payload_bytes)
        return self._free_s[peer] + self._link.latency_s

    def all_reduce(self, payload_bytes: float, now_s: float) -> float:
        """A ring over all peers: each sends 2 (N - 1) parts of 1/N of the payload, one after the
        other (Patarasuk & Yuan 2009); returns when all have the result.
        """
        n = len(self._free_s)
        rounds = 2 * (n - 1)
        for peer in range(n):
            self.bytes_sent[peer] += rounds * payload_bytes / n
        if self._link is None:
            return now_s
        start = max(now_s, *self._free_s)
        sent = start + rounds * self._duration_s(payload_bytes / n)
        self._free_s = [sent] * n
        return sent + rounds * self._link.latency_s

    def _duration_s(self, payload_bytes: float) -> float:
        if self._link is None:
            return 0.0
        scaled = payload_bytes * self._link.model_params / NUM_PARAMS
        return scaled * 8 / (self._link.bandwidth_mbit_s * 1e6)
