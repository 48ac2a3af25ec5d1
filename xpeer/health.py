"""The health of a node: which conditions of the registry are active, and since when.

The daemon notes them in a `Health`. Nothing here knows what a node is.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal

from msgspec import Struct

from xpeer.conditions import CONDITIONS, Condition, Severity
from xpeer.escape import one_line
from xpeer.leaves import Local, Public, Timing, seen_by

Verdict = Literal["ok", "degraded", "down"]

MAX_CAUSE_CHARS = 300


@seen_by(
    "node",
    "on the Unix socket, in the log and in systemd's line; the text may quote what the trainer "
    "says of files",
)
class HealthReason(Struct, frozen=True, kw_only=True):
    """Why a node is not well, or a note about one that is."""

    code: Timing[str]
    severity: Timing[Severity] = "degraded"
    text: Local[str] = ""
    remedy: Public[str] = ""


@dataclass
class _Active:
    since_s: float
    count: int = 0
    cause: str = ""
    facts: dict[str, object] = field(default_factory=dict)


class Health:
    """The active conditions of one node.

    Args:
        clock: wall clock, seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._active: dict[str, _Active] = {}

    def set(self, code: str, **facts: object) -> None:
        """Note that a condition is active: from now on, or still.

        Args:
            code: a key of `CONDITIONS`.
            facts: values for its text, under the names in `Condition.facts`.

        Raises:
            TypeError: other facts than the condition's text needs.
        """
        if facts.keys() != CONDITIONS[code].facts:
            raise TypeError(f"{code} needs {sorted(CONDITIONS[code].facts)}, got {sorted(facts)}")
        self._active.setdefault(code, _Active(self._clock())).facts = facts

    def began(self, code: str, since_s: float) -> None:
        """Correct the time since when a condition is active: it began before it was noticed."""
        self._active[code].since_s = since_s

    def clear(self, code: str) -> None:
        """Note that a condition is not active.

        Raises:
            KeyError: there is no such condition.
        """
        if code not in CONDITIONS:
            raise KeyError(code)
        self._active.pop(code, None)

    def hold(self, code: str, active: bool, **facts: object) -> None:
        """`set` a condition if it is active, else `clear` it."""
        if active:
            self.set(code, **facts)
        else:
            self.clear(code)

    def failed(self, code: str, cause: object, **facts: object) -> None:
        """Count one more failure of a periodic job. The condition began with the first in a row."""
        self.set(code, **facts)
        active = self._active[code]
        active.count += 1
        active.cause = _one_line(cause)

    def worked(self, code: str) -> None:
        """Note that a periodic job succeeded: its failures are forgotten."""
        self.clear(code)

    def count(self, code: str) -> int:
        """Failures of a periodic job in a row."""
        active = self._active.get(code)
        return active.count if active else 0

    def reasons(self) -> list[HealthReason]:
        """Active conditions, worst first, then in the registry's order.

        Left out are those that are younger than their grace, and those that another one hides.
        """
        now = self._clock()
        lasting = {
            code: active
            for code, active in self._active.items()
            if now - active.since_s >= CONDITIONS[code].grace_s
        }
        hidden = {code for cause in lasting for code in CONDITIONS[cause].hides}
        reasons = [
            _reason(condition, lasting[code], now)
            for code, condition in CONDITIONS.items()
            if code in lasting and code not in hidden
        ]
        return sorted(reasons, key=lambda reason: -_SEVERITIES.index(reason.severity))


_SEVERITIES: Final[tuple[Severity, ...]] = ("note", "degraded", "down")


def verdict(reasons: list[HealthReason]) -> Verdict:
    """The node's health in one word; notes leave it ok."""
    if any(reason.severity == "down" for reason in reasons):
        return "down"
    return "degraded" if any(reason.severity == "degraded" for reason in reasons) else "ok"


def table() -> str:
    """The table of all conditions in docs/operating.md, as Markdown."""
    rows = [
        f"| `{c.code}` | {c.severity} | {_delay(c)} | {_in_docs(c.text)} | "
        f"{_sentence(c.remedy)} | {_sentence(c.clears)} |"
        for c in CONDITIONS.values()
    ]
    head = "| code | severity | shows after | text | what to do | clears when |"
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])


def duration(seconds: float) -> str:
    """Format a duration with two units at most: 42s, 3m 5s, 7h 2m, 4d 1h."""
    whole = int(seconds)
    for length, unit, smaller, name in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "m"),
        (60, "m", 1, "s"),
    ):
        if whole >= length:
            return f"{whole // length}{unit} {whole % length // smaller}{name}"
    return f"{whole}s"


def _reason(condition: Condition, active: _Active, now: float) -> HealthReason:
    text = condition.text.format(
        age=duration(max(0.0, now - active.since_s)),
        count=active.count,
        cause=active.cause,
        **active.facts,
    )
    return HealthReason(
        code=condition.code, severity=condition.severity, text=text, remedy=condition.remedy
    )


def _one_line(cause: object) -> str:
    text = one_line(str(cause)) or type(cause).__name__
    return text if len(text) <= MAX_CAUSE_CHARS else f"{text[:MAX_CAUSE_CHARS]}..."


def _delay(condition: Condition) -> str:
    return f"{condition.grace_s:.0f} s" if condition.grace_s else "at once"


def _in_docs(text: str) -> str:
    parsed = string.Formatter().parse(text)
    return "".join(literal + (f"*{name}*" if name else "") for literal, name, _, _ in parsed)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
