"""Sends small framed messages between daemon and trainer; bulk goes through the arena.

A frame is a 4-byte little-endian length and a msgpack document. Both ends are ours, but the length
is bounded all the same, so that a bug can't allocate 4 GiB.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
import threading
from collections import deque
from typing import Final

import msgspec
from msgspec import structs

from xpeer.errors import LocalError, TrainerError
from xpeer.escape import sayable
from xpeer.trainer.answers import Ending, FromTrainer, Progressed, Working
from xpeer.trainer.commands import ToTrainer

MAX_FRAME_BYTES: Final = 4 << 20
_LENGTH_BYTES: Final = 4
_MAX_TEXT, _MAX_TRACE = 2_000, 20_000
"""Most characters of a string from the trainer: it may quote a file's name or content."""
_LOG_BYTES: Final = 64 << 10
_MARKED: Final = re.compile(r"<(\d{1,2})>")
_LAST_WORDS: Final = ("Traceback ", "Fatal Python error", "Exception ")

_TO_TRAINER: Final[msgspec.msgpack.Decoder[ToTrainer]] = msgspec.msgpack.Decoder(ToTrainer)
_FROM_TRAINER: Final[msgspec.msgpack.Decoder[FromTrainer]] = msgspec.msgpack.Decoder(FromTrainer)


class ChildChannel:
    """The trainer's end of the channel.

    One thread receives. Sending never blocks, so that training can't wait for a busy daemon. While
    the daemon reads nothing, consecutive reports of progress make one: the newest.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._outbox: deque[tuple[FromTrainer, bytes]] = deque()
        """Messages to send, each with its frame."""
        self._leaving = False
        """True iff nothing more may be sent than what is queued."""
        self._changed = threading.Condition()
        self._sender = threading.Thread(target=self._send_all, name="sender", daemon=True)
        self._sender.start()

    def receive(self) -> ToTrainer | None:
        """Wait for the next message; None = the daemon is gone."""
        header = self._exactly(_LENGTH_BYTES)
        body = None if header is None else self._exactly(_checked_length(header))
        return None if body is None else _TO_TRAINER.decode(body)

    def send(self, message: FromTrainer) -> None:
        """Queue a message, on any thread; the receiving thread notices if the daemon is gone."""
        with self._changed:
            if self._leaving:
                return
            last = self._outbox[-1][0] if self._outbox else None
            both = _newest(last, message)
            frame = _framed(_encoded(both or message))
            if both is not None:
                self._outbox.pop()
            self._outbox.append((both or message, frame))
            self._changed.notify()

    def flush(self, timeout_s: float) -> None:
        """Send the queued messages, and none after them; called before the process exits."""
        with self._changed:
            self._leaving = True
            self._changed.notify()
        self._sender.join(timeout_s)

    def _send_all(self) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while (frame := self._next_frame()) is not None:
                self._sock.sendall(frame)

    def _next_frame(self) -> bytes | None:
        """Wait for a frame to send; None = that was the last."""
        with self._changed:
            self._changed.wait_for(lambda: self._outbox or self._leaving)
            return self._outbox.popleft()[1] if self._outbox else None

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


def _newest(last: FromTrainer | None, message: FromTrainer) -> FromTrainer | None:
    """The one report that takes the place of two consecutive ones; None = both have to arrive."""
    if isinstance(last, Ending | Working) and type(last) is type(message):
        return message
    if isinstance(last, Progressed) and isinstance(message, Progressed):
        return structs.replace(message, privacy=message.privacy or last.privacy)
    return None


class DaemonChannel:
    """The daemon's end of the channel, on its event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, sock: socket.socket) -> DaemonChannel:
        """Open a channel over one end of a socketpair, and own that end."""
        return cls(*await asyncio.open_connection(sock=sock))

    async def receive(self) -> FromTrainer | None:
        """Wait for the next message; None = the trainer is gone."""
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
        """Queue a message; the trainer reads it even while a step runs."""
        if not self._writer.is_closing():
            self._writer.write(_framed(msgspec.msgpack.encode(message)))

    async def close(self) -> None:
        """Close the socket: the trainer exits when it sees that."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


async def log_lines(stream: asyncio.StreamReader | None, logger: logging.Logger) -> None:
    """Log a child's output line by line, each at its level; very long lines are split.

    Lines without a level were not written by the child's loggers, but by a library or by the dying
    interpreter. They are warnings, and errors from the first line of a traceback or fatal error on.
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
    """Log a line; returns the level of a next line that has none."""
    text = line.decode(errors="backslashreplace")
    if (marked := _MARKED.match(text)) is not None:
        logger.log(int(marked[1]), "%s", text[marked.end() :])
        return logging.WARNING
    level = logging.ERROR if text.startswith(_LAST_WORDS) else before
    if text:
        logger.log(level, "%s", text)
    return level


class LevelFormatter(logging.Formatter):
    """Writes the level in front of every line, for `log_lines` at the other end."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line or, with a traceback, several."""
        lines = super().format(record).splitlines() or [""]
        return "\n".join(f"<{record.levelno}>{line}" for line in lines)


def _encoded(message: FromTrainer) -> bytes:
    """Encode a message as msgpack, with its strings made safe.

    Names of files, and errors that quote files, may hold bytes that are not UTF-8, or megabytes of
    text. They are made safe nowhere else.
    """
    with contextlib.suppress(UnicodeEncodeError):
        body = msgspec.msgpack.encode(message)
        if len(body) <= _MAX_TEXT:  # then no string is longer
            return body
    safe = sayable(msgspec.to_builtins(message, builtin_types=(bytes,)), _MAX_TEXT, _MAX_TRACE)
    return msgspec.msgpack.encode(safe)


def _framed(body: bytes) -> bytes:
    if len(body) > MAX_FRAME_BYTES:
        raise LocalError(f"a message to or from the trainer has {len(body)} bytes")
    return len(body).to_bytes(_LENGTH_BYTES, "little") + body


def _checked_length(header: bytes) -> int:
    length = int.from_bytes(header, "little")
    if length > MAX_FRAME_BYTES:
        raise TrainerError(f"a message of {length} bytes was announced; {MAX_FRAME_BYTES} at most")
    return length
