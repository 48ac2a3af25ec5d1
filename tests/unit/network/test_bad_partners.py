"""A partner that spoils an exchange, in every way there is: nothing of it is merged."""

from __future__ import annotations

import asyncio

import pytest

from tests.meetings import meet
from tests.unit.network.test_agreement import (
    SIZE,
    Dialler,
    FakeDesk,
    FakeTrainer,
    party,
    propose,
    streams,
)
from xpeer.errors import PeerError, Reason
from xpeer.identity import Identity, PeerId
from xpeer.network.agreement import Proposer
from xpeer.network.link import Link
from xpeer.wire import messages
from xpeer.wire.frames import FRAME_BYTES, Kind
from xpeer.wire.messages import Accept, Agree, Payload, Propose, Refuse, Terms


class Villain:
    """A member that speaks the protocol by hand, up to the point where it misbehaves."""

    def __init__(self, link: Link, identity: Identity, partner: PeerId) -> None:
        self.link, self.identity, self.partner = link, identity, partner

    async def agree(self) -> Propose:
        handshake = party(self.identity).handshake(self.partner, "exchange", initiator=False)
        await self.link.connect(handshake, initiator=False)
        proposal = await self.link.receive(2)
        assert isinstance(proposal, Propose)
        await self.link.send(Agree(proposal.exchange_id, Terms(1.0, 2.0, 1, 0)))
        return proposal

    async def payload(self, proposal: Propose, data: bytes) -> None:
        await self.link.send(Payload(proposal.exchange_id, len(data)))
        await self.link.send_bulk(data)


def sealed_by(link: Link, kind: Kind, plaintext: bytes) -> bytes:
    assert link._session is not None
    return link._session.sealer.seal(kind, plaintext)


async def too_large(v: Villain, p: Propose) -> None:
    await v.link.send(Payload(p.exchange_id, 1 << 40))


async def too_small(v: Villain, p: Propose) -> None:
    await v.payload(p, b"b" * 10)


async def more_than_announced(v: Villain, p: Propose) -> None:
    await v.link.send(Payload(p.exchange_id, SIZE))
    await v.link.send_bulk(b"b" * (SIZE + 5))


async def accepts_something_else(v: Villain, p: Propose) -> None:
    await v.payload(p, b"b" * SIZE)
    await v.link.expect(Payload, p.exchange_id, 2)
    await v.link.receive_bulk(SIZE)
    await v.link.send(Accept(p.exchange_id, b"d" * 32))


async def short_frame(v: Villain, p: Propose) -> None:
    await v.link.send(Payload(p.exchange_id, SIZE))
    await v.link.send_bulk(b"b" * 1000)


async def truncated(v: Villain, p: Propose) -> None:
    await v.link.expect(Payload, p.exchange_id, 2)
    await v.link.receive_bulk(SIZE)
    await v.link.send(Payload(p.exchange_id, SIZE))
    await v.link._stream.write(sealed_by(v.link, Kind.BULK, b"b" * FRAME_BYTES))
    v.link.abort()


async def silent(v: Villain, p: Propose) -> None:
    await v.link.send(Payload(p.exchange_id, SIZE))


async def other_exchange(v: Villain, p: Propose) -> None:
    await v.link.send(Payload(p.exchange_id ^ 1, SIZE))


async def bulk_first(v: Villain, p: Propose) -> None:
    await v.link.send_bulk(b"b" * 100)


async def huge_frame(v: Villain, p: Propose) -> None:
    await v.link._stream.write((1 << 31).to_bytes(4, "big") + b"x" * 100)


async def altered_frame(v: Villain, p: Propose) -> None:
    sealed = bytearray(sealed_by(v.link, Kind.MESSAGE, b"whatever"))
    sealed[-3] ^= 1
    await v.link._stream.write(bytes(sealed))


async def replayed_frame(v: Villain, p: Propose) -> None:
    payload = messages.encode(Payload(p.exchange_id, SIZE))
    frame = sealed_by(v.link, Kind.MESSAGE, payload)
    for _ in range(2):
        await v.link._stream.write(frame)


async def dies_before_accepting(v: Villain, p: Propose) -> None:
    await v.payload(p, b"b" * SIZE)
    await v.link.expect(Payload, p.exchange_id, 2)
    await v.link.receive_bulk(SIZE)
    v.link.abort()


async def refuses_at_the_end(v: Villain, p: Propose) -> None:
    await v.payload(p, b"b" * SIZE)
    await v.link.expect(Payload, p.exchange_id, 2)
    await v.link.receive_bulk(SIZE)
    await v.link.expect(Accept, p.exchange_id, 2)
    await v.link.send(Refuse(p.exchange_id, Reason.NOT_FINITE))


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        (too_large, Reason.OVERSIZE),
        (too_small, Reason.MALFORMED),
        (more_than_announced, Reason.OVERSIZE),
        (accepts_something_else, Reason.DIGEST_MISMATCH),
        (short_frame, Reason.MALFORMED),
        (truncated, Reason.TRUNCATED),
        (silent, Reason.TIMEOUT),
        (other_exchange, Reason.MALFORMED),
        (bulk_first, Reason.MALFORMED),
        (huge_frame, Reason.OVERSIZE),
        (altered_frame, Reason.TAMPERED),
        (replayed_frame, Reason.TAMPERED),
        (dies_before_accepting, Reason.CLOSED),
        (refuses_at_the_end, Reason.NOT_FINITE),
    ],
)
async def test_a_bad_partner_costs_this_exchange_and_nothing_else(identities, attack, reason):
    low, high = identities
    near, far = streams(low, high)
    villain = Villain(far, high, low.peer_id)
    trainer = FakeTrainer(b"a" * SIZE)

    async def misbehave() -> None:
        await attack(villain, await villain.agree())

    task = asyncio.create_task(misbehave())
    proposer = Proposer(party(low), Dialler(near))
    agreement = await propose(proposer, identities, FakeDesk(trainer))
    with pytest.raises(PeerError) as caught:
        await meet(trainer, agreement, 10)
    await proposer.done(high.peer_id, healthy=False)
    far.abort()
    await asyncio.gather(task, return_exceptions=True)
    assert caught.value.reason == reason
    assert not any(entry.startswith("merge") for entry in trainer.log)
    assert trainer.log[-1] == "drop"
    assert near.closed
