"""What masks cost: a group's meeting with and without them, in processor seconds and bytes.

    python -m benchmarks.privacy.masking [--quick]

All members of a group live in this process, linked by sealed sessions over socket pairs, and run
the production code from snapshot to merge. Processor time is of all members together and divided by
their number; wall time is of one core for all, and says how long a group of neighbours would take.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import statistics
import time
from collections.abc import Callable
from itertools import combinations
from typing import Any

import torch

from benchmarks.common import emit, say, write_result
from benchmarks.vector import Vector
from xpeer.forms import Form
from xpeer.gossip import masks
from xpeer.gossip.masked import MaskedGroup, MaskedMeeting
from xpeer.identity import Identity, PeerId
from xpeer.network.agreement import Agreement, Party
from xpeer.network.link import Link, Meter
from xpeer.network.membership.certificates import Membership, Scope
from xpeer.network.membership.keyring import KeyRing
from xpeer.network.stream import Stream
from xpeer.round import Meeting, MeetingPlan
from xpeer.wire import fixedpoint, kernels
from xpeer.wire.fixedpoint import Grid
from xpeer.wire.messages import Terms

SWARM = "ab" * 32
GRIDS = {name: Grid(bits, 2.0**-14) for name, bits in fixedpoint.NAMES.items()}
UNMASKED = ("int8", "bfloat16", "float32")
DEADLINE_S = 300.0


class _Everybody(Membership):
    """Certificates are not what is measured."""

    def allows(self, peer_id: str, scope: Scope) -> bool:
        del peer_id, scope
        return True


class _Member:
    """One peer of a group."""

    def __init__(self, identity: Identity, values: torch.Tensor, name: str) -> None:
        self.peer_id = identity.peer_id
        self.meter = Meter()
        self.party = Party(
            identity, SWARM, KeyRing(b"k" * 32), b"m" * 32, 1, _Everybody(SWARM, None)
        )
        codec = "int8" if name in GRIDS else name
        self.vector = Vector(values, 1, codec, GRIDS.get(name))
        self.links: dict[PeerId, tuple[Link, int]] = {}

    def agreement(self, link: Link, number: int, name: str, k: int, slot: int) -> Agreement:
        """As a proposal and its answer would make it."""
        n = self.vector.fragment_values(0, averaging=True)
        terms = Terms(weight=1.0, group_weight=float(k), epoch=1, ledger_counter=0)
        return Agreement(
            link=link, exchange_id=number, slot=slot, fragment=0, averaging=True,
            form=Form(name, n), ours=terms, theirs=terms,
        )  # fmt: skip

    async def meet(self, name: str, slot: int) -> None:
        """One slot's meeting with all others of the group."""
        plan = MeetingPlan(
            meeting_id=slot, slot=slot, fragment=0, averaging=True, expected=list(self.links),
            gather_s=DEADLINE_S,
        )  # fmt: skip
        k = len(self.links) + 1
        meeting: Meeting | MaskedMeeting = Meeting(self.vector, plan)
        if name in GRIDS:
            meeting = MaskedMeeting(
                self.vector, plan, MaskedGroup(self.peer_id, SWARM, k, DEADLINE_S)
            )
        exchanges = [
            meeting.exchange(
                self.agreement(link, number, name, k, slot), weighting="equal",
                deadline_s=DEADLINE_S,
            )
            for link, number in self.links.values()
        ]  # fmt: skip
        await asyncio.gather(meeting.run(), *exchanges)


async def _linked(k: int, values: list[torch.Tensor], name: str) -> list[_Member]:
    identities = sorted((Identity.generate() for _ in range(k)), key=lambda i: i.peer_id)
    members = [_Member(each, value, name) for each, value in zip(identities, values, strict=True)]
    for number, (low, high) in enumerate(combinations(members, 2)):
        ends = [Stream(end) for end in socket.socketpair()]
        near = Link(high.peer_id, ends[0], DEADLINE_S, low.meter)
        far = Link(low.peer_id, ends[1], DEADLINE_S, high.meter)
        ours = low.party.handshake(high.peer_id, "exchange", initiator=True)
        theirs = high.party.handshake(low.peer_id, "exchange", initiator=False)
        await asyncio.gather(
            near.connect(ours, initiator=True), far.connect(theirs, initiator=False)
        )
        low.links[high.peer_id], high.links[low.peer_id] = (near, number), (far, number)
    return members


async def _meetings(k: int, num_params: int, name: str, repetitions: int) -> dict[str, float]:
    """Medians over the meetings of one group."""
    values = [
        torch.randn(num_params, generator=torch.Generator().manual_seed(0)) * 0.02
        + torch.randn(num_params, generator=torch.Generator().manual_seed(1 + i)) * 2e-4
        for i in range(k)
    ]
    members = await _linked(k, values, name)
    if name not in GRIDS:
        members[0].vector.exchanges.prepare()
    cpu, wall = [], []
    sent = 0
    for slot in range(1 + repetitions):
        sent_before = members[0].meter.bytes_out
        started, used = time.perf_counter(), time.process_time()
        await asyncio.gather(*(member.meet(name, slot) for member in members))
        if slot:  # the first one draws fresh memory
            cpu.append((time.process_time() - used) / k)
            wall.append(time.perf_counter() - started)
            sent = members[0].meter.bytes_out - sent_before
    mean = torch.stack(values).double().mean(0)
    away = max(float((m.vector.parameters.read() - mean).abs().max()) for m in members)
    for member in members:
        for link, _ in member.links.values():
            link.abort()
    return {
        "cpu_s_per_param": statistics.median(cpu) / num_params,
        "wall_s_per_param": statistics.median(wall) / num_params,
        "bytes_per_param": sent / num_params,
        "largest_error": away,
    }


def _parts(name: str, num_params: int, repetitions: int) -> dict[str, float]:
    """Processor seconds per parameter of what masks add, each by itself."""
    grid, me, partner = GRIDS[name], PeerId("a"), PeerId("b")
    values = torch.randn(num_params, generator=torch.Generator().manual_seed(0)) * 0.02
    out = torch.empty(num_params)
    payload = bytearray(Form(name, num_params).num_bytes)
    fixedpoint.encode_into(grid, values, payload)
    own, total, hidden = bytes(payload), bytearray(payload), bytearray(payload)
    rings = fixedpoint.rings(Form(name, num_params), total)
    for _ in range(2):
        fixedpoint.add_into(rings, fixedpoint.rings(Form(name, num_params), own))
    masked = fixedpoint.rings(Form(name, num_params), hidden)
    work: dict[str, Callable[[], object]] = {
        "decode the sum": lambda: fixedpoint.difference(grid, own, total, 3, out),
        "round to the grid": lambda: fixedpoint.encode_into(grid, values, payload),
        "one mask": lambda: masks.mask(masked, me, {partner: b"k" * 32}),
        "one commitment": lambda: masks.commitment(b"r" * 32, me, memoryview(hidden)),
        "add one": lambda: fixedpoint.add_into(rings, masked),
    }
    return {what: _seconds(do, repetitions) / num_params for what, do in work.items()}


def _seconds(work: Callable[[], object], repetitions: int) -> float:
    took = []
    for _ in range(repetitions):
        began = time.process_time()
        work()
        took.append(time.process_time() - began)
    return statistics.median(took)


def measure(quick: bool) -> dict[str, Any]:
    """Cost of a group's meeting, by k and by what travels.

    Args:
        quick: smaller payloads and fewer repetitions.

    Returns:
        "k3" and "k4": for each payload `cpu_s_per_param` (one member's processor seconds),
        `wall_s_per_param`, `bytes_per_param` (sent by one member, framing and sealing included) and
        `largest_error` (of the group's mean after all meetings); "parts": processor seconds per
        parameter; "latency_s": a meeting's wall time where the payload costs nothing.
    """
    num_params, repetitions = (1 << 18, 3) if quick else (1 << 22, 7)
    torch.set_num_threads(1)
    kernels.configure(compile=True)
    names = ("masked16", "int8") if quick else (*GRIDS, *UNMASKED)
    result: dict[str, Any] = {"num_params": num_params}
    latency: dict[str, float] = {}
    for k in (3, 4):
        result[f"k{k}"] = {}
        for name in names:
            found = asyncio.run(_meetings(k, num_params, name, repetitions))
            result[f"k{k}"][name] = found
            say(f"k = {k}, {name}: {found}")
        for name in ("masked16", "int8"):
            small = asyncio.run(_meetings(k, 1024, name, 3 * repetitions))
            latency[f"k{k} {name}"] = small["wall_s_per_param"] * 1024
    result["latency_s"] = latency
    result["parts"] = {name: _parts(name, num_params, repetitions) for name in GRIDS}
    return result


def summary(found: dict[str, Any]) -> dict[str, float]:
    """The figures that are claimed."""
    claimed: dict[str, float] = {}
    for k in (3, 4):
        masked, plain = found[f"k{k}"]["masked16"], found[f"k{k}"]["int8"]
        claimed[f"k{k}_masked_cpu_ns_per_param"] = 1e9 * masked["cpu_s_per_param"]
        claimed[f"k{k}_int8_cpu_ns_per_param"] = 1e9 * plain["cpu_s_per_param"]
        claimed[f"k{k}_masked_bytes_per_param"] = masked["bytes_per_param"]
        claimed[f"k{k}_int8_bytes_per_param"] = plain["bytes_per_param"]
    return {key: round(value, 3) for key, value in claimed.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small; writes no result")
    quick = parser.parse_args().quick
    found = measure(quick)
    if not quick:
        command = "python -m benchmarks.privacy.masking"
        write_result("masking", summary(found), found, command)
    emit("masking", summary(found))


if __name__ == "__main__":
    main()
