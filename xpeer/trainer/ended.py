"""How a trainer's process ended, in words: a signal from outside is told apart from our own."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xpeer.errors import TrainerError

_COUNTERS: Final = Path("/proc/vmstat")
_REMEDY: Final = (
    "if memory ran out, end what else runs there, or set training.micro_batch to 1 and "
    "training.checkpoint_activations to on; `xpeer estimate` says what each phase needs"
)


class TrainerKilledError(TrainerError):
    """A trainer was killed by somebody else, most likely for want of memory."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a process.

    Attributes:
        status: of its exit; negative: the signal.
        by_us: whether this node sent that signal.
        kills: processes that the kernel ended for want of memory while it ran.
    """

    status: int
    by_us: bool = False
    kills: int = 0

    @property
    def was_killed(self) -> bool:
        """Whether somebody else killed it: where memory runs out, the system does."""
        return self.status == -signal.SIGKILL and not self.by_us

    def __str__(self) -> str:
        if self.status >= 0:
            return f"exited with {self.status}"
        if not self.was_killed:
            return f"was ended by {_name(-self.status)}"
        said = "was killed by SIGKILL, which this node did not send"
        if not self.kills:
            return f"{said}; the system does so where memory runs out"
        many = "a process" if self.kills == 1 else f"{self.kills} processes"
        return f"{said}; the kernel has ended {many} for want of memory meanwhile"

    def error(self) -> TrainerError:
        """The error of what still waited for an answer."""
        if self.was_killed:
            return TrainerKilledError(f"the trainer {self}", _REMEDY)
        return TrainerError(f"the trainer {self}", "see the log")


def kills_so_far() -> int:
    """Processes that the kernel has ended for want of memory; 0 if it does not say."""
    try:
        lines = _COUNTERS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
