"""Tokens: whoever alters, borrows or comes late with one is told so, and nothing else happens."""

from __future__ import annotations

import base64
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xpeer.errors import ConfigError, NotAuthorisedError
from xpeer.identity import Domain, Identity, PeerId
from xpeer.manifest.signed import Genesis
from xpeer.needs import Needs
from xpeer.network.membership import invites
from xpeer.network.membership.certificates import Membership, Role
from xpeer.network.membership.invites import Token, create_token
from xpeer.network.multiaddress import check_peer

NOW = 1_800_000_000.0
ADMIN = Identity.generate()
GENESIS = Genesis(ADMIN.verify_key, bytes(32))
JOINER = Identity.generate()
SEED = f"/ip4/192.0.2.1/tcp/4001/p2p/{Identity.generate().peer_id}"


def token(
    for_peer: PeerId | None = None, role: Role = "member", seeds: list[str] | None = None
) -> Token:
    return create_token(
        ADMIN,
        GENESIS,
        name="demo",
        seeds=[SEED] if seeds is None else seeds,
        for_peer=for_peer,
        role=role,
        ttl_s=3600,
        now_unix_s=NOW,
    )


def test_round_trip() -> None:
    made = token(JOINER.peer_id)
    text = str(made)
    assert text.startswith("xpeer1.")
    assert Token.parse(f"  {text}\n") == made
    assert made.swarm_id == GENESIS.swarm_id
    assert made.seeds == [SEED]
    assert len(text) < 1500


def test_a_token_for_one_peer() -> None:
    made = token(JOINER.peer_id, "observer")
    credential = made.credential_for(JOINER, NOW + 1800)
    certificate = Membership(GENESIS.swarm_id, None, lambda: NOW).admit(
        JOINER.peer_id, credential.to_bytes()
    )
    assert certificate.role == "observer"
    with pytest.raises(NotAuthorisedError, match=f"is for {JOINER.peer_id}"):
        made.credential_for(Identity.generate(), NOW)
    assert made.bearer == b""


def test_a_bearer_token_takes_whoever_holds_it() -> None:
    made = token()
    gate = Membership(GENESIS.swarm_id, None, lambda: NOW)
    for joiner in (JOINER, Identity.generate()):  # no use limit, as documented
        gate.admit(joiner.peer_id, made.credential_for(joiner, NOW).to_bytes())
    # The credential names the joiner and shows neither bearer key nor token.
    assert made.bearer not in made.credential_for(JOINER, NOW).to_bytes()


def test_a_bearer_key_of_another_token_is_of_no_use() -> None:
    mixed = msgspec.structs.replace(token(), bearer=token().bearer)
    with pytest.raises(NotAuthorisedError, match="bearer key did not sign"):
        mixed.credential_for(JOINER, NOW)
    with pytest.raises(NotAuthorisedError, match="damaged"):
        msgspec.structs.replace(token(), bearer=b"short").credential_for(JOINER, NOW)


def test_time() -> None:
    made = token(JOINER.peer_id)
    made.credential_for(JOINER, NOW + 3599)
    with pytest.raises(NotAuthorisedError, match=r"expired 2\.0 hours ago"):
        made.credential_for(JOINER, NOW + 3 * 3600)
    with pytest.raises(NotAuthorisedError, match="expired"):
        made.credential_for(JOINER, NOW + 3600)
    with pytest.raises(NotAuthorisedError, match="not valid yet"):
        made.credential_for(JOINER, NOW - 3600)


@pytest.mark.parametrize("for_peer", [JOINER.peer_id, None], ids=["for a peer", "bearer"])
def test_every_flipped_bit_is_refused(for_peer: PeerId | None) -> None:
    data = msgspec.msgpack.encode(token(for_peer))
    for position in range(len(data)):
        for bit in range(8):
            altered = bytearray(data)
            altered[position] ^= 1 << bit
            with pytest.raises(NotAuthorisedError):
                Token.parse(invites.PREFIX + base64.urlsafe_b64encode(altered).decode())


@pytest.mark.parametrize("for_peer", [JOINER.peer_id, None], ids=["for a peer", "bearer"])
def test_every_altered_character_is_refused(for_peer: PeerId | None) -> None:
    text = str(token(for_peer))
    for position, character in enumerate(text):
        # B differs from A in bits that the last character of base64 may drop.
        for other in "AB_=é\n":
            if other != character:
                with pytest.raises(NotAuthorisedError):
                    Token.parse(text[:position] + other + text[position + 1 :])
        with pytest.raises(NotAuthorisedError):
            Token.parse(text[:position])


def test_every_part_is_sealed() -> None:
    good, other = token(), token()
    changes: list[dict[str, Any]] = [
        {"name": "other"},
        {"seeds": []},
        {"seeds": [SEED.replace("192.0.2.1", "192.0.2.2")]},
        {"bearer": other.bearer},
        {"body": other.body},
        {"signature": other.signature},
        {"seal": other.seal},
        {"seal": b""},
        {"seal": ADMIN.sign(Domain.CERTIFICATE, good.body)},
    ]
    for change in changes:
        with pytest.raises(NotAuthorisedError, match="damaged"):
            Token.parse(str(msgspec.structs.replace(good, **change)))


@pytest.mark.parametrize(
    "change",
    [
        {"name": "good\x1b[2K\rverified"},
        {"seeds": [SEED + "\x1b[8m"]},
        {"needs": Needs(tokenizer="\x1b]0;x\x07" + "a" * 40)},
        {"needs": Needs(base_model="\x1b[2J\r" + "b" * 30)},
        {"needs": Needs(tokenizer="a" * 64, source="m\n")},
    ],
)
def test_a_tokens_words_cannot_steer_a_terminal(change: dict[str, Any]) -> None:
    plain = msgspec.structs.replace(token(), **change)
    sealed = msgspec.structs.replace(plain, seal=ADMIN.sign(Domain.TOKEN, plain._statement()))
    with pytest.raises(NotAuthorisedError, match="control characters") as error:
        Token.parse(str(sealed))
    assert "\x1b" not in str(error.value)


def test_a_forger_can_only_make_tokens_of_its_own_swarm() -> None:
    forger = Identity.generate()

    def forge(genesis: Genesis) -> Token:
        return create_token(
            forger,
            genesis,
            name="demo",
            seeds=[],
            for_peer=None,
            role="admin",
            ttl_s=60,
            now_unix_s=NOW,
        )

    with pytest.raises(ConfigError):  # nobody could read it: its seal is not the admin's
        forge(GENESIS)
    own = forge(Genesis(forger.verify_key, bytes(32)))
    assert own.swarm_id != GENESIS.swarm_id
    with pytest.raises(NotAuthorisedError, match="is of swarm"):
        Membership(GENESIS.swarm_id, None, lambda: NOW).admit(
            JOINER.peer_id, own.credential_for(JOINER, NOW).to_bytes()
        )


@given(st.one_of(st.text(), st.text().map(lambda t: "xpeer1." + t)))
@settings(max_examples=200)
def test_any_text_is_refused(text: str) -> None:
    with pytest.raises(NotAuthorisedError) as e:
        Token.parse(text)
    assert "xpeer invite create" in e.value.remedy


@given(st.binary(max_size=400))
@settings(max_examples=200)
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(NotAuthorisedError):
        Token.parse(invites.PREFIX + base64.urlsafe_b64encode(data).decode().rstrip("="))


def test_a_token_that_could_not_be_read_is_never_made() -> None:
    with pytest.raises(ConfigError, match="17 seeds"):
        token(seeds=[SEED] * 17)
    with pytest.raises(ConfigError, match="16 seeds"):
        token(seeds=["/dns4/" + "x" * 250 + SEED] * 16)
    assert len(Token.parse(str(token(seeds=[SEED] * 16))).seeds) == 16


def test_repr_shows_no_secret() -> None:
    made = token()
    assert made.bearer.hex() not in repr(made)
    assert repr(made.bearer) not in repr(made)
    assert str(made) not in repr(made)


@pytest.mark.parametrize(
    "address",
    ["", "/ip4/1.2.3.4/tcp/1", "/p2p/", SEED[1:], SEED[:-1], SEED + "/tcp/1", "/p2p/12D3Koo"],
    ids=["empty", "no peer", "no id", "no slash", "cut", "longer", "short id"],
)
def test_addresses_without_a_peer_id(address: str) -> None:
    with pytest.raises(ConfigError, match="--seed: "):
        check_peer("--seed", address)


def test_an_address_with_a_peer_id() -> None:
    assert check_peer("--seed", SEED) == SEED
