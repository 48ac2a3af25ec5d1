"""The trainer process: `python -m xpeer.trainer.main SOCKET_FD ARENA_FD PARENT_PID`.

`client.TrainerProcess` starts it. It trains on its main thread until the daemon asks it to stop. It
never outlives the daemon: on Linux the kernel kills it with its parent, and on every system it
exits when the socket is closed.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final, NoReturn

from xpeer import signals, uncollected
from xpeer.errors import DivergedError, ExitCode, LocalError, TrainerError
from xpeer.shortage import share_freed
from xpeer.trainer.answers import Crashed, failure_of
from xpeer.trainer.channel import ChildChannel, LevelFormatter
from xpeer.trainer.commands import Begin, Request, Stop

if TYPE_CHECKING:
    from xpeer.trainer.assembled import Assembled
    from xpeer.trainer.server import Server
    from xpeer.trainer.setup import TrainerSetup

_PR_SET_PDEATHSIG: Final = 1
_FLUSH_TIMEOUT_S: Final = 5.0

logger = logging.getLogger("xpeer.training")


class Receiver:
    """Receives the daemon's commands on its own thread; when that thread ends, the process exits.

    Attributes:
        server: carries the commands out; None until the trainer is built.
    """

    def __init__(self, channel: ChildChannel) -> None:
        self.server: Server | None = None
        self._channel = channel
        threading.Thread(target=self._receive, name="receiver", daemon=True).start()

    def _receive(self) -> None:
        try:
            while (message := self._channel.receive()) is not None:
                if not isinstance(message, Request):
                    raise TrainerError(f"{type(message).__name__} came twice")
                if self.server is not None:
                    self.server.handle(message)
                elif isinstance(message.command, Stop):
                    _leave(ExitCode.OK)  # still starting: there is nothing to save
        except BaseException:
            logger.exception("the trainer's receiver failed")
            raise
        finally:
            _leave(ExitCode.ERROR)  # without a daemon the process ends at once, even within a step


def main(assemble: Callable[[TrainerSetup], Assembled] | None = None) -> NoReturn:
    """Train until the daemon sends `Stop`.

    Args:
        assemble: replaces `build.assemble`, for benchmarks with parts of their own.
    """
    socket_fd, arena_fd, parent_pid = (int(argument) for argument in sys.argv[1:])
    _die_with(parent_pid)
    os.umask(0o077)
    # a ^C, a closed terminal or a stop of the whole group reaches the daemon, too, which decides
    signals.leave_it_to_the_parent()
    faulthandler.enable()
    share_freed()
    _set_up_logging()
    channel = ChildChannel(socket.socket(fileno=socket_fd))
    begin = channel.receive()
    if not isinstance(begin, Begin):
        _leave(ExitCode.ERROR)
    receiver = Receiver(channel)
    try:
        _train(begin, arena_fd, channel, receiver, assemble)
    except BaseException as e:  # noqa: BLE001 - it crosses to the daemon instead
        # every error is sent: the daemon logs it, and decides whether to start another trainer
        channel.send(Crashed(failure_of(e)))
        channel.flush(_FLUSH_TIMEOUT_S)
        _leave(e.exit_code if isinstance(e, LocalError) else ExitCode.ERROR)
    channel.flush(_FLUSH_TIMEOUT_S)
    _leave(ExitCode.OK)


def _train(
    begin: Begin,
    arena_fd: int,
    channel: ChildChannel,
    receiver: Receiver,
    assemble: Callable[[TrainerSetup], Assembled] | None,
) -> None:
    # torch takes seconds to import; meanwhile the receiver would notice the end of the daemon
    with uncollected.imports():
        import torch  # noqa: PLC0415

        from xpeer.trainer import build as production  # noqa: PLC0415
        from xpeer.trainer.arena import Arena, Layout  # noqa: PLC0415
        from xpeer.trainer.server import serve  # noqa: PLC0415
        from xpeer.trainer.starting import Startup, report_start  # noqa: PLC0415

    layout = Layout(begin.slot_bytes, begin.state_bytes, begin.num_slots)
    arena = Arena.attach(layout, arena_fd)
    if begin.setup.config.training.threads:
        torch.set_num_threads(begin.setup.config.training.threads)
    startup = Startup()
    arguments = startup, channel.send
    threading.Thread(target=report_start, args=arguments, name="start", daemon=True).start()
    made_by = assemble or partial(production.assemble, startup=startup)
    assembled = made_by(begin.setup)
    startup.over = True
    trainer = assembled.trainer
    server = serve(channel.send, arena, assembled, begin.setup.config.checkpoint.every_s)
    trainer.set_mode(begin.setup.mode)
    receiver.server = server
    if hasattr(signal, "SIGXCPU"):  # a CPU limit is near: the next trainer gets a new one
        signal.signal(signal.SIGXCPU, lambda _number, _frame: trainer.stop())
    server.worker.announce()
    try:
        trainer.run()
    except DivergedError:
        raise
    except Exception:
        server.worker.rescue()
        raise
    server.worker.finish()


def _set_up_logging() -> None:
    """Log as the daemon does: xpeer's own loggers from info on, libraries from warning on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LevelFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("xpeer").setLevel(logging.INFO)
    logging.captureWarnings(True)


def _die_with(parent_pid: int) -> None:
    """Have the kernel kill us when our parent dies, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before that call
        _leave(ExitCode.ERROR)


def _leave(status: int) -> NoReturn:
    """Exit without joining threads that may be in the middle of a long step."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
