"""Signal handlers of our processes: a signal ends a process properly, or does nothing.

The table is in docs/operating.md. Some signals keep the system's default: those that nobody can
handle (KILL, STOP), those of faults (ABRT, BUS, FPE, ILL, SEGV, SYS, TRAP), and those that do not
kill (CHLD, CONT, TSTP, TTIN, TTOU, URG, WINCH).
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from typing import Final

log = logging.getLogger("xpeer.daemon")


def _known(*names: str) -> frozenset[signal.Signals]:
    """The signals of these names that this system has."""
    return frozenset(signal.Signals[name] for name in names if name in signal.Signals.__members__)


ENDING: Final = _known("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGPWR", "SIGXCPU")
"""Signals at which the node saves and ends: from an operator, a closed terminal, a failing power
supply, or a used-up CPU limit (the hard limit comes some seconds later)."""
_LEFT: Final = _known(
    "SIGKILL", "SIGSTOP", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV", "SIGSYS", "SIGTRAP",
    "SIGCHLD", "SIGCONT", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGURG", "SIGWINCH", "SIGINFO",
)  # fmt: skip
IGNORED: Final = frozenset(int(n) for n in signal.valid_signals()) - ENDING - _LEFT
"""Signals that kill by default, and that nobody sends to us on purpose: ALRM, IO, PIPE, PROF,
STKFLT, USR1, USR2, VTALRM, XFSZ, real-time ones."""


def end_by(loop: asyncio.AbstractEventLoop, end: Callable[[], None]) -> None:
    """Make signals of `ENDING` call a function on the loop, and those of `IGNORED` do nothing.

    If `nohup` set SIGHUP to be ignored, it stays ignored.
    """
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    for number in ENDING:
        if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
            continue

        def caught(number: signal.Signals = number) -> None:
            log.info("%s: saving and ending", number.name)
            end()

        loop.add_signal_handler(number, caught)


def leave_it_to_the_parent() -> None:
    """Ignore all signals that could end this process, since its parent decides when it ends."""
    for number in (*ENDING, *IGNORED):
        signal.signal(number, signal.SIG_IGN)
