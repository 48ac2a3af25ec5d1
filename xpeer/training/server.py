"""Answers the daemon's commands inside the trainer process.

Who does what: the training thread touches the parameters, at step boundaries; the helper compresses
and verifies; the disk thread writes checkpoints; another asks the ledger. None waits for another.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Final

import torch

from xpeer.errors import LocalError, PeerError, Reason, XpeerError
from xpeer.escape import without_words
from xpeer.phase import Order
from xpeer.status import PrivacySpent
from xpeer.training.answers import (
    Done,
    Ending,
    LookedAtText,
    Losses,
    Progressed,
    Ready,
    Reply,
    Result,
    Saved,
    SaveFailed,
    Snapshotted,
    StateExported,
    StateImported,
    Verified,
    Written,
    failure_of,
)
from xpeer.training.arena import Arena
from xpeer.training.assemble import Assembled
from xpeer.training.channel import ChildChannel
from xpeer.training.commands import (
    Command,
    Drop,
    Evaluate,
    ExportState,
    ImportState,
    Merge,
    Request,
    Run,
    Snapshot,
    Stop,
    Verify,
    WriteCheckpoint,
)
from xpeer.training.flat import digest
from xpeer.training.saving import Saving
from xpeer.update import PeerUpdate, PrivateUpdate

_PROGRESS_EVERY_S: Final = 0.1
_ENDING_EVERY_S: Final = 0.5
_LOOK_FIRST_S: Final = 2.0
_LOOK_LAST_S: Final = 300.0
"""Between two looks at a text that can't be read."""
logger = logging.getLogger("xpeer.training")

Work = Callable[[], Result | None]
"""None: the answer comes later, from another thread."""


class Server:
    """Between the channel and the loop.

    Args:
        channel: to the daemon.
        arena: shared with it.
        assembled: the trainer and what belongs to it.
        checkpoint_every_s: time between periodic checkpoints.
    """

    def __init__(
        self, channel: ChildChannel, arena: Arena, assembled: Assembled, checkpoint_every_s: float
    ) -> None:
        self._channel = channel
        self._arena = arena
        self._assembled = assembled
        self._trainer = assembled.trainer
        self._helper = ThreadPoolExecutor(1, "helper")  # one: see `stages`
        self._disk = ThreadPoolExecutor(1, "disk")
        self._told_at = 0.0
        self._told_window = -1
        self._accounts = ThreadPoolExecutor(1, "accounts")
        self._asked = False
        self._saving = Saving(
            self._trainer,
            assembled.capture,
            lambda write: _submit(self._disk, write),
            lambda path, step: channel.send(Saved(path, step)),
            lambda problem, step: channel.send(SaveFailed(problem, step)),
            every_s=checkpoint_every_s,
            resumed=assembled.resumed,
        )
        self._take: dict[type[Command], Callable[[int, Any], object]] = {
            Snapshot: self._take_snapshot,
            Verify: self._take_verify,
            Merge: self._take_merge,
            Drop: self._take_drop,
            ExportState: lambda n, _: self._at_boundary(n, lambda: self._export_state(n)),
            ImportState: lambda n, c: self._at_boundary(n, lambda: self._import_state(c)),
            Run: lambda n, c: self._at_boundary(n, lambda: self._run(c)),
            WriteCheckpoint: lambda n, _: self._at_boundary(n, lambda: self._write_checkpoint(n)),
            Evaluate: lambda n, _: self._at_boundary(n, self._evaluate),
            Stop: lambda _n, _c: self._begin_to_end(),
        }
        self._trainer.on_step = self._after_step
        self._trainer.on_state = self._tell_all

    def announce(self) -> None:
        """Tell the daemon that the trainer is ready."""
        _submit(self._helper, self._trainer.exchanges.prepare)
        self._tell_all()  # first, so that the daemon has its counters when it is ready
        made = self._assembled
        self._channel.send(
            Ready(
                num_params=self._trainer.parameters.num_params,
                num_fragments=self._trainer.exchanges.fragments.num_fragments,
                device=made.device,
                engine=made.engine,
                num_records=made.num_records,
                step=self._trainer.counters.step,
                ledger_counter=made.ledger_counter(),
                resumed=made.resumed,
                corpus=made.corpus,
                shard=made.shard,
                notes=made.notes,
                warnings=made.warnings,
                text_problem=made.text_problem,
            )
        )
        if made.look_again is not None:
            look = partial(self._look_for_text, made.look_again)
            threading.Thread(target=look, name="text", daemon=True).start()

    def set_mode(self, mode: Order) -> None:
        """At a boundary."""
        self._trainer.set_mode(mode)

    def handle(self, request: Request) -> None:
        """Take a command, on the receiving thread; returns at once."""
        self._take[type(request.command)](request.number, request.command)

    def finish(self) -> None:
        """After the loop returned: save, and say the last word."""
        self.save()
        self._disk.shutdown()
        self._accounts.shutdown(cancel_futures=True)
        self._send_progress(self._assembled.spent())
        self._assembled.close()

    def save(self) -> None:
        """On the training thread, when the loop has ended: behind a save that is being written.

        Raises:
            LocalError: it can't be written.
        """
        if not self._trainer.awaiting:
            write, step = self._saving.copy(), self._trainer.counters.step
            self._channel.send(Saved(self._disk.submit(write).result(), step))

    def rescue(self) -> None:
        """The loop broke off: keep the steps before, which are complete. Never raises."""
        try:
            if bool(torch.isfinite(self._trainer.parameters.read()).all()):
                self.save()
                logger.warning("saved step %d before the trainer ends", self._trainer.counters.step)
        except Exception:
            logger.exception("the steps since the last checkpoint could not be saved")

    # ---- on the receiving thread --------------------------------------------------------------

    def _look_for_text(self, look: Callable[[], object]) -> None:
        """On a thread of its own, as long as there is this trainer: where the text can be read, the
        daemon starts another one, and asks again if that fails.
        """
        pause_s = _LOOK_FIRST_S
        while True:
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LOOK_LAST_S)
            problem = ""
            try:
                look()
            except LocalError as e:
                problem = str(e)
            except Exception as e:  # noqa: BLE001 - e.g. no memory; the daemon tells it
                problem = f"it could not be looked at: {without_words(e)}"
            self._channel.send(LookedAtText(problem))

    def _begin_to_end(self) -> None:
        threading.Thread(target=self._tell_of_the_end, name="ending", daemon=True).start()
        self._trainer.stop()

    def _tell_of_the_end(self) -> None:
        pulse = self._trainer.pulse
        while True:
            self._channel.send(Ending(pulse.work, pulse.written, pulse.total))
            time.sleep(_ENDING_EVERY_S)

    def _take_snapshot(self, number: int, command: Snapshot) -> None:
        self._at_boundary(number, lambda: self._snapshot(number, command))

    def _take_verify(self, number: int, command: Verify) -> None:
        _submit(self._helper, self._answer, number, lambda: self._verify(command))

    def _take_merge(self, number: int, command: Merge) -> None:
        _submit(self._helper, self._answer, number, lambda: self._merge(command))

    def _take_drop(self, _number: int, command: Drop) -> None:
        """Now, to free memory; and once more behind a snapshot that is still due."""
        self._trainer.exchanges.drop(command.meeting_id)
        self._trainer.submit(lambda: self._trainer.exchanges.drop(command.meeting_id))

    # ---- on the training thread, at a boundary ------------------------------------------------

    def _snapshot(self, number: int, command: Snapshot) -> None:
        private = self._trainer.snapshot(
            command.meeting_id, command.fragment, averaging=command.averaging
        )
        _submit(self._helper, self._answer, number, lambda: self._compress(command, private))

    def _export_state(self, number: int) -> None:
        region = torch.frombuffer(self._arena.state(), dtype=torch.float32)
        trained, kept = self._divided(region)
        step, finish = self._trainer.counters.step, self._trainer.show(trained)
        kept.copy_(self._assembled.frozen_values())

        def exported() -> StateExported:
            loss = finish()
            return StateExported(digest(region), step, loss)

        _submit(self._disk, self._answer, number, exported)

    def _import_state(self, command: ImportState) -> StateImported:
        region = torch.frombuffer(self._arena.state(), dtype=torch.float32)
        trained, kept = self._divided(region)
        self._assembled.replace_frozen(kept)
        before, after = self._trainer.replace(trained, command.step, command.at_most)
        self._tell_all()
        return StateImported(before, after)

    def _divided(self, region: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is trained, and what is frozen."""
        count = self._trainer.parameters.num_params
        return region[:count], region[count:]

    def _run(self, command: Run) -> Done:
        self.set_mode(command.mode)
        return Done()

    def _write_checkpoint(self, number: int) -> None:
        if self._trainer.awaiting:  # values of chance, which the next start would resume from
            raise PeerError(Reason.NOT_READY, "the parameters have not been fetched yet")
        write, step = self._saving.copy(), self._trainer.counters.step

        def written() -> Written:
            try:
                return Written(write())
            except LocalError as e:  # whoever asked is told, and health, too
                self._channel.send(SaveFailed(str(e), step))
                raise

        _submit(self._disk, self._answer, number, written)

    def _evaluate(self) -> Losses:
        public, validation = self._trainer.measure()
        self._tell_all()
        return Losses(public, validation)

    def _after_step(self, rest_s: float) -> None:
        now = time.monotonic()
        if self._trainer.counters.window != self._told_window:
            self._tell_all()
        elif max(now - self._told_at, rest_s) >= _PROGRESS_EVERY_S:
            self._send_progress(None)
        self._saving.after_step()

    # ---- on the helper ------------------------------------------------------------------------

    def _compress(self, command: Snapshot, private: PrivateUpdate) -> Snapshotted:
        update = self._trainer.exchanges.compress(command.meeting_id, private)
        self._arena.slot(command.slot, update.form.num_bytes)[:] = update.payload
        return Snapshotted(
            form=update.form,
            step=update.step,
            privacy_mode=update.stamp.mode,
            steps_charged=update.stamp.steps_charged,
        )

    def _verify(self, command: Verify) -> Verified:
        payload = self._arena.slot(command.slot, command.form.num_bytes)
        update = PeerUpdate(payload, command.form, command.partner, command.parties)
        checked = self._trainer.exchanges.verify(command.meeting_id, command.exchange_id, update)
        return Verified(checked.distance, checked.clipped)

    def _merge(self, command: Merge) -> Done:
        self._trainer.exchanges.resolve(command.meeting_id, command.weights)
        self._trainer.submit(lambda: self._merge_now(command))
        return Done()

    def _merge_now(self, command: Merge) -> None:
        self._trainer.merge(command.meeting_id)
        if self._trainer.state != "training":
            self._send_progress(None)

    # ---- on a thread of its own ---------------------------------------------------------------

    def _send_spent(self) -> None:
        """The ledger's sum takes a moment to compute; neither the loop nor checkpoints wait."""
        self._asked = False
        self._send_progress(self._assembled.spent())

    # ---- everywhere ---------------------------------------------------------------------------

    def _tell_all(self) -> None:
        self._told_window = self._trainer.counters.window
        self._send_progress(None)
        if not self._asked:  # else one that begins later will tell the same
            self._asked = True
            _submit(self._accounts, self._send_spent)

    def _send_progress(self, privacy: PrivacySpent | None) -> None:
        self._told_at = time.monotonic()
        self._channel.send(
            Progressed(
                self._trainer.state,
                self._trainer.progress(),
                self._assembled.ledger_counter(),
                privacy,
            )
        )

    def _at_boundary(self, number: int, work: Work) -> None:
        self._trainer.submit(lambda: self._answer(number, work))

    def _answer(self, number: int, work: Work) -> None:
        """Errors made on purpose are answers; any other is a bug, which ends the training thread
        (and so the process) if it happened there.
        """
        try:
            result = work()
        except XpeerError as e:
            result = failure_of(e)
        except BaseException as e:
            self._channel.send(Reply(number, failure_of(e)))
            raise
        if result is not None:
            self._channel.send(Reply(number, result))


def _submit(pool: ThreadPoolExecutor, work: Callable[..., object], *arguments: object) -> None:
    pool.submit(work, *arguments).add_done_callback(_log_bug)


def _log_bug(done: Future[object]) -> None:
    """What was made on purpose has been answered before; the rest must not vanish."""
    if (error := done.exception()) is not None:
        logger.error("a helper of the trainer failed", exc_info=error)
