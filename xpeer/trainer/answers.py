"""The messages from the trainer to its daemon, as data: answers to commands, events and errors.

Knows nothing of how they travel (`channel`) or which commands they answer (`commands`).
"""

from __future__ import annotations

import traceback
from typing import Final

from msgspec import Struct

from xpeer.errors import (
    BudgetSpentError,
    ConfigError,
    DivergedError,
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
from xpeer.escape import one_line, visible, without_words
from xpeer.forms import Form
from xpeer.leaves import Derived, Local, Parts, Public, Timing, seen_by
from xpeer.phase import TrainerPhase
from xpeer.shortage import in_words, out_of_memory
from xpeer.status import CorpusShare, PrivacySpent, Progress, ShardSummary, TextProgress


@seen_by("node")
class Ready(Struct, frozen=True, tag=True):
    """The model is built, the shard is read, the ledger is open."""

    num_params: Public[int]
    num_fragments: Public[int]
    device: Public[str]
    engine: Local[str]
    num_records: Local[int]
    step: Timing[int]
    ledger_counter: Timing[int]
    resumed: Timing[bool]
    corpus: Parts[CorpusShare | None] = None
    shard: Parts[ShardSummary | None] = None
    text_problem: Local[str] = ""
    """See `TextFacts.problem`."""
    notes: Local[list[str]] = []
    """Lines for the log, e.g. why a slower engine was chosen."""
    warnings: Local[list[str]] = []
    """Warnings for the log, e.g. about files that were restored."""
    precision: Public[str] = ""
    """In what the model computes."""
    uncompiled: Local[str] = ""
    """Why layers are not compiled, though the operator asked for it."""


UNREADY: Final = Ready(
    num_params=0,
    num_fragments=0,
    device="",
    engine="",
    num_records=0,
    step=0,
    ledger_counter=0,
    resumed=False,
)
"""What is known of a trainer before it is ready."""


@seen_by("node")
class Snapshotted(Struct, frozen=True, tag=True):
    """The slot holds a payload of this form."""

    form: Parts[Form]
    step: Timing[int]
    privacy_mode: Public[str]
    steps_charged: Local[int]


@seen_by("node")
class Verified(Struct, frozen=True, tag=True):
    """The payload is finite and of the right size."""

    distance: Derived[float]
    clipped: Derived[bool] = False
    """Whether the distance is above the norm limit."""


@seen_by("node")
class Done(Struct, frozen=True, tag=True):
    """The command was carried out; there is nothing to return."""


@seen_by("node")
class StateExported(Struct, frozen=True, tag=True):
    """The arena's region holds the parameters, in the form that joiners are sent."""

    step: Timing[int]
    loss_public: Derived[float]
    core_s: Timing[float]
    """Processor time of the threads that made the copy, in seconds. Waiting does not count."""


@seen_by("node")
class StateImported(Struct, frozen=True, tag=True):
    """The parameters were replaced: public loss before and after."""

    loss_before: Derived[float]
    loss_after: Derived[float]


@seen_by("node")
class Written(Struct, frozen=True, tag=True):
    """A file or folder was written."""

    path: Public[str]


@seen_by("node")
class Losses(Struct, frozen=True, tag=True):
    """Losses in nats per token; None where there is no such text."""

    public: Derived[float]
    validation: Local[float | None]


@seen_by("node")
class Failure(Struct, frozen=True, tag=True):
    """An error on its way to the daemon."""

    kind: Local[str]
    problem: Local[str]
    remedy: Local[str] = ""
    exit_code: Local[int] = ExitCode.ERROR
    trace: Local[str] = ""
    """The traceback of an unexpected error; empty for errors raised on purpose."""


Result = Snapshotted | Verified | Done | StateExported | StateImported | Written | Losses | Failure


@seen_by("node")
class Reply(Struct, frozen=True, tag=True):
    """The answer to a request."""

    number: Public[int]
    result: Parts[Result]


@seen_by("node")
class Progressed(Struct, frozen=True, tag=True):
    """Sent after a step, at most some ten times a second, and at every change of state."""

    state: Timing[TrainerPhase]
    progress: Parts[Progress]
    ledger_counter: Timing[int]
    privacy: Parts[PrivacySpent | None] = None
    """None = as before."""


@seen_by("node")
class Saved(Struct, frozen=True, tag=True):
    """A periodic checkpoint is on the disk."""

    path: Public[str]
    step: Timing[int]


@seen_by("node")
class LookedAtText(Struct, frozen=True, tag=True):
    """The trainer, whose text could not be read at the start, has tried to read it again."""

    problem: Local[str]
    """Why it can't be read; empty = it can be read now."""


@seen_by("node")
class Starting(Struct, frozen=True, tag=True):
    """Sent while the trainer starts, whenever it has got on."""

    stage: Local[str]
    """What it does, after "the trainer"."""
    work: Timing[int] = 0
    """Grows while it makes progress."""
    text: Parts[TextProgress | None] = None
    """Progress of the tokens; None while none are made."""


@seen_by("node")
class Ending(Struct, frozen=True, tag=True):
    """Sent twice a second after a stop: the trainer is alive, and this is its progress."""

    work: Timing[int]
    """Grows while the trainer makes progress."""
    written: Timing[int] = 0
    """Bytes of the checkpoint that are done."""
    total: Timing[int] = 0
    """Bytes of the checkpoint in all; 0 = the step before it has not ended."""


@seen_by("node")
class Working(Struct, frozen=True, tag=True):
    """Sent every few seconds in which work was done: an answer that is not there yet will come."""

    work: Timing[int]
    """Grows while the trainer makes progress."""
    disk: Timing[int] = 0
    """Grows with it, unless the disk's thread stands still in the middle of something."""


@seen_by("node")
class SaveFailed(Struct, frozen=True, tag=True):
    """A checkpoint could not be written. Training goes on, and a later one is tried."""

    problem: Local[str]
    step: Timing[int]

    @classmethod
    def because(cls, error: Exception, step: int) -> SaveFailed:
        """The report of an error; of one that was not raised on purpose, without its words."""
        if isinstance(error, LocalError):
            return cls(str(error), step)
        return cls(f"the checkpoint of step {step} is not written: {without_words(error)}", step)


@seen_by("node", "that a trainer died is seen: see measuring.py")
class Crashed(Struct, frozen=True, tag=True):
    """The last message of a trainer that can't go on."""

    failure: Parts[Failure]


FromTrainer = (
    Ready
    | Reply
    | Progressed
    | Saved
    | SaveFailed
    | LookedAtText
    | Starting
    | Working
    | Ending
    | Crashed
)

_ERRORS: Final[dict[str, type[LocalError]]] = {
    kind.__name__: kind
    for kind in (
        LocalError, ConfigError, ShardError, NotAuthorisedError, BudgetSpentError,
        LocalTimeoutError, TrainerError, LedgerError, DivergedError,
    )
}  # fmt: skip


def failure_of(error: BaseException) -> Failure:
    """Convert an exception for the socket; unexpected ones carry their traceback."""
    if isinstance(error, PeerError):
        return Failure("PeerError", error.reason, visible(error.detail))
    if isinstance(error, LocalError):
        kind = next(c.__name__ for c in type(error).__mro__ if c.__name__ in _ERRORS)
        return Failure(kind, visible(error.problem), visible(error.remedy), int(error.exit_code))
    trace = "\n".join(map(visible, "".join(traceback.format_exception(error)).split("\n")))
    if out_of_memory(error):
        short = in_words(error)
        return Failure(TrainerError.__name__, short.problem, short.remedy, trace=trace)
    return Failure(
        TrainerError.__name__,
        one_line(f"the trainer failed: {type(error).__name__}: {error}"),
        "see the log; it is restarted from its last checkpoint",
        trace=trace,
    )


def error_of(failure: Failure) -> XpeerError:
    """Convert a failure back to an exception, on the daemon's side."""
    if failure.kind == "PeerError":
        return PeerError(failure.problem, failure.remedy)
    return _ERRORS.get(failure.kind, TrainerError)(failure.problem, failure.remedy)
