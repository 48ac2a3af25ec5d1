"""Messages between daemon and trainer: small, framed, typed; bulk goes through the arena.

A frame is a 4-byte little-endian length and a msgpack document. Both ends are ours, but the length
is bounded all the same: a bug must not become an allocation of 4 GiB.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import re
import socket
import threading
import traceback
from typing import Final

import msgspec
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
from xpeer.escape import one_line, sayable, visible
from xpeer.phase import Order, TrainerPhase
from xpeer.status import CorpusShare, PrivacySpent, Progress, ShardSummary
from xpeer.training.setup import TrainerSetup
from xpeer.update import Form

MAX_FRAME_BYTES: Final = 4 << 20
_LENGTH_BYTES: Final = 4
_MAX_TEXT, _MAX_TRACE = 2_000, 20_000
"""Characters of a string from the trainer: a file's name or content may be in it."""
_LOG_BYTES: Final = 64 << 10
_MARKED: Final = re.compile(r"<(\d{1,2})>")
_LAST_WORDS: Final = ("Traceback ", "Fatal Python error", "Exception ")


class Begin(Struct, frozen=True, tag=True):
    """First message to the child: what it needs to start."""

    setup: TrainerSetup
    slot_bytes: int
    state_bytes: int
    num_slots: int


class Snapshot(Struct, frozen=True, tag=True):
    """Take a fragment at the next boundary, compress it into the slot."""

    meeting_id: int
    fragment: int
    averaging: bool
    """Average the parameters, whatever the manifest's rule."""
    slot: int


class Verify(Struct, frozen=True, tag=True):
    """Decode and check a partner's payload in the slot."""

    meeting_id: int
    exchange_id: int
    slot: int
    form: Form
    parties: int = 1
    """Of a masked group's sum: k."""
    partner: str = ""
    """Whose payload it is: a PeerID."""


class Merge(Struct, frozen=True, tag=True):
    """Merge verified payloads at the next boundary; answered once that is queued."""

    meeting_id: int
    weights: dict[int, float]
    """w_j of every exchange that was accepted."""


class Drop(Struct, frozen=True, tag=True):
    """Forget a meeting; not answered."""

    meeting_id: int


class ExportState(Struct, frozen=True, tag=True):
    """Write all parameters to the arena's region."""


class ImportState(Struct, frozen=True, tag=True):
    """Replace all parameters by the arena's region."""

    step: int
    at_most: float = float("inf")
    """Public loss that they may have."""


class Run(Struct, frozen=True, tag=True):
    """Change the mode."""

    mode: Order


class WriteCheckpoint(Struct, frozen=True, tag=True):
    """Save now."""


class Evaluate(Struct, frozen=True, tag=True):
    """Measure the losses on public and held-out text now."""


class Stop(Struct, frozen=True, tag=True):
    """Save and exit."""


Command = (
    Snapshot | Verify | Merge | Drop | ExportState | ImportState | Run | WriteCheckpoint | Evaluate
    | Stop
)  # fmt: skip


class Request(Struct, frozen=True, tag=True):
    """A command with the number that its reply will carry."""

    number: int
    command: Command


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
ToTrainer = Begin | Request

_TO_TRAINER: Final[msgspec.msgpack.Decoder[ToTrainer]] = msgspec.msgpack.Decoder(ToTrainer)
_FROM_TRAINER: Final[msgspec.msgpack.Decoder[FromTrainer]] = msgspec.msgpack.Decoder(FromTrainer)

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


class ChildChannel:
    """The trainer's end. One thread receives; sending never blocks, so that training can't wait
    for a daemon that is busy.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send_all, name="sender", daemon=True)
        self._sender.start()

    def receive(self) -> ToTrainer | None:
        """The next message; None when the daemon is gone."""
        header = self._exactly(_LENGTH_BYTES)
        body = None if header is None else self._exactly(_checked_length(header))
        return None if body is None else _TO_TRAINER.decode(body)

    def send(self, message: FromTrainer) -> None:
        """Queue, from any thread; a daemon that is gone is noticed by the receiving thread."""
        self._outbox.put(_framed(_encoded(message)))

    def flush(self, timeout_s: float) -> None:
        """Send what is queued, and no more after it: before the process exits."""
        self._outbox.put(None)
        self._sender.join(timeout_s)

    def _send_all(self) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while (frame := self._outbox.get()) is not None:
                self._sock.sendall(frame)

    def _exactly(self, num_bytes: int) -> bytes | None:
        data = bytearray()
        while len(data) < num_bytes:
            try:
                part = self._sock.recv(num_bytes - len(data))
            except ConnectionResetError:
                return None
            if not part:
                return None
            data += part
        return bytes(data)


class DaemonChannel:
    """The daemon's end, on its event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, sock: socket.socket) -> DaemonChannel:
        """Over one end of a socketpair, which it owns from now on."""
        return cls(*await asyncio.open_connection(sock=sock))

    async def receive(self) -> FromTrainer | None:
        """The next message; None when the trainer is gone."""
        try:
            header = await self._reader.readexactly(_LENGTH_BYTES)
            body = await self._reader.readexactly(_checked_length(header))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        try:
            return _FROM_TRAINER.decode(body)
        except msgspec.MsgspecError as e:
            raise TrainerError(f"the trainer's message can't be read: {e}") from e

    def send(self, message: ToTrainer) -> None:
        """Queue; the trainer's reading thread takes messages while a step runs."""
        if not self._writer.is_closing():
            self._writer.write(_framed(msgspec.msgpack.encode(message)))

    async def close(self) -> None:
        """Close the socket: the trainer exits when it sees that."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


async def log_lines(stream: asyncio.StreamReader | None, logger: logging.Logger) -> None:
    """Pass a child's output on line by line, each at its level; a line without an end is cut.

    Lines that no logger of the child wrote come from a library or from the interpreter's last
    words: warnings, and errors from a traceback or a fatal error on.
    """
    rest, level = b"", logging.WARNING
    while stream is not None and (part := await stream.read(_LOG_BYTES)):
        *lines, rest = (rest + part).split(b"\n")
        if len(rest) > _LOG_BYTES:
            lines, rest = [*lines, rest], b""
        for line in lines:
            level = _log_line(line, level, logger)
    if rest:
        _log_line(rest, level, logger)


def _log_line(line: bytes, before: int, logger: logging.Logger) -> int:
    """Log it; the level of lines that follow without one."""
    text = line.decode(errors="backslashreplace")
    if (marked := _MARKED.match(text)) is not None:
        logger.log(int(marked[1]), "%s", text[marked.end() :])
        return logging.WARNING
    level = logging.ERROR if text.startswith(_LAST_WORDS) else before
    if text:
        logger.log(level, "%s", text)
    return level


class LevelFormatter(logging.Formatter):
    """Puts the level in front of every line, for `log_lines` at the other end."""

    def format(self, record: logging.LogRecord) -> str:
        """One line or, with a traceback, several."""
        lines = super().format(record).splitlines() or [""]
        return "\n".join(f"<{record.levelno}>{line}" for line in lines)


def _encoded(message: FromTrainer) -> bytes:
    """As msgpack, whatever is in its strings: here alone they are made safe.

    Names of files, and errors that quote files, may hold bytes that are not UTF-8, or megabytes.
    """
    with contextlib.suppress(UnicodeEncodeError):
        body = msgspec.msgpack.encode(message)
        if len(body) <= _MAX_TEXT:  # then no string is longer
            return body
    said = sayable(msgspec.to_builtins(message, builtin_types=(bytes,)), _MAX_TEXT, _MAX_TRACE)
    return msgspec.msgpack.encode(said)


def _framed(body: bytes) -> bytes:
    if len(body) > MAX_FRAME_BYTES:
        raise LocalError(f"a message to or from the trainer has {len(body)} bytes")
    return len(body).to_bytes(_LENGTH_BYTES, "little") + body


def _checked_length(header: bytes) -> int:
    length = int.from_bytes(header, "little")
    if length > MAX_FRAME_BYTES:
        raise TrainerError(f"a message of {length} bytes was announced; {MAX_FRAME_BYTES} at most")
    return length
