"""Admission: who is handed the manifest and the swarm key, and what a joiner refuses to take."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from tests.swarm.conftest import Founder, Launch
from xpeer.errors import NotAuthorisedError, PeerError, Reason
from xpeer.identity import Identity, blake2b
from xpeer.manifest import End, Manifest, PublicText
from xpeer.manifest.model import Model
from xpeer.manifest.signed import Genesis, SignedManifest, swarm_key_digest
from xpeer.network import admission
from xpeer.network.membership.keyring import KeyRing

KEY = b"k" * 32


def manifest_of(admin: Identity) -> SignedManifest:
    text = PublicText(blake2b(b"public").hex(), "public")
    manifest = Manifest(
        name="demo", created_unix_s=1, model=Model({"model_type": "llama"}, 1, "00"),
        public_text=text, end=End(steps=1), swarm_key_digest=swarm_key_digest(KEY),
    )  # fmt: skip
    return SignedManifest.sign(manifest, admin)


@dataclass
class RealFounder(Founder):
    """With a manifest that can be handed out."""

    signed: SignedManifest = field(init=False)

    def __post_init__(self) -> None:
        self.signed = manifest_of(self.admin)

    @property
    def genesis(self) -> Genesis:
        return self.signed.genesis


@pytest.fixture
def founder() -> Founder:
    return RealFounder()


async def test_a_member_admits_a_peer_with_a_right_to_join(founder: RealFounder, launch: Launch):
    member = await launch()
    await admission.serve(member, founder.signed, KeyRing(KEY))
    joiner = await launch(seeds=member.addresses)
    signed, key = await admission.request(
        joiner, joiner._identity, founder.swarm_id, member.peer_id
    )
    assert (signed, key) == (founder.signed, KEY)


async def test_a_wrong_swarm_key_is_refused(founder: RealFounder, launch: Launch):
    liar = await launch()
    await admission.serve(liar, founder.signed, KeyRing(b"x" * 32))
    joiner = await launch(seeds=liar.addresses)
    with pytest.raises(PeerError, match=Reason.TAMPERED):
        await admission.request(joiner, joiner._identity, founder.swarm_id, liar.peer_id)


async def test_another_swarms_manifest_is_refused(founder: RealFounder, launch: Launch):
    liar = await launch()
    await admission.serve(liar, manifest_of(Identity.generate()), KeyRing(KEY))
    joiner = await launch(seeds=liar.addresses)
    with pytest.raises(PeerError, match=Reason.MALFORMED):
        await admission.request(joiner, joiner._identity, founder.swarm_id, liar.peer_id)


async def test_a_right_that_has_expired_admits_nobody(founder: RealFounder, launch: Launch):
    member = await launch()
    await admission.serve(member, founder.signed, KeyRing(KEY))
    late = Identity.generate()
    joiner = await launch(seeds=member.addresses, identity=late)
    expired = founder.credential(late, ttl_s=-1.0)
    joiner.membership.own = expired
    member.membership.admit(late.peer_id, expired.to_bytes())
    with pytest.raises((NotAuthorisedError, PeerError)):
        await admission.request(joiner, late, founder.swarm_id, member.peer_id)
