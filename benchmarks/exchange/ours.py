"""A peer of ours: the real swarm, links, agreements and codecs, without a daemon."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.exchange.child import Requests, run
from benchmarks.exchange.model import SHOWN, AveragingTrainer, values_of
from xpeer.errors import Reason
from xpeer.identity import Identity, PeerId
from xpeer.network.agreement import PROTOCOL, Agreement, Party, Proposer, answering
from xpeer.network.link import Link
from xpeer.network.membership.certificates import Credential, Membership
from xpeer.network.membership.keyring import KeyRing
from xpeer.network.swarm import Swarm
from xpeer.round import Meeting, MeetingPlan
from xpeer.wire.messages import Accept, Payload, Propose, Terms

DEADLINE_S = 300.0
BULK_PROTOCOL = "xpeer/benchmark-bulk/1"
KEY, MANIFEST = b"k" * 32, b"m" * 32


class Peer:
    """ProposalHandler and children's commands in one."""

    def __init__(self, swarm: Swarm, party: Party) -> None:
        self._swarm = swarm
        self._party = party
        self._proposer = Proposer(party, swarm)
        self._trainer: AveragingTrainer | None = None
        self._bulk: Link | None = None
        self._turn: asyncio.Queue[tuple[int, asyncio.Future[None]]] = asyncio.Queue(1)

    async def serve(self) -> None:
        """Answer partners."""
        await self._swarm.serve_links(PROTOCOL, answering(self._party, self), "member")
        await self._swarm.serve_links(BULK_PROTOCOL, self._take_bulk, "member")

    async def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """One command of the parent."""
        return await getattr(self, f"_on_{request.pop('command')}")(**request)  # type: ignore[no-any-return]

    async def _on_learn(self, addresses: list[str]) -> dict[str, Any]:
        self._swarm.learn(addresses)
        return {}

    async def _on_prepare(self, rank: int, num_params: int, codec: str) -> dict[str, Any]:
        """Set the values anew."""
        values = values_of(rank, num_params)
        self._trainer = AveragingTrainer(values, codec)
        return {"shown": values[:SHOWN].tolist()}

    async def _on_average(self, partners: list[str], at: float) -> dict[str, Any]:
        """Average with one partner after another, from `at` on; when the last was merged."""
        assert self._trainer is not None
        await asyncio.sleep(at - time.time())
        for number, name in enumerate(partners):
            partner = PeerId(name)
            if self._swarm.peer_id < partner:
                await self._propose(partner, number)
            else:
                done = asyncio.get_running_loop().create_future()
                await self._turn.put((number, done))
                await done
        finished, trainer = time.time(), self._trainer
        self._trainer = None  # its memory is wanted by those whose turn is next
        shown = trainer.values[:SHOWN].tolist()
        return {"finished": finished, "shown": shown, "seconds": trainer.seconds}

    async def _propose(self, to: PeerId, number: int) -> None:
        assert self._trainer is not None
        agreement = await self._proposer.propose(
            to,
            self,
            slot=number,
            fragment=0,
            averaging=False,
            form=self._trainer.form,
            timeout_s=DEADLINE_S,
        )
        healthy = False
        try:
            await _meet(self._trainer, agreement)
            healthy = True
        finally:
            await self._proposer.done(to, healthy=healthy)

    # ProposalHandler

    def terms(self, peer_id: PeerId, slot: int) -> Terms:
        """Nothing to say."""
        return Terms(weight=1.0, group_weight=2.0, epoch=1, ledger_counter=0)

    def refusal_of(self, peer_id: PeerId, proposal: Propose) -> str | None:
        """None."""
        return None

    def before_agreement(self, peer_id: PeerId, theirs: Terms) -> None:
        """Nothing to count."""

    async def take_part(self, agreement: Agreement) -> None:
        """When it is this round's turn here, too."""
        number, done = await self._turn.get()
        assert number == agreement.slot, Reason.WRONG_SLOT
        assert self._trainer is not None
        await _meet(self._trainer, agreement)
        done.set_result(None)

    # Bulk alone

    async def _on_bulk(self, to: str, num_bytes: int) -> dict[str, Any]:
        """Seconds of one transfer over a link that stays open, until the partner has it all."""
        link = self._bulk or await self._open_bulk(PeerId(to))
        payload = os.urandom(1 << 20) * (num_bytes >> 20)
        start = time.perf_counter()
        await link.send(Payload(0, len(payload)))
        await link.send_bulk(payload)
        await link.expect(Accept, 0, DEADLINE_S)
        return {"seconds": time.perf_counter() - start}

    async def _open_bulk(self, peer_id: PeerId) -> Link:
        self._bulk = link = await self._swarm.open_link(peer_id, BULK_PROTOCOL)
        shake = self._party.handshake(peer_id, "exchange", initiator=True)
        await link.connect(shake, initiator=True)
        if link._second is not None:  # in production it opens while the first exchange runs
            await asyncio.wait([link._second])
        return link

    async def _take_bulk(self, link: Link) -> None:
        shake = self._party.handshake(link.peer_id, "exchange", initiator=False)
        await link.connect(shake, initiator=False)
        while True:
            announced = await link.receive(DEADLINE_S)
            assert isinstance(announced, Payload)
            _, digest = await link.receive_bulk(announced.num_bytes)
            await link.send(Accept(announced.exchange_id, digest))


async def _meet(trainer: AveragingTrainer, agreement: Agreement) -> None:
    """One exchange, and its merge."""
    meeting = Meeting(
        trainer,
        MeetingPlan(
            meeting_id=agreement.exchange_id,
            slot=agreement.slot,
            fragment=agreement.fragment,
            averaging=agreement.averaging,
            expected=[agreement.peer_id],
            gather_s=DEADLINE_S,
        ),
    )
    merging = asyncio.create_task(meeting.run())
    await meeting.exchange(agreement, weighting="equal", deadline_s=DEADLINE_S)
    await merging


async def main(requests: Requests) -> None:
    """Start, and do what the parent says."""
    torch.set_num_threads(1)
    config = await anext(aiter(requests))
    identity = Identity.from_libp2p(bytes.fromhex(config["identity"]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "identity.key"
        identity.save(path)
        credential = Credential.from_bytes(bytes.fromhex(config["credential"]))
        membership = Membership(config["swarm_id"], credential)
        listen = f"/ip4/{config['address']}/tcp/0"
        swarm = await Swarm.start(
            identity,
            path,
            membership,
            listen=[listen],
            seeds=config["seeds"],
            direct_listen=listen if config["direct"] else "",
        )
        try:
            if config["seeds"]:
                async with asyncio.timeout(30):
                    await swarm.bootstrapping.reached.wait()
            party = Party(identity, config["swarm_id"], KeyRing(KEY), MANIFEST, 1, membership)
            peer = Peer(swarm, party)
            await peer.serve()
            requests.answer(peer_id=swarm.peer_id, addresses=swarm.addresses)
            await requests.serve(peer.handle)
        finally:
            await swarm.close()


if __name__ == "__main__":
    run(main)
