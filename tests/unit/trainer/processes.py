"""What tests of trainer processes share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from xpeer.forms import Form
from xpeer.trainer.child import Event
from xpeer.trainer.client import Progressed, TrainerProcess
from xpeer.trainer.setup import TrainerSetup
from xpeer.training import checkpoint
from xpeer.update import CompressedUpdate, PeerUpdate
from xpeer.wire.codec import decode


class Watch:
    """Collects a trainer's events and lets a test wait for one."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._news = asyncio.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self._news.set()

    async def until(self, wanted: Callable[[Event], bool]) -> Event:
        seen = 0
        while True:
            while seen < len(self.events):
                if wanted(self.events[seen]):
                    return self.events[seen]
                seen += 1
            self._news.clear()
            await self._news.wait()

    async def step(self, step: int) -> None:
        await self.until(lambda e: isinstance(e, Progressed) and e.progress.step >= step)

    async def state(self, state: str) -> Progressed:
        event = await self.until(lambda e: isinstance(e, Progressed) and e.state == state)
        assert isinstance(event, Progressed)
        return event


def with_config(setup: TrainerSetup, section: str, **changes: Any) -> TrainerSetup:
    part = msgspec.structs.replace(getattr(setup.config, section), **changes)
    config = msgspec.structs.replace(setup.config, **{section: part})
    return msgspec.structs.replace(setup, config=config)


def from_peer(update: CompressedUpdate, **changes: Any) -> PeerUpdate:
    fields = {"payload": update.payload, "form": update.form}
    return PeerUpdate(**{**fields, **changes}, peer_id="peer")


def empty_of(form: Form) -> PeerUpdate:
    return PeerUpdate(bytes(form.num_bytes), form, peer_id="peer")


def values_to_bytes(values: torch.Tensor) -> bytes:
    return values.numpy().astype("<f4").tobytes()


def values_of(payload: bytes | memoryview) -> np.ndarray:
    return np.frombuffer(payload, dtype="<f4").astype(np.float64)


async def saved_by(*trainers: TrainerProcess) -> list[checkpoint.Bundle]:
    return [checkpoint.load(Path(await trainer.checkpoint())) for trainer in trainers]


async def parameters_of(*trainers: TrainerProcess) -> list[np.ndarray]:
    """Their own, as checkpoints hold them."""
    return [saved.flat.numpy() for saved in await saved_by(*trainers)]


def values_sent(update: CompressedUpdate) -> torch.Tensor:
    return decode(update.form, bytes(update.payload))


def relative_distances(x: torch.Tensor, y: torch.Tensor) -> list[float]:
    """As each of the two should find it."""
    return [float((x - y).norm() / own.norm()) for own in (x, y)]
