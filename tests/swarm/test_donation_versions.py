"""Joiners and donors of this version and the last one, over real sidecars."""

from __future__ import annotations

import pytest

from tests.swarm.conftest import Founder, Launch
from xpeer.errors import PeerError, Reason
from xpeer.identity import Identity
from xpeer.manifest import StateForm
from xpeer.network import donation, giving
from xpeer.network.agreement import Party
from xpeer.network.membership.keyring import KeyRing
from xpeer.network.pieces import Shape
from xpeer.network.rates import Rates
from xpeer.network.shelf import Shelf
from xpeer.network.swarm import Swarm
from xpeer.network.turns import Turns
from xpeer.network.uplink import Uplink
from xpeer.update import ModelState, StateCopy

PAYLOAD = bytes(range(256)) * 6000  # two pieces
FORM = StateForm("float32", len(PAYLOAD) // 4)


class Source:
    step = 7

    async def export_state(self) -> StateCopy:
        return StateCopy(ModelState(PAYLOAD, 7, 2.0), 0.0)


def party(swarm: Swarm, founder: Founder) -> Party:
    identity: Identity = swarm._identity
    keys, serial = KeyRing(b"k" * 32), 1
    return Party(identity, founder.swarm_id, keys, b"m" * 32, serial, swarm.membership)


async def test_pieces_if_the_donor_knows_them_else_the_whole(
    founder: Founder, launch: Launch
) -> None:
    donor = await launch()
    joiner = await launch(seeds=donor.addresses)
    us, them = party(joiner, founder), party(donor, founder)
    turns, shelf, shape, trainer = Turns(4, Rates()), Shelf(1), Shape(FORM), Source()

    whole = donation.serving(them, lambda: trainer, FORM, turns, shelf, Uplink(0))
    await donor.serve_links(donation.PROTOCOL, whole, "observer")
    with pytest.raises(PeerError) as error:  # as of the last version
        await giving.ask(us, joiner, donor.peer_id, shape, Rates())
    assert error.value.reason == Reason.UNREACHABLE
    offered = await donation.ask(us, joiner, donor.peer_id, FORM.num_params)
    assert bytes((await offered.take()).payload) == PAYLOAD

    rested = Turns(4, Rates())  # else the joiner would have to pause before it may ask again
    in_pieces = giving.serving(them, lambda: trainer, shape, rested, shelf, Uplink(0))
    await donor.serve_links(giving.PROTOCOL, in_pieces, "observer")
    giver = await giving.ask(us, joiner, donor.peer_id, shape, Rates())
    came = b"".join([bytes(data) async for _, data in giver.pieces(0, shape.num_pieces)])
    assert (came, giver.step, giver.loss_public) == (PAYLOAD, 7, 2.0)
    await giver.close()
