"""Plans exchanges for a given link: fragments F, steps per window H, and codec.

It is a pure function of numbers that an operator knows. With P parameters of b bits, F fragments, a
step of t seconds, p steps per slot (so H = F p), a link of B bit/s and a round trip of r seconds:

    payload    P b / (F B)       at most half of a slot p t: half of the link is left for partners
                                 that are slower than they say, for repeats, and for other uses
    exchange   payload + 3 r     at most half of a window H t, and at most four slots, since at most
                                 four exchanges are in flight at once; later ones would queue

No plan can make a step wait: a link that can't hold its plan delivers late, and is skipped. The
plan has the least H that fits and, for that H, the most fragments. So slots are as short as a step
if possible: small frequent exchanges were worth more than anything else that we tried. The codec is
int8, unless its window is so long that peers drift apart. Then it is int4, at half the bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from xpeer.errors import LocalError
from xpeer.forms import Form
from xpeer.leaves import Public, seen_by

SHARE: Final = 0.5
"""Fraction of the link's time, and of a window, that an exchange may use."""
IN_FLIGHT: Final = 4
"""Exchanges at once: daemon and trainer have eight places for payloads, two for each exchange."""
ROUND_TRIPS: Final = 3
"""Round trips of an exchange: proposal and agreement, first bytes there and back, acceptance."""
MIN_FRAGMENTS: Final = 5
"""Exchanging a fifth of the parameters at every step was better than all of them, on any link."""
MAX_FRAGMENTS: Final = 64
MIN_FRAGMENT_VALUES: Final = 4096
"""In smaller fragments the messages around the payload cost too much."""
LONG_WINDOW_STEPS: Final = 500
"""For longer windows, a coarser codec loses less."""


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """The link that exchanges have to go through; full duplex."""

    bits_per_s: float
    """Bandwidth of the slower direction that we may use."""
    round_trip_s: float = 0.05


@seen_by("node", "of the operator's own numbers")
@dataclass(frozen=True, slots=True)
class Plan:
    """Values for the manifest's section `round`, and what they lead to."""

    fragments: Public[int]
    """F."""
    window_steps: Public[int]
    """H, a multiple of F: every fragment is exchanged once in a window."""
    codec: Public[str]
    slot_s: Public[float]
    """Seconds from exchange to exchange."""
    exchange_s: Public[float]
    """Seconds from proposal to acceptance."""
    link_share: Public[float]
    """Fraction of the time that the link is busy: at most `SHARE`."""
    why: Public[str]
    """The reasons, in a few sentences for the operator."""


def plan(link: Bandwidth, *, num_params: int, step_s: float, peers: int) -> Plan:
    """Choose F, H and codec.

    Args:
        link: of this node, or the slowest one that has to keep up.
        num_params: P, the parameters that are trained and sent.
        step_s: seconds per training step of the fastest peer.
        peers: N. Pairs meet, so N decides how far news has to travel, and not an exchange's cost.

    Raises:
        LocalError: an argument is not a positive number.
    """
    _check_positive("bandwidth", link.bits_per_s)
    _check_positive("step time", step_s)
    _check_positive("number of parameters", num_params)
    _check_positive("number of peers", peers)
    if not (math.isfinite(link.round_trip_s) and link.round_trip_s >= 0):
        raise LocalError(f"the round trip is {link.round_trip_s!r} s, which is no duration")
    chosen = _shortest(link, "int8", num_params, step_s)
    if chosen.window_steps > LONG_WINDOW_STEPS:
        chosen = _shortest(link, "int4", num_params, step_s)
    return Plan(
        fragments=chosen.fragments,
        window_steps=chosen.window_steps,
        codec=chosen.codec,
        slot_s=chosen.slot_s(step_s),
        exchange_s=chosen.exchange_s,
        link_share=chosen.payload_s / chosen.slot_s(step_s),
        why=_why(chosen, link, num_params, step_s, peers),
    )


@dataclass(frozen=True, slots=True)
class _Candidate:
    fragments: int
    steps_per_slot: int
    codec: str
    payload_s: float
    exchange_s: float

    @property
    def window_steps(self) -> int:
        return self.fragments * self.steps_per_slot

    def slot_s(self, step_s: float) -> float:
        return self.steps_per_slot * step_s


def _shortest(link: Bandwidth, codec: str, num_params: int, step_s: float) -> _Candidate:
    most = max(1, min(MAX_FRAGMENTS, num_params // MIN_FRAGMENT_VALUES))
    candidates = (
        _fitted(link, codec, num_params, step_s, fragments)
        for fragments in range(min(MIN_FRAGMENTS, most), most + 1)
    )
    return min(candidates, key=lambda c: (c.window_steps, -c.fragments))


def _fitted(
    link: Bandwidth, codec: str, num_params: int, step_s: float, fragments: int
) -> _Candidate:
    """The candidate with the shortest slot, in whole steps, that keeps every bound."""
    payload_s = 8 * Form(codec, -(-num_params // fragments)).num_bytes / link.bits_per_s
    exchange_s = payload_s + ROUND_TRIPS * link.round_trip_s
    least_slot_s = max(payload_s / SHARE, exchange_s / (SHARE * fragments), exchange_s / IN_FLIGHT)
    steps = max(1, math.ceil(least_slot_s / step_s))
    while steps * step_s < least_slot_s:  # the division was rounded
        steps += 1
    return _Candidate(fragments, steps, codec, payload_s, exchange_s)


def _why(chosen: _Candidate, link: Bandwidth, num_params: int, step_s: float, peers: int) -> str:
    total = Form(chosen.codec, num_params).num_bytes
    slot = "step" if chosen.steps_per_slot == 1 else f"{chosen.steps_per_slot} steps"
    said = (
        f"{num_params:,} parameters are {total / 1e6:,.1f} MB in {chosen.codec}, "
        f"{8 * total / link.bits_per_s:.3g} s at {link.bits_per_s / 1e6:g} Mbit/s: sent as "
        f"{chosen.fragments} fragments, one every {slot} ({chosen.slot_s(step_s):.3g} s), an "
        f"exchange takes {chosen.exchange_s:.3g} s, the link is busy "
        f"{chosen.payload_s / chosen.slot_s(step_s):.0%} of the time, and each parameter is "
        f"exchanged every {chosen.window_steps} steps ({chosen.window_steps * step_s:.3g} s)."
    )
    if peers > 2:
        meetings = math.ceil(math.log2(peers))
        said += f" Among {peers} peers news needs about {meetings} such windows to reach everybody."
    if chosen.codec == "int4":
        said += f" int8 would need more than {LONG_WINDOW_STEPS} steps for that."
    if chosen.window_steps > LONG_WINDOW_STEPS:
        said += " That is rare: train fewer parameters (LoRA), or find a faster link."
    return said


def _check_positive(name: str, number: float) -> None:
    if not (math.isfinite(number) and number > 0):
        raise LocalError(f"the {name} is {number!r}: it must be a positive number")
