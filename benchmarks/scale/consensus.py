"""How fast peers come together: real matching, codec and mixing, hundreds of peers, no network.

Every peer holds a vector; all begin at a common point plus independent noise (with zones: all of a
zone at the same point, so that only exchanges between zones help), and nobody trains: mixing is all
that moves them. In a slot one fragment of every group is quantised once, sent to
the k - 1 others, and merged with weight 1/k each. What a link adds to a payload (frames, seals,
messages) is computed from the sizes of `wire`.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from xpeer.forms import Form
from xpeer.gossip import matching
from xpeer.identity import PeerId
from xpeer.mixing.differences import difference
from xpeer.mixing.fragments import Fragments
from xpeer.mixing.screen import NormLimit
from xpeer.wire import codec, messages
from xpeer.wire.frames import FRAME_BYTES, FRAME_OVERHEAD
from xpeer.wire.messages import Accept, Agree, Payload, Propose, Terms

SWARM_ID = "5a" * 32
NUM_PARAMS = 4096
FRAGMENTS = 4
FALL = 10.0
"""Consensus: the distance has fallen by this factor."""
MAX_SLOTS = 400


@dataclass(frozen=True)
class Consensus:
    """One run."""

    peers: int
    k: int
    zones: int
    slots: int
    """Until the distance had fallen by `FALL`; every slot moves one of F fragments."""
    exchanges_per_peer: float
    messages_per_peer: float
    """Sent, frames of payload included."""
    bytes_per_peer: float
    """Sent, as sealed frames."""
    payload_share: float
    mean_moved: float
    """Of the swarm's mean, relative to the distance at the start: mixing keeps the mean."""
    matching_ms: float
    """Of a slot, median."""


def run(peers: int, *, k: int = 2, zones: int = 0, seed: int = 0) -> Consensus:
    """Mix until the distance has fallen by `FALL`."""
    roster = [PeerId(f"12D3KooW{i:04d}") for i in range(peers)]
    labels = {p: f"zone-{i % zones}" for i, p in enumerate(roster)} if zones else None
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(NUM_PARAMS, generator=generator)
    starts = torch.randn(zones or peers, NUM_PARAMS, generator=generator)
    own = torch.arange(peers) % (zones or peers)
    theta = common + 0.1 * starts[own]  # (N, P) float32
    fragments = Fragments(NUM_PARAMS, FRAGMENTS)
    limits = [NormLimit() for _ in roster]
    index = {peer: i for i, peer in enumerate(roster)}
    mean, start = theta.mean(dim=0), _distance(theta)
    exchanges, took_ms, slot, first = 0, [], 0, seed * 1_000_000
    while _distance(theta) > start / FALL and slot < MAX_SLOTS:
        began = time.perf_counter()
        groups = matching.groups(SWARM_ID, first + slot, roster, k, labels)
        took_ms.append(1e3 * (time.perf_counter() - began))
        chosen = fragments.indices(matching.fragment_of(SWARM_ID, first + slot, FRAGMENTS))
        for group in groups:
            members = [index[peer] for peer in group]
            _exchange(theta, members, chosen, [limits[m] for m in members], k or len(members))
            exchanges += len(members) * (len(members) - 1)
        slot += 1
    num_bytes = Form("int8", len(fragments.indices(0))).num_bytes
    num_messages, sent = _of_one_exchange(num_bytes)
    each = exchanges / peers
    return Consensus(
        peers=peers,
        k=k,
        zones=zones,
        slots=slot,
        exchanges_per_peer=each,
        messages_per_peer=each * num_messages,
        bytes_per_peer=each * sent,
        payload_share=num_bytes / sent,
        mean_moved=float((theta.mean(dim=0) - mean).norm()) / start,
        matching_ms=sorted(took_ms)[len(took_ms) // 2],
    )


def table(sizes: list[int], seeds: int) -> list[dict[str, Any]]:
    """Pairs, groups of four, all together, and pairs in four zones."""
    rows = []
    for peers in sizes:
        for k, zones in ((2, 0), (4, 0), (2, 4)):
            runs = [run(peers, k=k, zones=zones, seed=seed) for seed in range(seeds)]
            row = asdict(runs[0])
            for name in ("slots", "exchanges_per_peer", "messages_per_peer", "bytes_per_peer"):
                row[name] = sum(getattr(r, name) for r in runs) / len(runs)
            row["mean_moved"] = max(r.mean_moved for r in runs)
            rows.append(row)
    return rows


def matching_ms(peers: int, repeats: int = 25) -> float:
    """Of one slot's partners, history included, best of several; nothing cached but the past."""
    roster = [PeerId(f"12D3KooW{i:04d}") for i in range(peers)]
    best = math.inf
    for slot in range(repeats):
        began = time.perf_counter()
        matching.partner(SWARM_ID, 1_000_000 + slot, roster, roster[3])
        if slot % matching.HISTORY_SLOTS > matching.AVOIDED_SLOTS:
            best = min(best, time.perf_counter() - began)
    return 1e3 * best


def _exchange(
    theta: torch.Tensor,
    members: list[int],
    chosen: torch.Tensor,
    limits: list[NormLimit],
    k: int,
) -> None:
    """All pairs of a group, from one snapshot of each."""
    form = Form("int8", len(chosen))
    payloads = [codec.encode("int8", theta[m].index_select(0, chosen)) for m in members]
    for m, (here, limit) in zip(members, enumerate(limits), strict=True):
        own = codec.decode(form, payloads[here])
        for there, payload in enumerate(payloads):
            if there != here:
                found = difference(form, own, payload, [limit.kept], 0)
                theta[m].index_add_(0, chosen, found.values[0], alpha=1 / k)
                if not found.clipped:
                    limit.accepted(found.norms[0])


def _of_one_exchange(num_bytes: int) -> tuple[float, float]:
    """Messages and bytes that a side sends, on average of proposer and answerer."""
    terms = Terms(1.0, 2.0, 1 << 62, 1 << 20)
    one = 1 << 62
    propose = len(messages.encode(Propose(one, 1 << 31, 1, "int8", NUM_PARAMS, False, terms)))
    agree = len(messages.encode(Agree(one, terms)))
    rest = len(messages.encode(Payload(one, num_bytes)))
    rest += len(messages.encode(Accept(one, bytes(32))))
    frames = math.ceil(num_bytes / FRAME_BYTES)
    sent = (propose + agree) / 2 + rest + num_bytes + (3 + frames) * FRAME_OVERHEAD
    return 3 + frames, sent


def _distance(theta: torch.Tensor) -> float:
    """Root mean square distance from the mean model."""
    return float((theta - theta.mean(dim=0)).square().sum(dim=1).mean().sqrt())
