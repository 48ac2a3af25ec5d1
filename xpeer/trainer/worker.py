"""The object that commands are applied to: the loop, the shared memory and the checkpoints.

A command needs nothing else, in this process or on another rank.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from xpeer.trainer.answers import Saved
from xpeer.trainer.arena import Arena
from xpeer.trainer.assembled import Assembled
from xpeer.trainer.commands import NOBODY, Command, ImportState, Request
from xpeer.trainer.reporting import Reports
from xpeer.trainer.saving import Saving
from xpeer.trainer.threads import Threads
from xpeer.training.flat import all_finite
from xpeer.training.handed_out import narrow, widened

logger = logging.getLogger("xpeer.training")


class Worker:
    """A trainer as its commands see it.

    Args:
        assembled: the parts of the trainer.
        arena: shared with the daemon.
        saving: begins and copies checkpoints.
        reports: sends events to the daemon.
        threads: all but the training thread.

    Attributes:
        loop: takes the steps.
        exchanges: its meetings in flight.
        arena, saving, reports: as given.
    """

    def __init__(
        self,
        assembled: Assembled,
        arena: Arena,
        saving: Saving,
        reports: Reports,
        threads: Threads,
    ) -> None:
        self.loop = assembled.trainer
        self.exchanges = assembled.trainer.exchanges
        self.arena = arena
        self.saving = saving
        self.reports = reports
        self._assembled = assembled
        self._threads = threads

    def queue(self, command: Command) -> None:
        """Have a command carried out at the next boundary, without an answer."""
        self.loop.submit(Request(NOBODY, command))

    # ---- at a boundary ------------------------------------------------------------------------

    def after_step(self, rest_s: float) -> None:
        """Report a step, and begin a checkpoint if one is due; `rest_s` seconds of rest follow."""
        self.reports.after_step(rest_s)
        self.saving.after_step()

    def copy_state(self) -> Callable[[], None]:
        """Copy all parameters to the arena's region.

        Returns:
            A function that completes the copy; call it on any thread.

        Raises:
            PeerError: there are none yet (NOT_READY).
        """
        trained, kept = self._state("float32")
        finish = self.loop.show(trained)
        kept.copy_(self._assembled.frozen.read())
        return finish

    def replace_state(self, order: ImportState) -> tuple[float, float]:
        """Replace all parameters by those in the arena's region.

        Returns:
            Public loss before and after.

        Raises:
            PeerError: see `TrainingLoop.replace`; or the frozen ones are not the manifest's
                (WRONG_MODEL).
        """
        trained, kept = self._state(order.codec)
        self._assembled.frozen.replace(kept)
        return self.loop.replace(trained, order.step, order.at_most, order.before_step)

    def _state(self, codec: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The arena's region: the trained parameters and the frozen ones; in float32, views."""
        return widened(self.arena.state(), self.loop.manifest.state_form, codec)

    # ---- on the measuring thread --------------------------------------------------------------

    def measure_state(self) -> float:
        """Measure the public loss of the trained parameters in the arena's region, in float32.

        Raises:
            PeerError: see `Measurements.public_of_copy`.
        """
        trained, _ = self._state("float32")
        return self.loop.measurements.public_of_copy(trained)

    def narrow_state(self) -> None:
        """Bring the arena's region from float32 into the form that joiners are sent."""
        codec = self.loop.manifest.state_form.codec
        narrow(self.arena.state(), self.loop.parameters.num_params, codec)

    # ---- begin and end ------------------------------------------------------------------------

    def announce(self) -> None:
        """Report that the trainer is ready."""
        self._threads.submit("helper", self.exchanges.prepare)
        self.reports.ready()

    def finish(self) -> None:
        """Save, report for the last time, and close everything, after the loop has returned.

        Raises:
            LocalError: the checkpoint can't be written.
        """
        self.save()
        self._threads.close()
        self.reports.progress(self._assembled.spent())
        self._assembled.close()

    def save(self) -> None:
        """Write a checkpoint after the loop has ended, behind one that is being written.

        Called on the training thread.

        Raises:
            LocalError: the checkpoint can't be written.
        """
        if not self.loop.awaiting:
            write, step = self.saving.copy(), self.loop.counters.step
            self.reports.send(Saved(self._threads.wait_for("disk", write), step))

    def rescue(self) -> None:
        """Save the complete steps after the loop has failed. Never raises."""
        try:
            if all_finite(self.loop.parameters.read()):
                self.save()
                logger.warning("saved step %d before the trainer ends", self.loop.counters.step)
        except Exception:
            logger.exception("the steps since the last checkpoint could not be saved")
