"""How often members ask one another and prove that they are alive; pure functions of their number.

Every time the N members publish their links, each member receives 46 N bytes. Every question sends
a digest of 8 N bytes. So both happen less often the more members there are. A live member stays
listed everywhere only if its latest link spreads before the previous one expires. Spreading takes a
few questions more than log2 N, which bounds the lifetime from below. Up to some 900 members, each
receives 45 kB a minute at most. Beyond that, no lifetime fits both bounds, and with 4,096 members
each receives 280 kB.
"""

from __future__ import annotations

import math

TTL_S = 40.0
"""How long a silent member stays listed in a swarm of up to 64 members."""
LIFETIMES_S = (TTL_S, 80.0, 160.0, 300.0)
BEATS_PER_LIFETIME = 4
BEATS_BYTES_PER_MINUTE = 40_000.0
"""Most bytes of links that a member receives in a minute, unless the longest lifetime is in use."""
QUESTION_EVERY_S, QUESTION_AT_LEAST_EVERY_S = 3.0, 15.0
QUESTIONS_BYTES_PER_MINUTE = 30_000.0
SPREADING_QUESTIONS = 4.0
"""Questions beyond log2 N until a link has reached everybody."""
BEAT_BYTES = 46.0
"""A link with its name, received once and sent once unasked."""
QUESTION_BYTES = 700.0
"""Size of a question without its digest: seals, and headers of libp2p and TCP."""


def question_every_s(num_members: int) -> float:
    """Seconds between questions. Within its bounds it holds to `QUESTIONS_BYTES_PER_MINUTE`."""
    affordable = 60.0 * (8.0 * num_members + QUESTION_BYTES) / QUESTIONS_BYTES_PER_MINUTE
    return min(max(QUESTION_EVERY_S, affordable), QUESTION_AT_LEAST_EVERY_S)


def bounded_lifetime_s(num_members: int) -> float:
    """The shortest lifetime in which links reach everybody at a bounded cost; else the longest."""
    questions = math.log2(max(2, num_members)) + SPREADING_QUESTIONS
    spreading_s = questions * question_every_s(num_members)
    for lifetime_s in LIFETIMES_S:
        beat_every_s = lifetime_s / BEATS_PER_LIFETIME
        cost = 60.0 / beat_every_s * BEAT_BYTES * num_members
        if cost <= BEATS_BYTES_PER_MINUTE and lifetime_s - beat_every_s >= spreading_s:
            return lifetime_s
    return LIFETIMES_S[-1]
