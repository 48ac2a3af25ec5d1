"""A node that takes parameters over: donors, its trainer and its store, on a fast clock."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from xpeer.config import Home
from xpeer.errors import PeerError, Reason
from xpeer.identity import PeerId
from xpeer.manifest import StateForm
from xpeer.network import giving
from xpeer.network.pieces import Shape, Tree, leaves_of, root_of
from xpeer.network.rates import Rates
from xpeer.phase import Phase, traits_of
from xpeer.trainer.answers import Losses
from xpeer.wire.messages import PIECE_BYTES, TreeOffer
from xpeer_daemon import donors, offers, parameters
from xpeer_daemon.donors import Donors
from xpeer_daemon.offers import Offers
from xpeer_daemon.parameters import Origin, Parameters, begins
from xpeer_daemon.store import Store
from xpeer_daemon.takeover import Takeover

GOOD, WORSE, OLD, LIAR, BUSY, TWIN = (
    PeerId(f"12D3KooW{name}") for name in ("Good", "Worse", "Old", "Liar", "Busy", "Twin")
)
VALUES, LINE = 16, 64
OFFERS = {GOOD: (100, 2.0), WORSE: (100, 3.0), OLD: (20, 2.01), LIAR: (101, 0.1)}
TRUE_LOSS = {GOOD: 2.0, WORSE: 3.0, OLD: 2.01, LIAR: 9.0}


class Offer:
    """As a `Giver`: its parameters are the donor's name, over and over."""

    def __init__(self, donor: PeerId) -> None:
        self.donor = donor
        self.step, self.loss_public = OFFERS[donor]
        self.refused = False
        self.payload = memoryview(donor.encode().ljust(LINE) * (4 * VALUES // LINE))
        leaves = leaves_of(self.payload)
        offer = TreeOffer(
            "float32",
            4 * VALUES,
            self.step,
            self.loss_public,
            root_of(leaves),
            donor.encode().ljust(64),
        )
        self.tree = Tree(donor, offer, leaves)

    async def pieces(self, first: int, count: int) -> AsyncGenerator[tuple[int, memoryview]]:
        for piece in range(first, first + count):
            await asyncio.sleep(0)
            yield piece, self.payload[piece * PIECE_BYTES : (piece + 1) * PIECE_BYTES]

    async def close(self) -> None:
        pass

    def refuse(self) -> None:
        self.refused = True


class Trainer:
    """Measures what it is given; `own` is what it has."""

    def __init__(self, resumed_step: int | None = None, own: float = math.inf) -> None:
        self.resumed_step, self.own = resumed_step, own
        self.step = resumed_step or 0
        self.taken: list[PeerId] = []
        self.stopped = False

    async def import_state(
        self,
        payload: bytes,
        step: int,
        at_most: float,
        codec: str,
        before_step: int | None = None,
    ) -> float:
        if before_step is not None and self.step >= before_step:
            raise PeerError(Reason.NOT_AHEAD, "it has trained meanwhile")
        first, last = bytes(payload[:LINE]), bytes(payload[-LINE:])
        if first != last:
            raise PeerError(Reason.REFUSED, "a mixture that is bad")
        donor = PeerId(first.decode().strip())
        if TRUE_LOSS[donor] > at_most:
            raise PeerError(Reason.REFUSED, "worse than it says")
        if TRUE_LOSS[donor] > 1.05 * self.own + 0.02:
            raise PeerError(Reason.WORSE_THAN_OURS, "worse than ours")
        self.taken.append(donor)
        self.step = max(self.step, step)
        return TRUE_LOSS[donor]

    async def evaluate(self) -> Losses:
        return Losses(self.own, None)

    async def stop(self, timeout_s: float) -> int:
        self.stopped = True
        return 0


class Rig:
    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, founds: bool) -> None:
        self.store = Store.open(tmp_path / "state.sqlite")
        self.live: list[PeerId] = []
        self.phase = "training"
        self.states: list[Phase] = []
        self.saved = 0
        self.roles: dict[PeerId, str] = {}
        self.heard: dict[PeerId, int | None] = {}
        self.saved_at: float | None = 0.0
        self.gone: set[PeerId] = set()
        """Who is on the roster, and does not answer."""
        self.busy = {BUSY}
        self.life = SimpleNamespace(
            enter=self.states.append,
            note="",
            catching_up=False,
            fetching=None,
            compares=False,
            wasted="",
        )
        self.node = SimpleNamespace(
            peer_id=PeerId("12D3KooWMe"), checkpoint=self._checkpoint, life=self.life,
            clock=lambda: 1e6, ends=SimpleNamespace(saved_at=lambda _: self.saved_at),
        )  # fmt: skip
        self.conditions: set[str] = set()
        self.asked: list[tuple[PeerId, bytes | None]] = []
        """Whom, and for which snapshot."""
        self.node.health = SimpleNamespace(hold=self._hold, clear=self.conditions.discard)
        view: Any = SimpleNamespace(
            others=self._others, holders=self._holders, name_of=str,
            acquaintances=SimpleNamespace(get=self._heard),
        )  # fmt: skip
        manifest: Any = SimpleNamespace(
            model=SimpleNamespace(num_params=VALUES, state_values=VALUES),
            round=SimpleNamespace(window_steps=5),
            start_loss=5.0, state_form=StateForm("float32", VALUES),
            end=SimpleNamespace(steps=300, rounds=None, tokens=None), optimiser=None,
        )  # fmt: skip
        self.manifest = manifest
        us: Any = SimpleNamespace(swarm_id="", manifest_hash=b"")
        node: Any = self.node
        nobody: Any = None
        shape, rates = Shape(manifest.state_form), Rates()
        asking = Offers(
            view,
            self.store,
            manifest,
            lambda donor: takeover.ask(donor),  # noqa: PLW0108 - made below
        )
        folder, avoid, spare = tmp_path / "joining", asking.avoid, asking.spare
        takeover = Takeover(us, nobody, shape, rates, folder, node.life, avoid, spare)
        self.donors = found = Donors(node, view, self.store, manifest, asking, takeover)
        self.next_trainer = Trainer()
        self.supervisor = SimpleNamespace(first_start=self._start, renew=self._renew, trainer=None)
        self.renewed = 0
        self.origin = Origin(founds and begins(Home(tmp_path), self.store))
        self.parameters = Parameters(
            self.node, self.store, found, self.supervisor,  # type: ignore[arg-type] # fakes
            self.origin, founds=founds,
        )  # fmt: skip
        monkeypatch.setattr(giving, "ask", self._ask)
        monkeypatch.setattr(donors, "RETRY_S", 0.001)
        monkeypatch.setattr(donors, "DOUBT_S", 0.001)
        monkeypatch.setattr(offers, "LOOK_S", 0.001)
        monkeypatch.setattr(donors, "PATIENCE_S", 0.05)
        monkeypatch.setattr(donors, "GRACE_S", 0.02)
        monkeypatch.setattr(parameters, "POLL_S", 0.001)

    def _others(self) -> dict[PeerId, Any]:
        return {
            peer: SimpleNamespace(phase=self.phase, role=self.roles.get(peer, "member"))
            for peer in self.live
        }

    def _holders(self) -> list[PeerId]:
        return [
            peer
            for peer, record in self._others().items()
            if record.role != "observer" and traits_of(record.phase).holds_parameters
        ]

    def _heard(self, peer: PeerId) -> Any:
        return SimpleNamespace(about=SimpleNamespace(step=self.heard.get(peer)))

    def _hold(self, code: str, active: bool, **_: object) -> None:
        (self.conditions.add if active else self.conditions.discard)(code)

    async def _checkpoint(self) -> str:
        self.saved += 1
        return "path"

    async def _ask(
        self, party: Any, dialler: Any, donor: PeerId, shape: Any, rates: Any, root: bytes | None
    ) -> Offer:
        self.asked.append((donor, root))
        if donor in self.gone:
            raise PeerError(Reason.TIMEOUT, "it is gone")
        if donor in self.busy:
            raise PeerError(Reason.CLOSED, "it gives to others")
        return Offer(donor)

    async def _start(self) -> Trainer:
        return self.next_trainer

    async def _renew(self, timeout_s: float) -> None:
        self.renewed += 1

    async def hold(self, trainer: Trainer) -> Any:
        return await self.parameters.hold(trainer)  # type: ignore[arg-type] # a fake
