"""What the trainer sends to its daemon: answers to commands, events, and errors, as data.

Knows nothing of how they travel (`channel`) or of what they answer (`commands`).
"""

from __future__ import annotations

import traceback
from typing import Final

from msgspec import Struct

from xpeer.errors import (
    BudgetSpentError,
    ConfigError,
    ExitCode,
    LedgerError,
    LocalError,
    LocalTimeoutError,
    NotAuthorisedError,
    PeerError,
    ShardError,
    TrainerError,
    XpeerError,
)
from xpeer.escape import one_line, visible
from xpeer.phase import TrainerPhase
from xpeer.status import CorpusShare, PrivacySpent, Progress, ShardSummary
from xpeer.update import Form


class Ready(Struct, frozen=True, tag=True):
    """The model is built, the shard is read, the ledger is open."""

    num_params: int
    num_fragments: int
    device: str
    engine: str
    num_records: int
    step: int
    ledger_counter: int
    resumed: bool
    corpus: CorpusShare | None = None
    shard: ShardSummary | None = None
    text_problem: str = ""
    """Why no step is taken; empty = the text was read."""
    notes: list[str] = []
    """What the operator should know, e.g. why a slower engine was chosen."""
    warnings: list[str] = []
    """What is not as it should be, e.g. files that were restored."""


class Snapshotted(Struct, frozen=True, tag=True):
    """The slot holds a payload of this form."""

    form: Form
    step: int
    privacy_mode: str
    steps_charged: int


class Verified(Struct, frozen=True, tag=True):
    """Finite and of the right size."""

    distance: float
    clipped: bool = False
    """Above the norm limit."""


class Done(Struct, frozen=True, tag=True):
    """Nothing more to say."""


class StateExported(Struct, frozen=True, tag=True):
    """The region holds the parameters."""

    digest: str
    step: int
    loss_public: float


class StateImported(Struct, frozen=True, tag=True):
    """Public loss before and after."""

    loss_before: float
    loss_after: float


class Written(Struct, frozen=True, tag=True):
    """A file or folder was written."""

    path: str


class Losses(Struct, frozen=True, tag=True):
    """Nats per token; None where there is no such text."""

    public: float
    validation: float | None


class Failure(Struct, frozen=True, tag=True):
    """An error on its way to the daemon."""

    kind: str
    problem: str
    remedy: str = ""
    exit_code: int = ExitCode.ERROR
    trace: str = ""
    """Only of errors that are bugs of ours."""


Result = Snapshotted | Verified | Done | StateExported | StateImported | Written | Losses | Failure


class Reply(Struct, frozen=True, tag=True):
    """The answer to a request."""

    number: int
    result: Result


class Progressed(Struct, frozen=True, tag=True):
    """After a step, at most some ten times a second, and at every change of state."""

    state: TrainerPhase
    progress: Progress
    ledger_counter: int
    privacy: PrivacySpent | None = None
    """Present when it changed."""


class Saved(Struct, frozen=True, tag=True):
    """A periodic checkpoint is on the disk."""

    path: str
    step: int


class LookedAtText(Struct, frozen=True, tag=True):
    """The text could not be read at the start, and was looked at again."""

    problem: str
    """Empty: it can be read now."""


class Ending(Struct, frozen=True, tag=True):
    """Twice a second since a stop: the trainer is alive, and this is how far it is."""

    work: int
    """Grows while it gets anywhere."""
    written: int = 0
    """Bytes of the checkpoint."""
    total: int = 0
    """0 = the step before it has not ended."""


class SaveFailed(Struct, frozen=True, tag=True):
    """A periodic checkpoint could not be written; training goes on, and it is tried again."""

    problem: str
    step: int


class Crashed(Struct, frozen=True, tag=True):
    """The last message of a trainer that can't go on."""

    failure: Failure


FromTrainer = Ready | Reply | Progressed | Saved | SaveFailed | LookedAtText | Ending | Crashed

_ERRORS: Final[dict[str, type[LocalError]]] = {
    kind.__name__: kind
    for kind in (
        LocalError, ConfigError, ShardError, NotAuthorisedError, BudgetSpentError,
        LocalTimeoutError, TrainerError, LedgerError,
    )
}  # fmt: skip


def failure_of(error: BaseException) -> Failure:
    """An exception as it crosses the socket; unexpected ones carry their traceback."""
    if isinstance(error, PeerError):
        return Failure("PeerError", error.reason, visible(error.detail))
    if isinstance(error, LocalError):
        kind = next(c.__name__ for c in type(error).__mro__ if c.__name__ in _ERRORS)
        return Failure(kind, visible(error.problem), visible(error.remedy), int(error.exit_code))
    return Failure(
        "TrainerError",
        one_line(f"the trainer failed: {type(error).__name__}: {error}"),
        "see the log; it is restarted from its last checkpoint",
        trace="\n".join(map(visible, "".join(traceback.format_exception(error)).split("\n"))),
    )


def error_of(failure: Failure) -> XpeerError:
    """The same exception on the daemon's side."""
    if failure.kind == "PeerError":
        return PeerError(failure.problem, failure.remedy)
    return _ERRORS.get(failure.kind, TrainerError)(failure.problem, failure.remedy)
