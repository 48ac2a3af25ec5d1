"""The noise in what a partner receives: as much as is claimed, independent, never repeated.

Two real trainer processes aggregate gradients (`round.rule = gradient` sends the noised gradient
itself) over sealed streams; what is tested is what each session opened. A record's clipped gradient
adds at most C to a vector of 10^5 coordinates whose noise is 4 C each: nothing that these
tests could see.

Chances of a false alarm: each of some 1,000 comparisons at 1e-10 or less.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.meetings import meet
from tests.unit.network.test_agreement import Dialler, FakeDesk, party, streams
from tests.unit.trainer.processes import Watch
from tests.unit.training.homes import make_homes
from xpeer.forms import Form
from xpeer.identity import Identity
from xpeer.network.agreement import Proposer, answering
from xpeer.trainer.client import TrainerProcess
from xpeer.trainer.setup import TrainerSetup
from xpeer.update import Checked, CompressedUpdate, PeerUpdate

pytestmark = pytest.mark.timeout(150)

SIGMA, CLIP_NORM, BATCH = 4.0, 1.0, 2
CHANGES = (
    "round.rule=gradient", "round.group=0", "round.fragments=1", "round.window_steps=1",
    "round.codec=float32", f"privacy.noise_multiplier={SIGMA}", f"privacy.clip_norm={CLIP_NORM}",
    f"optimiser.batch_records={BATCH}",
)  # fmt: skip
ERROR = 1e-10
LAGS = 64
DEADLINE_S = 20.0

Noise = np.ndarray  # (P,) float64, in units of what is claimed


def alarms(noises: Mapping[str, Noise]) -> list[str]:
    """What speaks against independent N(0, 1) in every coordinate of every vector."""
    limit = float(stats.norm.isf(ERROR / 2))
    found = []
    for name, noise in noises.items():
        size = len(noise)
        energy = float(noise @ noise)
        if 2 * min(stats.chi2.cdf(energy, size), stats.chi2.sf(energy, size)) < ERROR:
            found.append(f"{name}: variance {energy / size:.4f}")
        if abs(noise.sum()) > limit * size**0.5:
            found.append(f"{name}: mean {noise.mean():.4g}")
        if stats.kstest(noise, "norm").pvalue < ERROR:
            found.append(f"{name}: not normal")
        lags = [abs(noise[:-k] @ noise[k:]) / (size - k) ** 0.5 for k in range(1, LAGS + 1)]
        if max(lags) > limit:
            found.append(f"{name}: coordinates correlated")
    for (one, a), (other, b) in combinations(noises.items(), 2):
        if abs(a @ b) > limit * len(a) ** 0.5:
            found.append(f"{one} and {other}: correlated")
    return found


class Tapped:
    """A trainer, and what its partners' sessions opened."""

    def __init__(self, trainer: TrainerProcess) -> None:
        self.trainer = trainer
        self.received: list[bytes] = []

    async def snapshot(
        self, meeting_id: int, fragment: int, *, averaging: bool
    ) -> CompressedUpdate:
        return await self.trainer.snapshot(meeting_id, fragment, averaging=averaging)

    async def verify(self, meeting_id: int, exchange_id: int, update: PeerUpdate) -> Checked:
        self.received.append(bytes(update.payload))
        return await self.trainer.verify(meeting_id, exchange_id, update)

    async def merge(self, meeting_id: int, weights: dict[int, float]) -> None:
        await self.trainer.merge(meeting_id, weights)

    def drop(self, meeting_id: int) -> None:
        self.trainer.drop(meeting_id)


class Node:
    """A home whose trainer may be started more than once."""

    def __init__(self, setup: TrainerSetup) -> None:
        self.setup = setup
        self.steps = 0

    async def start(self) -> None:
        self.watch = Watch()
        self.tapped = Tapped(await TrainerProcess.start(self.setup, self.watch))
        self.steps = self.tapped.trainer.step

    @property
    def trainer(self) -> TrainerProcess:
        return self.tapped.trainer

    async def gradient_due(self) -> None:
        self.steps += 1
        await self.watch.step(self.steps)


async def exchange(low: Node, high: Node, slot: int) -> tuple[Noise, Noise]:
    """A step of both, and an exchange over sealed streams; noise of low and of high."""
    await asyncio.gather(low.gradient_due(), high.gradient_due())
    ours, theirs = sorted((Identity.generate(), Identity.generate()), key=lambda i: i.peer_id)
    near, far = streams(ours, theirs)
    desk = FakeDesk(high.tapped)  # type: ignore[arg-type] # any trainer will do
    serving = asyncio.ensure_future(answering(party(theirs), desk)(far))
    values = low.trainer.fragment_values(0, averaging=False)
    proposer = Proposer(party(ours), Dialler(near))
    agreement = await proposer.propose(
        theirs.peer_id, FakeDesk(low.tapped), slot=slot, fragment=0, averaging=False,  # type: ignore[arg-type] # likewise
        form=Form("float32", values), timeout_s=DEADLINE_S,
    )  # fmt: skip
    await meet(low.tapped, agreement, DEADLINE_S)
    await desk.outcome
    near.abort()
    await asyncio.gather(serving, return_exceptions=True)
    return noise_in(high.tapped.received[-1], low), noise_in(low.tapped.received[-1], high)


def noise_in(payload: bytes, sender: Node) -> Noise:
    """The gradient, of which next to nothing is text."""
    values = np.frombuffer(payload, dtype="<f4").astype(np.float64)
    gradient = values[: sender.trainer.num_params]  # parameters follow
    return gradient * BATCH / (SIGMA * CLIP_NORM)


async def test_noise_on_the_wire_is_as_claimed_and_never_repeated(tmp_path: Path):
    low, high = (Node(s) for s in make_homes(tmp_path, 2, privacy="record", changes=CHANGES))
    await asyncio.gather(low.start(), high.start())
    noises: dict[str, Noise] = {}
    try:
        for slot in range(3):
            if slot == 1:
                await low.trainer.checkpoint()
            noises[f"low {slot}"], noises[f"high {slot}"] = await exchange(low, high, slot)
        await low.trainer.kill()
        await low.start()  # from that checkpoint
        assert low.trainer.resumed_step is not None
        assert low.steps < 3
        noises["low again"], noises["high 3"] = await exchange(low, high, 3)
    finally:
        await asyncio.gather(low.trainer.kill(), high.trainer.kill())
    assert len(noises["low 0"]) > 50_000
    assert alarms(noises) == []


def _seeded(*scales: float) -> dict[str, Noise]:
    rng = np.random.default_rng(5)
    return {str(i): scale * rng.standard_normal(100_000) for i, scale in enumerate(scales)}


def _smoothed(noises: dict[str, Noise]) -> None:
    noises["0"] = (noises["0"] + 0.05 * np.roll(noises["0"], 7)) / (1 + 0.05**2) ** 0.5


def _partly_repeated(noises: dict[str, Noise]) -> None:
    noises["1"][:3_000] = noises["0"][:3_000]


def _uniform(noises: dict[str, Noise]) -> None:
    noises["0"] = (stats.norm.cdf(noises["0"]) - 0.5) * 12**0.5


def _shifted(noises: dict[str, Noise]) -> None:
    noises["0"] += 0.03


@pytest.mark.parametrize(
    ("spoil", "alarm"),
    [
        (lambda noises: noises.update(_seeded(1.0, 0.98)), "1: variance"),
        (_shifted, "0: mean"),
        (_uniform, "0: not normal"),
        (_smoothed, "0: coordinates correlated"),
        (_partly_repeated, "0 and 1: correlated"),
    ],
)
def test_the_test_sees_noise_that_is_wrong(spoil: Callable[[dict[str, Noise]], None], alarm: str):
    noises = _seeded(1.0, 1.0)
    assert alarms(noises) == []
    spoil(noises)
    assert [found for found in alarms(noises) if found.startswith(alarm)]
