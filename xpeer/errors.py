"""Errors that say whose fault it is, in words for an operator.

`PeerError`: a partner misbehaved or vanished; the pairing is dropped and the node goes on.
`LocalError`: something on this node must be mended; the command or the node stops with the
exit code that the class carries. Everything else that escapes is a bug of ours.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Documented exit codes of every `xpeer` command."""

    OK = 0
    ERROR = 1
    USAGE = 2
    NOT_RUNNING = 3
    DEGRADED = 4
    NOT_AUTHORISED = 5
    BUDGET_SPENT = 6
    TIMED_OUT = 7
    BAD_CONFIG = 8
    NOT_SAVED = 9


class XpeerError(Exception):
    """Base of all errors that xpeer raises on purpose."""


class LocalError(XpeerError):
    """This node can't go on until its operator acts.

    Args:
        problem: what is wrong, naming the field or file and the value seen.
        remedy: what the operator can do about it.
    """

    exit_code = ExitCode.ERROR

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        """One line: the problem and, after a dash, the remedy."""
        return f"{self.problem} - {self.remedy}" if self.remedy else self.problem


class ConfigError(LocalError):
    """A file, flag or variable that configures this node is wrong."""

    exit_code = ExitCode.BAD_CONFIG


class ShardError(ConfigError):
    """The text to train on is missing, unreadable or malformed; it may be mended while we run."""


class NotAuthorisedError(LocalError):
    """A token, certificate or key does not give the right that is needed."""

    exit_code = ExitCode.NOT_AUTHORISED


class NotRunningError(LocalError):
    """No daemon answers on this home's socket."""

    exit_code = ExitCode.NOT_RUNNING


class LedgerError(LocalError):
    """Ledger or register can't be written, for want of space or rights: no step can be charged, and
    none is taken. It may be mended while we run.
    """


class BudgetSpentError(LocalError):
    """The privacy budget of this shard is spent; training on it must not go on."""

    exit_code = ExitCode.BUDGET_SPENT


class LocalTimeoutError(LocalError):
    """Something on this node did not answer within its deadline."""

    exit_code = ExitCode.TIMED_OUT


class NotSavedError(LocalError):
    """The node has ended, and steps since its last checkpoint are lost."""

    exit_code = ExitCode.NOT_SAVED


class DivergedError(LocalError):
    """Training has diverged: its parameters are not worth keeping."""


class TrainerError(LocalError):
    """The trainer process died or refused a command."""


class Reason:
    """Reason codes of a skipped, refused or failed exchange, as logs and `status` show them."""

    NO_PARTNER = "no-partner"
    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    CLOSED = "closed"
    TRUNCATED = "truncated"
    TAMPERED = "tampered"
    OVERSIZE = "oversize"
    MALFORMED = "malformed"
    WRONG_SWARM = "wrong-swarm"
    WRONG_VERSION = "wrong-version"
    WRONG_SLOT = "wrong-slot"
    WRONG_MODEL = "wrong-model"
    WRONG_CODEC = "wrong-codec"
    NOT_A_MEMBER = "not-a-member"
    REPLAYED = "replayed"
    BUSY = "busy"
    NOT_DUE = "not-due"
    PAUSED = "paused"
    NOT_READY = "not-ready"
    NOT_FINITE = "not-finite"
    DIGEST_MISMATCH = "digest-mismatch"
    LEDGER_WENT_BACK = "ledger-went-back"
    TRAINER_RESTARTED = "trainer-restarted"
    SIDECAR_DOWN = "sidecar-down"
    GROUP_TOO_SMALL = "group-too-small"
    """Masks: not all of a group came together in this slot."""
    GROUP_FAILED = "group-failed"
    """Masks: another member of the group was lost, or lied."""
    WRONG_ROSTER = "wrong-roster"
    """Masks: somebody sees other members or keys than we do."""
    WRONG_COMMITMENT = "wrong-commitment"
    """Masks: a payload is not the one that was committed to."""
    EQUIVOCATION = "equivocation"
    """Masks: somebody was told other commitments than we were."""
    REVEALED_BEFORE = "revealed-before"
    """Masks: these values were shown in a group that failed, and no other may see them."""
    OUT_OF_RANGE = "out-of-range"
    """Masks: the group's sum is too far from our values to be decoded."""
    AVOIDED = "avoided"
    """Its exchanges with us failed lately: it is left alone for a while."""
    REFUSED = "refused"


_REASONS = frozenset(code for name, code in vars(Reason).items() if name.isupper())


def known_reason(code: str) -> str:
    """A reason code that a partner sent; REFUSED if there is no such code: they are counted."""
    return code if code in _REASONS else Reason.REFUSED


class PeerError(XpeerError):
    """A partner failed us; drop it for this exchange and go on.

    Args:
        reason: one of `Reason`.
        detail: what was seen; never bytes that the partner chose, unescaped.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
