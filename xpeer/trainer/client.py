"""The trainer process as the daemon sees it: an object whose methods wait for its answers.

Every request has a deadline. If the trainer dies, all requests fail at once. The owner then starts
a new trainer, with a new epoch; meetings in flight are lost (TRAINER_RESTARTED).
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from xpeer.errors import LocalError, PeerError, Reason, TrainerError
from xpeer.manifest import StateForm
from xpeer.manifest.signed import SignedManifest
from xpeer.mixing.cut import fragment_size
from xpeer.phase import Order, TrainerPhase
from xpeer.status import PrivacySpent, Progress
from xpeer.trainer.answers import (
    UNREADY,
    Crashed,
    Done,
    Ending,
    LookedAtText,
    Losses,
    Progressed,
    Saved,
    SaveFailed,
    Snapshotted,
    Starting,
    StateExported,
    StateImported,
    Verified,
    Written,
)
from xpeer.trainer.arena import Arena, Layout, Slots, copy_in_parts
from xpeer.trainer.child import PROGRAM, Child, Event, logger
from xpeer.trainer.commands import (
    Drop,
    Evaluate,
    ExportState,
    ImportState,
    Merge,
    Run,
    Snapshot,
    Verify,
    WriteCheckpoint,
)
from xpeer.trainer.ended import Ended
from xpeer.trainer.setup import TrainerSetup
from xpeer.update import (
    Checked,
    CompressedUpdate,
    ModelState,
    PeerUpdate,
    StateCopy,
    received_stamp,
)

__all__ = [
    "Crashed",
    "Ending",
    "Event",
    "LookedAtText",
    "Progressed",
    "SaveFailed",
    "Saved",
    "Starting",
    "TrainerProcess",
]

START_PATIENCE_S: Final = 600.0
"""Seconds that a start may show no progress. A start itself may take hours: a large shard."""


@dataclass(frozen=True, slots=True)
class _Started:
    """What there is once the process was spawned.

    Attributes:
        child: the process.
        slots: places for payloads in the shared memory.
        vectors: V, values that the rule sends for each parameter.
        state: form of the parameters that joiners are sent.
    """

    child: Child
    slots: Slots
    vectors: int
    state: StateForm


class TrainerProcess:
    """A running trainer, as the daemon sees it. Made by `start`.

    Attributes:
        epoch: a random number, drawn at each start.
        facts: what the trainer said when it was ready; `UNREADY` until then.
        state: phase that the trainer reported last.
        progress: counters that it reported last; it reports some ten times a second.
        privacy: what the ledger said last; it is asked after every window.
        ledger_counter: number of privacy charges so far, for partners to remember.
    """

    def __init__(self, on_event: Callable[[Event], None]) -> None:
        self.epoch = secrets.randbits(62)
        self.facts = UNREADY
        self.state: TrainerPhase = "starting"
        self.progress = Progress()
        self.privacy = PrivacySpent()
        self.ledger_counter = 0
        self._rests_until_s = 0.0
        self._started: _Started | None = None  # None until the process was spawned
        self._region = asyncio.Lock()
        self._tell = on_event

    @classmethod
    async def start(
        cls,
        setup: TrainerSetup,
        on_event: Callable[[Event], None],
        patience_s: float = START_PATIENCE_S,
        program: str = PROGRAM,
    ) -> TrainerProcess:
        """Spawn a trainer and wait until it is ready.

        Args:
            setup: what the child needs to know.
            on_event: called on this event loop for every event.
            patience_s: seconds without progress after which a start is given up.
            program: name of the module to run; the module calls `main.main`.

        Raises:
            LocalError: raised in the child, with its class, remedy and exit code.
            TrainerError: the child died without saying why.
            LocalTimeoutError: the child made no progress.
        """
        manifest = SignedManifest.load(Path(setup.manifest_path)).open(setup.swarm_id)
        arena = Arena.create(Layout.of(manifest))
        trainer = cls(on_event)
        child = await Child.spawn(program, setup, arena, trainer._follow)
        slots = Slots(arena.layout.num_slots)
        vectors, form = manifest.round.policy.vectors, manifest.state_form
        trainer._started = _Started(child, slots, vectors, form)
        trainer.facts = await child.wait_ready(patience_s)
        trainer.ledger_counter = max(trainer.ledger_counter, trainer.facts.ledger_counter)
        return trainer

    @property
    def _running(self) -> _Started:
        if self._started is None:
            raise TrainerError("the trainer was not started")
        return self._started

    @property
    def _child(self) -> Child:
        return self._running.child

    @property
    def _slots(self) -> Slots:
        return self._running.slots

    @property
    def num_params(self) -> int:
        """P."""
        return self.facts.num_params

    @property
    def resumed_step(self) -> int | None:
        """Of the checkpoint that it went on from; None = it began anew."""
        return self.facts.step if self.facts.resumed else None

    @property
    def exited(self) -> asyncio.Future[int]:
        """The exit status, once the process is gone (negative: the signal)."""
        return self._child.exited

    @property
    def crash(self) -> LocalError | None:
        """The error that ended the trainer, if it could still send one."""
        return self._child.crash

    @property
    def ended(self) -> Ended | None:
        """How it ended; None while it runs."""
        return self._child.ended

    @property
    def gave_up(self) -> bool:
        """Whether it was asked to stop, made no progress, and was killed."""
        return self._child.gave_up

    @property
    def pid(self) -> int:
        """Process id, and id of its process group."""
        return self._child.pid

    @property
    def resting_s(self) -> float:
        """Seconds left of the rest that `training.throttle` asks for; 0 = at work."""
        return max(0.0, self._rests_until_s - time.monotonic())

    @property
    def step(self) -> int:
        """Number of local steps done."""
        return self.progress.step

    @property
    def window(self) -> int:
        """Number of windows done."""
        return self.progress.window

    def fragment_values(self, fragment: int, *, averaging: bool) -> int:
        """Number of values that a fragment's exchange sends.

        Args:
            fragment: f.
            averaging: see `snapshot`.
        """
        vectors = 1 if averaging else self._running.vectors
        return vectors * fragment_size(self.num_params, self.facts.num_fragments, fragment)

    # ---- one exchange: see xpeer/round.py -----------------------------------------------------

    async def snapshot(
        self, meeting_id: int, fragment: int, *, averaging: bool
    ) -> CompressedUpdate:
        """Copy a fragment at the next step boundary, certify and compress it.

        Args:
            meeting_id: chosen by the caller.
            fragment: f.
            averaging: average the parameters, whatever the manifest's rule.

        Raises:
            PeerError: too many meetings are in flight (BUSY), or there is nothing to send yet
                (NOT_READY).
            TrainerError: the trainer died.
            LocalTimeoutError: no step boundary, and no progress for `child.PATIENCE_S`.
        """
        return await self._child.whole(self._snapshot(meeting_id, fragment, averaging))

    async def _snapshot(self, meeting_id: int, fragment: int, averaging: bool) -> CompressedUpdate:
        async with self._slots.one() as slot:
            command = Snapshot(meeting_id, fragment, averaging, slot)
            snapshot = await self._child.ask(command, Snapshotted)
            size = snapshot.form.num_bytes
            payload = memoryview(bytearray(size))
            await copy_in_parts(self._child.arena.slot(slot, size), payload)
        stamp = received_stamp(snapshot.privacy_mode, snapshot.steps_charged)
        return CompressedUpdate(payload, snapshot.form, snapshot.step, stamp)

    async def verify(self, meeting_id: int, exchange_id: int, update: PeerUpdate) -> Checked:
        """Decode and check one partner's payload, or a masked group's sum.

        Returns:
            The relative distance between our values and the partner's (or the others' mean), and
            whether it is above the norm limit.

        Raises:
            PeerError: the payload has another size or codec, is not finite, or is too far away to
                be decoded.
            TrainerError: the trainer died.
        """
        size, expected = memoryview(update.payload).nbytes, update.form.num_bytes
        if size != expected:
            reason = Reason.OVERSIZE if size > expected else Reason.MALFORMED
            raise PeerError(reason, f"payload of {size} bytes, {expected} expected")
        room = self._child.arena.layout.slot_bytes
        if size > room:
            raise PeerError(Reason.OVERSIZE, f"payload of {size} bytes, at most {room}")
        return await self._child.whole(self._verify(meeting_id, exchange_id, update))

    async def _verify(self, meeting_id: int, exchange_id: int, update: PeerUpdate) -> Checked:
        async with self._slots.one() as slot:
            payload = memoryview(update.payload).cast("B")
            await copy_in_parts(payload, self._child.arena.slot(slot, payload.nbytes))
            whose = update.parties, update.peer_id
            command = Verify(meeting_id, exchange_id, slot, update.form, *whose)
            verified = await self._child.ask(command, Verified)
        return Checked(verified.distance, verified.clipped)

    async def merge(self, meeting_id: int, weights: dict[int, float]) -> None:
        """Queue the merge of verified payloads for the next step boundary.

        Args:
            meeting_id: as given to `snapshot`.
            weights: w_j of every exchange that both sides accepted.

        Raises:
            PeerError: the meeting was dropped.
            TrainerError: an exchange was not verified, or the trainer died.
        """
        await self._child.whole(self._child.ask(Merge(meeting_id, weights), Done))

    def drop(self, meeting_id: int) -> None:
        """Forget a meeting; an unknown one is ignored."""
        self._child.send(Drop(meeting_id))

    # ---- state --------------------------------------------------------------------------------

    async def export_state(self) -> StateCopy:
        """Copy all parameters at the next step boundary, to memory that the caller owns.

        Raises:
            PeerError: there are none yet (NOT_READY).
        """
        return await self._child.whole(self._export_state(), by_disk=True)

    async def _export_state(self) -> StateCopy:
        arena = self._child.arena
        async with self._region:
            try:
                exported = await self._child.ask(ExportState(), StateExported)
                payload = bytearray(self._running.state.num_bytes)
                await copy_in_parts(arena.state()[: len(payload)], memoryview(payload))
            finally:
                arena.release_state()
        state = ModelState(memoryview(payload), exported.step, exported.loss_public)
        return StateCopy(state, exported.core_s)

    async def import_state(
        self,
        payload: bytes | memoryview,
        step: int,
        at_most: float = math.inf,
        codec: str = "float32",
        before_step: int | None = None,
    ) -> float:
        """Replace the parameters; moments and warm-up start afresh.

        Args:
            payload: as `manifest.StateForm` says, with that codec.
            step: the donor's step.
            at_most: highest public loss to accept.
            codec: form of the trained values.
            before_step: refuse if the trainer has taken so many steps by now; None = never.

        Returns:
            The public loss of the new parameters, as we measured it.

        Raises:
            PeerError: the parameters have another size, are not finite, or have a higher loss than
                `at_most` or than the old ones, or `before_step` is reached. The old ones stay.
        """
        form = replace(self._running.state, codec=codec)
        size, expected = memoryview(payload).nbytes, form.num_bytes
        if size != expected:
            raise PeerError(Reason.WRONG_MODEL, f"{size} bytes, {expected} expected")
        values = memoryview(payload).cast("B")
        imported = await self._child.whole(
            self._import_state(values, ImportState(step, at_most, codec, before_step)),
            by_disk=True,  # an export before it has the region
        )
        logger.info(
            "parameters replaced at step %d: public loss %.4f -> %.4f",
            *(step, imported.loss_before, imported.loss_after),
        )
        return imported.loss_after

    async def _import_state(self, payload: memoryview, command: ImportState) -> StateImported:
        arena = self._child.arena
        async with self._region:
            try:
                await copy_in_parts(payload, arena.state())
                return await self._child.ask(command, StateImported)
            finally:
                arena.release_state()

    async def checkpoint(self) -> str:
        """Write a checkpoint now; returns its path."""
        writing = self._child.ask(WriteCheckpoint(), Written)
        return (await self._child.whole(writing, by_disk=True)).path

    async def evaluate(self) -> Losses:
        """Measure the losses of the present parameters."""
        return await self._child.whole(self._child.ask(Evaluate(), Losses))

    async def run(self, mode: Order) -> None:
        """Change the mode at the next step boundary."""
        await self._child.whole(self._child.ask(Run(mode), Done))

    # ---- the end ------------------------------------------------------------------------------

    async def stop(
        self, patience_s: float, on_progress: Callable[[Ending], None] | None = None
    ) -> int:
        """Have the trainer save and exit; see `Child.stop`. Returns the exit status."""
        return await self._child.stop(patience_s, on_progress)

    async def kill(self) -> int:
        """End the process group at once. Returns the exit status."""
        return await self._child.kill()

    def _follow(self, event: Event) -> None:
        if isinstance(event, Progressed):
            self.state, self.progress = event.state, event.progress
            self._rests_until_s = time.monotonic() + event.progress.rest_s
            self.privacy = event.privacy or self.privacy
            self.ledger_counter = event.ledger_counter
        self._tell(event)
