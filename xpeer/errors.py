"""Errors that say whose fault it is, in words for an operator.

`PeerError`: a partner misbehaved or vanished. The exchange is dropped and the node goes on.
`LocalError`: something on this node must be mended. The command or the node stops with the exit
code of the error's class. Any other error that escapes is a bug of ours.
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
        problem: what is wrong; names the field or file, and its value.
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
    """The text to train on is missing, unreadable or malformed. It may be mended while we run."""


class NotAuthorisedError(LocalError):
    """A token, certificate or key does not give the right that is needed."""

    exit_code = ExitCode.NOT_AUTHORISED


class NotRunningError(LocalError):
    """No daemon answers on this home's socket."""

    exit_code = ExitCode.NOT_RUNNING


class LedgerError(LocalError):
    """Ledger or register can't be written, e.g. on a full disk.

    No step can be charged, so the trainer takes none. It may be mended while we run.
    """


class BudgetSpentError(LocalError):
    """The privacy budget of this shard is spent; training on it must not go on."""

    exit_code = ExitCode.BUDGET_SPENT


class LocalTimeoutError(LocalError):
    """Something on this node did not answer within its deadline."""

    exit_code = ExitCode.TIMED_OUT


class NotSavedError(LocalError):
    """The node has ended, and the steps since its last checkpoint are lost."""

    exit_code = ExitCode.NOT_SAVED


class DivergedError(ConfigError):
    """Training has diverged, so its parameters are not saved."""


class TrainerError(LocalError):
    """The trainer process died or refused a command."""


class ShortOfMemoryError(TrainerError):
    """Memory ran out, on the device or on this machine. It may be there at the next attempt."""


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
    """Masks: some members of the group did not come in this slot."""
    GROUP_FAILED = "group-failed"
    """Masks: another member of the group was lost, or lied."""
    WRONG_ROSTER = "wrong-roster"
    """Masks: somebody sees other members or keys than we do."""
    WRONG_COMMITMENT = "wrong-commitment"
    """Masks: a payload is not the one that was committed to."""
    EQUIVOCATION = "equivocation"
    """Masks: another member received other commitments than we did."""
    REVEALED_BEFORE = "revealed-before"
    """Masks: these values were sent in a group that failed, so no other group may get them."""
    OUT_OF_RANGE = "out-of-range"
    """Masks: the group's sum is too far from our values to be decoded."""
    AVOIDED = "avoided"
    """Exchanges with this partner failed lately, so we ask for none for a while."""
    NOT_PROPOSED = "not-proposed"
    """The partner was to propose and did not: nothing was due, or it can't reach us."""
    NOT_AHEAD = "not-ahead"
    """We have trained while a donor gave, and do not lie far behind it any more."""
    WORSE_THAN_OURS = "worse-than-ours"
    """A donor's parameters are as good as it says, and ours are better."""
    REFUSED = "refused"


_REASONS = frozenset(code for name, code in vars(Reason).items() if name.isupper())


def known_reason(code: str) -> str:
    """The reason code that a partner sent, or REFUSED if we do not know it.

    Reasons are counted, so their number must be bounded.
    """
    return code if code in _REASONS else Reason.REFUSED


class PeerError(XpeerError):
    """A partner failed us; drop it for this exchange and go on.

    Args:
        reason: one of `Reason`.
        detail: what happened. It never holds bytes of the partner, unless escaped.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
