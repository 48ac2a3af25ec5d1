"""How often members ask one another and show that they are alive; pure functions of their number.

For each member and minute, links of N members cost 46 N bytes each time they are shown, digests 8 N
for each question; both happen less often the more members there are. A member that is alive stays
listed everywhere if its latest link spreads before the one before it ends: that takes a few
questions more than log2 N, which bounds the lifetime from below. Up to some 900 members that costs
45 kB a minute at most; nothing fits both bounds beyond, and 4,096 members cost 280 kB.
"""

from __future__ import annotations

import math

TTL_S = 40.0
"""How long a member that fell silent is listed, in a swarm of up to 64."""
LIFETIMES_S = (TTL_S, 80.0, 160.0, 300.0)
BEATS_PER_LIFETIME = 4
BEATS_BYTES_PER_MINUTE = 40_000.0
"""Links received in a minute, at most, while the longest lifetime is not reached."""
QUESTION_EVERY_S, QUESTION_AT_LEAST_EVERY_S = 3.0, 15.0
QUESTIONS_BYTES_PER_MINUTE = 30_000.0
SPREADING_QUESTIONS = 4.0
"""More than log2 N, until everybody has heard of a link."""
BEAT_BYTES = 46.0
"""A link with its name, heard once and told once unasked."""
QUESTION_BYTES = 700.0
"""Of a question beside its digest: seals, and the headers of libp2p and TCP."""


def question_every_s(num_members: int) -> float:
    """So often that digests cost no more than `QUESTIONS_BYTES_PER_MINUTE`, within bounds."""
    affordable = 60.0 * (8.0 * num_members + QUESTION_BYTES) / QUESTIONS_BYTES_PER_MINUTE
    return min(max(QUESTION_EVERY_S, affordable), QUESTION_AT_LEAST_EVERY_S)


def bounded_lifetime_s(num_members: int) -> float:
    """The shortest lifetime that links outlive on their way to everybody, at a bounded cost."""
    questions = math.log2(max(2, num_members)) + SPREADING_QUESTIONS
    spreading_s = questions * question_every_s(num_members)
    for lifetime_s in LIFETIMES_S:
        shown_every_s = lifetime_s / BEATS_PER_LIFETIME
        cost = 60.0 / shown_every_s * BEAT_BYTES * num_members
        if cost <= BEATS_BYTES_PER_MINUTE and lifetime_s - shown_every_s >= spreading_s:
            return lifetime_s
    return LIFETIMES_S[-1]
