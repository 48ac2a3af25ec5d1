"""A slot clock of which everything around is a fake."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from xpeer.forms import Form
from xpeer.gossip import matching
from xpeer.gossip.clock import Gossip
from xpeer.gossip.partners import Events, Partners
from xpeer.identity import PeerId
from xpeer.manifest.round import Round
from xpeer.round import Exchanged, Meeting
from xpeer.wire.messages import Propose, Terms

SWARM = "ab" * 32
ME, OTHER, THIRD, LAST = (PeerId(f"12D3KooW{letter}") for letter in "ABCD")
FORM = Form("int8", 100)
ROUND = Round(window_steps=10, slot_s=1.0, fragments=5, codec="int8", deadline_s=5)
MASKED = msgspec.structs.replace(ROUND, masks=True, group=3)


class FakeTrainer:
    epoch, step, ledger_counter = 7, 0, 3
    resumed_step: int | None = None

    window = 0

    def fragment_values(self, fragment: int, *, averaging: bool) -> int:
        return 100

    def drop(self, meeting_id: int) -> None:
        return


class FakeHost:
    def __init__(self) -> None:
        self.trainer: FakeTrainer | None = FakeTrainer()
        self.live: list[PeerId] = [OTHER]
        self.no: str | None = None
        self.is_training, self.is_settled = True, False

    def idle_reason(self) -> str | None:
        return self.no

    def training(self) -> bool:
        return self.is_training

    def partners(self) -> list[PeerId]:
        return self.live

    def zones(self) -> dict[PeerId, str]:
        return {}

    def may_exchange(self, peer_id: PeerId) -> bool:
        return True

    def has_nothing_due(self, peer_id: PeerId) -> bool:
        return self.is_settled

    def declared_rate(self, peer_id: PeerId) -> float:
        return 1.0

    def quality(self) -> tuple[float | None, float]:
        return None, 0.0


class FakeProposer:
    """Logs proposals; answers with an agreement or what `fails` says of a partner."""

    def __init__(self) -> None:
        self.log: list[PeerId] = []
        self.done_with: list[tuple[PeerId, bool]] = []
        self.fails: dict[PeerId, Exception] = {}

    def busy_with(self, peer_id: PeerId) -> bool:
        return False

    async def propose(self, peer_id: PeerId, desk: Any, **terms: Any) -> Any:
        self.log.append(peer_id)
        if peer_id in self.fails:
            raise self.fails[peer_id]
        return SimpleNamespace(
            peer_id=peer_id,
            slot=terms["slot"],
            fragment=terms["fragment"],
            exchange_id=len(self.log),
            averaging=terms["averaging"],
            form=terms["form"],
        )

    async def done(self, peer_id: PeerId, *, healthy: bool) -> None:
        self.done_with.append((peer_id, healthy))


class Seen(Events):
    """Keeps what happens to partners in a rig's lists."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig

    def exchanged(self, agreement: Any, result: Any, took_s: float) -> None:
        self._rig.merged.append(agreement.peer_id)

    def skipped(self, peer_id: str, slot: int, reason: str, detail: str) -> None:
        self._rig.skipped.append((peer_id, reason))


class Rig:
    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, me: PeerId = ME, rules: Round = ROUND
    ) -> None:
        self.host, self.proposer, self.now = FakeHost(), FakeProposer(), 1000.5
        self.merged: list[PeerId] = []
        self.skipped: list[tuple[str, str]] = []
        self.outcome: Callable[[], Any] = lambda: Exchanged(0.01)

        async def exchange(meeting: Meeting, agreement: Any, **_: Any) -> Any:
            meeting._mark_arrived(agreement.peer_id)
            return self.outcome()

        monkeypatch.setattr(Meeting, "exchange", exchange)
        self.partners = Partners(lambda: self.now, Seen(self))
        self.nudged: list[PeerId] = []

        async def nudge(peer_id: PeerId) -> None:
            self.nudged.append(peer_id)

        self.gossip = Gossip(
            me=me,
            swarm_id=SWARM,
            manifest=SimpleNamespace(round=rules),  # type: ignore[arg-type] # its round is all
            host=self.host,  # type: ignore[arg-type] # half of the trainer is never called
            proposer=self.proposer,  # type: ignore[arg-type] # a fake
            clock=lambda: self.now,
            nudge=nudge,
            partners=self.partners,
        )

    async def slot(self) -> None:
        """One slot, and what it started."""
        self.gossip._begin_slot(matching.slot_number(self.now, ROUND.slot_s))
        while self.gossip._tasks:
            await asyncio.gather(*self.gossip._tasks)
        pairs = self.gossip._round.group == 2
        self.now += ROUND.slot_s * (1 if pairs else self.gossip._meetings.stride)

    def proposal(self, **changed: Any) -> Propose:
        slot = matching.slot_number(self.now, ROUND.slot_s)
        facts = {
            "exchange_id": 1, "slot": slot, "codec": "int8", "num_values": 100,
            "fragment": matching.fragment_of(SWARM, slot, 5),
            "averaging": not self.host.is_training,
            "terms": Terms(1.0, 2.0, 1, 0),
        }  # fmt: skip
        return Propose(**{**facts, **changed})
