"""Messages between daemon and trainer: small and framed; bulk goes through the arena.

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
from typing import Final

import msgspec

from xpeer.errors import LocalError, TrainerError
from xpeer.escape import sayable
from xpeer.trainer.answers import FromTrainer
from xpeer.trainer.commands import ToTrainer

MAX_FRAME_BYTES: Final = 4 << 20
_LENGTH_BYTES: Final = 4
_MAX_TEXT, _MAX_TRACE = 2_000, 20_000
"""Characters of a string from the trainer: a file's name or content may be in it."""
_LOG_BYTES: Final = 64 << 10
_MARKED: Final = re.compile(r"<(\d{1,2})>")
_LAST_WORDS: Final = ("Traceback ", "Fatal Python error", "Exception ")

_TO_TRAINER: Final[msgspec.msgpack.Decoder[ToTrainer]] = msgspec.msgpack.Decoder(ToTrainer)
_FROM_TRAINER: Final[msgspec.msgpack.Decoder[FromTrainer]] = msgspec.msgpack.Decoder(FromTrainer)


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
