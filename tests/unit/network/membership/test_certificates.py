"""Certificates: nothing altered, expired, borrowed or of another swarm gets anybody in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.signing import SigningKey

from xpeer.errors import ExitCode, NotAuthorisedError
from xpeer.identity import Domain, Identity
from xpeer.manifest.signed import Genesis
from xpeer.network.membership import certificates
from xpeer.network.membership.certificates import Certificate, Credential, Membership, Role, Scope
from xpeer.network.membership.invites import grant

NOW = 1_800_000_000.0
DAY = 86400
ADMIN = Identity(SigningKey(bytes(range(32))))
GENESIS = Genesis(ADMIN.verify_key, bytes(32))
SWARM = GENESIS.swarm_id
PEER = Identity.generate()
BEARER = Identity.generate()


def credential(
    subject: str | None = None, role: Role = "member", admin: Identity = ADMIN, **changes: Any
) -> Credential:
    made = grant(GENESIS, subject or PEER.peer_id, role, DAY, NOW)
    return Credential.issue(admin, msgspec.structs.replace(made, **changes), PEER.peer_id)


def bearer_credential(peer_id: str) -> Credential:
    made = credential(f"{certificates.BEARER_PREFIX}{BEARER.verify_key.hex()}")
    binding = BEARER.sign(Domain.BEARER, peer_id.encode())
    return Credential(made.body, made.signature, peer_id, binding)


def refused(made: Credential, match: str, now: float = NOW, swarm: str = SWARM) -> None:
    with pytest.raises(NotAuthorisedError, match=match) as e:
        made.verify(swarm, now)
    assert e.value.exit_code == ExitCode.NOT_AUTHORISED
    assert e.value.remedy


def test_a_good_credential() -> None:
    made = Credential.from_bytes(credential().to_bytes())
    certificate = made.verify(SWARM, NOW)
    assert certificate.subject == PEER.peer_id
    assert certificate.role == "member"
    assert made.claimed_swarm() == SWARM
    assert len(made.to_bytes()) < certificates.MAX_CREDENTIAL_BYTES / 2


def test_time() -> None:
    made = credential()
    made.verify(SWARM, NOW - certificates.CLOCK_SKEW_S + 1)
    refused(made, "not valid yet", NOW - certificates.CLOCK_SKEW_S - 2)
    made.verify(SWARM, NOW + 365 * DAY - 1)
    refused(made, "expired", NOW + 365 * DAY)


def test_a_founders_membership_lasts_as_long_as_its_right_to_join() -> None:
    made = grant(GENESIS, PEER.peer_id, "admin", 3650 * DAY, NOW)
    assert made.not_after_unix_s == made.join_before_unix_s


def test_another_swarm() -> None:
    refused(credential(), "is of swarm", swarm="ab" * 32)
    refused(credential(genesis=Genesis(ADMIN.verify_key, bytes([1] * 32))), "is of swarm")


def test_another_admin_key() -> None:
    other = Identity.generate()
    refused(credential(admin=other), "signature is wrong")
    # An attacker's own key in the certificate makes it another swarm's.
    refused(credential(admin=other, genesis=Genesis(other.verify_key, bytes(32))), "is of swarm")


def test_another_peers_certificate() -> None:
    made = credential(Identity.generate().peer_id)
    refused(made, "is for 12D3Koo")


def test_a_signature_for_another_purpose() -> None:
    made = credential()
    wrong = msgspec.structs.replace(made, signature=ADMIN.sign(Domain.MANIFEST, made.body))
    refused(wrong, "signature is wrong")


@pytest.mark.parametrize(
    "change",
    [
        {"role": "admin"},
        {"serial": 1},
        {"not_before_unix_s": 0},
        {"join_before_unix_s": int(NOW) + 10 * DAY},
        {"not_after_unix_s": int(NOW) + 3650 * DAY},
        {"subject": Identity.generate().peer_id},
    ],
)
def test_every_field_is_signed(change: dict[str, Any]) -> None:
    made = credential()
    altered = msgspec.structs.replace(made.verify(SWARM, NOW), **change)
    body = msgspec.msgpack.encode(altered)
    refused(msgspec.structs.replace(made, body=body), "signature is wrong")


@pytest.mark.parametrize(
    "make", [credential, lambda: bearer_credential(PEER.peer_id)], ids=["named", "bearer"]
)
def test_every_flipped_bit_is_refused(make: Callable[[], Credential]) -> None:
    good = make().to_bytes()
    gate = Membership(SWARM, None, lambda: NOW)
    gate.admit(PEER.peer_id, good)
    for position in range(len(good)):
        for bit in range(8):
            altered = bytearray(good)
            altered[position] ^= 1 << bit
            with pytest.raises(NotAuthorisedError):
                gate.admit(PEER.peer_id, bytes(altered))


def test_every_cut_and_every_tail_is_refused() -> None:
    good = credential().to_bytes()
    for end in range(len(good)):
        with pytest.raises(NotAuthorisedError):
            Credential.from_bytes(good[:end]).verify(SWARM, NOW)
    with pytest.raises(NotAuthorisedError, match="malformed"):
        Credential.from_bytes(good + b"\0")
    with pytest.raises(NotAuthorisedError, match="too large"):
        Credential.from_bytes(good + bytes(certificates.MAX_CREDENTIAL_BYTES))


@given(st.binary(max_size=300))
@settings(max_examples=200)
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(NotAuthorisedError):
        Credential.from_bytes(data).verify(SWARM, NOW)
    with pytest.raises(NotAuthorisedError):
        Credential(data, bytes(64), PEER.peer_id).verify(SWARM, NOW)


def test_a_bearer_key_binds_one_peer_id() -> None:
    made = bearer_credential(PEER.peer_id)
    assert made.verify(SWARM, NOW).role == "member"
    thief = Identity.generate().peer_id
    refused(msgspec.structs.replace(made, peer_id=thief), "bearer key did not sign")
    refused(msgspec.structs.replace(made, binding=b""), "bearer key did not sign")
    own = PEER.sign(Domain.BEARER, PEER.peer_id.encode())
    refused(msgspec.structs.replace(made, binding=own), "bearer key did not sign")
    other_purpose = BEARER.sign(Domain.HELLO, PEER.peer_id.encode())
    refused(msgspec.structs.replace(made, binding=other_purpose), "bearer key did not sign")


@pytest.mark.parametrize("key", ["", "zz", "é", "00", "00" * 31, "00" * 33, " " * 64])
def test_a_bearer_certificate_without_a_key(key: str) -> None:
    refused(credential(f"bearer:{key}"), "bearer key did not sign")


def test_the_membership_admits_only_the_presenter() -> None:
    gate = Membership(SWARM, None, lambda: NOW)
    with pytest.raises(NotAuthorisedError, match="another peer's"):
        gate.admit(Identity.generate().peer_id, credential().to_bytes())
    assert gate.certificate_of(PEER.peer_id) is None
    gate.admit(PEER.peer_id, credential().to_bytes())
    assert gate.certificate_of(PEER.peer_id) is not None


@pytest.mark.parametrize(
    ("role", "scopes"),
    [
        ("infrastructure", {"dht"}),
        ("observer", {"dht", "observer"}),
        ("member", {"dht", "observer", "member"}),
        ("admin", {"dht", "observer", "member"}),
    ],
)
def test_roles(role: Role, scopes: set[Scope]) -> None:
    gate = Membership(SWARM, None, lambda: NOW)
    gate.admit(PEER.peer_id, credential(role=role).to_bytes())
    every: list[Scope] = ["dht", "observer", "member"]
    assert {scope for scope in every if gate.allows(PEER.peer_id, scope)} == scopes


def test_an_unknown_role_is_refused() -> None:
    made = credential()
    body = made.body.replace(b"member", b"master")
    with pytest.raises(NotAuthorisedError, match="malformed"):
        Credential(body, ADMIN.sign(Domain.CERTIFICATE, body), PEER.peer_id).verify(SWARM, NOW)


def test_strangers_and_seeds() -> None:
    gate = Membership(SWARM, None, lambda: NOW)
    assert not gate.allows(PEER.peer_id, "dht")
    gate.trust_seed(PEER.peer_id)
    assert gate.allows(PEER.peer_id, "dht")
    assert not gate.allows(PEER.peer_id, "observer")
    assert not gate.allows(PEER.peer_id, "member")


def test_membership_ends_while_connected() -> None:
    now = NOW
    gate = Membership(SWARM, None, lambda: now)
    certificate = gate.admit(PEER.peer_id, credential().to_bytes())
    assert gate.allows(PEER.peer_id, "member")
    assert gate.may_join(certificate)
    now = NOW + DAY
    assert not gate.may_join(certificate)
    assert gate.allows(PEER.peer_id, "member")
    now = NOW + 365 * DAY
    assert not gate.allows(PEER.peer_id, "member")
    assert gate.certificate_of(PEER.peer_id) is None
    with pytest.raises(NotAuthorisedError, match="expired"):
        gate.admit(PEER.peer_id, credential().to_bytes())


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "MAX_REMEMBERED", 3)
    gate = Membership(SWARM, None, lambda: NOW)
    peers = [Identity.generate().peer_id for _ in range(5)]
    for peer in peers:
        gate.admit(peer, bearer_credential(peer).to_bytes())
    assert [gate.allows(peer, "member") for peer in peers] == [False, False, True, True, True]


def test_certificates_are_small_and_stable() -> None:
    """Signed bytes are never re-encoded, so their form may not change between versions."""
    made = Certificate(GENESIS, "s", "member", 1, 2, 3, 4)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(made)) == {
        "genesis": {"admin": ADMIN.verify_key, "manifest_hash": bytes(32)},
        "subject": "s",
        "role": "member",
        "serial": 1,
        "not_before_unix_s": 2,
        "join_before_unix_s": 3,
        "not_after_unix_s": 4,
    }
