"""Keys: published vectors, files nobody else may read, signatures good for one purpose only."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import base58
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import SigningKey

from xpeer import identity
from xpeer.errors import ConfigError, NotAuthorisedError
from xpeer.identity import Domain, Identity

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "ed25519.json").read_text())
LIBP2P = VECTORS["libp2p"]


@pytest.mark.parametrize("case", VECTORS["rfc8032"]["cases"])
def test_rfc_8032(case: dict[str, str]) -> None:
    key = Identity(SigningKey(bytes.fromhex(case["seed"])))
    message, signature = bytes.fromhex(case["message"]), bytes.fromhex(case["signature"])
    assert key.verify_key.hex() == case["public"]
    assert key.sign(b"", message) == signature
    assert identity.verify_with(key.verify_key, b"", message, signature)
    # The domain is part of what is signed, wherever it ends.
    assert identity.verify_with(key.verify_key, message, b"", signature)


def test_libp2p_key_file_and_peer_id() -> None:
    key = Identity.from_libp2p(bytes.fromhex(LIBP2P["private"]))
    assert key.to_libp2p().hex() == LIBP2P["private"]
    assert key.verify_key.hex() == LIBP2P["public"][8:]
    # peer-ids.md: identity multihash (00, length) of the public key's protobuf, in base58btc
    assert base58.b58decode(key.peer_id).hex() == "0024" + LIBP2P["public"]
    assert key.peer_id == LIBP2P["peer_id"]
    assert bytes(identity.public_key_of(key.peer_id)) == key.verify_key


def test_every_peer_id_is_its_public_key() -> None:
    for _ in range(20):
        key = Identity.generate()
        assert key.peer_id.startswith("12D3Koo")
        assert bytes(identity.public_key_of(key.peer_id)) == key.verify_key
        assert identity.peer_id_of(key.verify_key) == key.peer_id


@pytest.mark.parametrize(
    "wrong",
    ["", "12D3Koo", "0OIl", "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", "é", "\0", "1" * 500],
)
def test_what_is_no_ed25519_peer_id(wrong: str) -> None:
    with pytest.raises(ValueError, match="PeerID"):
        identity.public_key_of(wrong)
    assert not identity.verify(wrong, Domain.HELLO, b"m", bytes(64))


def test_a_signature_is_good_for_one_domain_message_and_key() -> None:
    key, other = Identity.generate(), Identity.generate()
    signature = key.sign(Domain.HELLO, b"message")
    assert identity.verify(key.peer_id, Domain.HELLO, b"message", signature)
    assert not identity.verify(key.peer_id, Domain.TREE, b"message", signature)
    assert not identity.verify(key.peer_id, Domain.HELLO, b"messagf", signature)
    assert not identity.verify(other.peer_id, Domain.HELLO, b"message", signature)
    for bit in range(0, 512, 7):
        flipped = bytearray(signature)
        flipped[bit // 8] ^= 1 << bit % 8
        assert not identity.verify(key.peer_id, Domain.HELLO, b"message", bytes(flipped))
    for wrong in (b"", signature[:-1], signature + b"\0"):
        assert not identity.verify(key.peer_id, Domain.HELLO, b"message", wrong)
    assert not identity.verify_with(b"short", Domain.HELLO, b"message", signature)


def test_domains_are_prefix_free() -> None:
    domains = [v for k, v in vars(Domain).items() if k.isupper()]
    assert len(domains) >= 8
    for one in domains:
        assert one.endswith(b"\0")
        assert [d for d in domains if d.startswith(one)] == [one]


@given(st.binary(max_size=2000))
def test_sealing_round_trip(plaintext: bytes) -> None:
    key = Identity(SigningKey(bytes(range(32))))
    sealed = identity.seal_to(key.peer_id, plaintext)
    assert len(sealed) == len(plaintext) + 48  # libsodium: crypto_box_SEALBYTES
    assert key.open(sealed) == plaintext


def test_a_sealed_message_is_for_one_peer_and_unaltered() -> None:
    key = Identity.generate()
    sealed = identity.seal_to(key.peer_id, b"swarm key")
    with pytest.raises(NotAuthorisedError):
        Identity.generate().open(sealed)
    for i in range(len(sealed)):
        altered = bytearray(sealed)
        altered[i] ^= 1
        with pytest.raises(NotAuthorisedError):
            key.open(bytes(altered))
    for cut in (0, 1, 31, 47, len(sealed) - 1):
        with pytest.raises(NotAuthorisedError):
            key.open(sealed[:cut])


def test_repr_shows_no_secret() -> None:
    key = Identity.generate()
    assert bytes(key.signing_key).hex() not in repr(key)
    assert repr(key) == f"Identity({key.peer_id})"


def test_key_file(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    key = Identity.generate()
    old = os.umask(0)
    try:
        key.save(path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o400
    assert Identity.load(path).peer_id == key.peer_id
    with pytest.raises(FileExistsError):
        Identity.generate().save(path)
    assert Identity.load(path).peer_id == key.peer_id


@pytest.mark.parametrize("mode", [0o440, 0o404, 0o640, 0o644, 0o420, 0o410, 0o401])
def test_a_key_that_others_can_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity.key"
    Identity.generate().save(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:04o}") as e:
        Identity.load(path)
    assert "chmod 0400" in e.value.remedy


def test_malformed_key_files(tmp_path: Path) -> None:
    good = Identity.generate().to_libp2p()
    other = Identity.generate().to_libp2p()
    cases = [b"", good[:-1], good + b"\0", good[:36] + other[36:], b"\x08\x02" + good[2:]]
    for n, data in enumerate(cases):
        path = tmp_path / str(n)
        identity.write_secret(path, data)
        with pytest.raises(ConfigError, match="identity key"):
            Identity.load(path)
    with pytest.raises(ConfigError, match="does not exist"):
        Identity.load(tmp_path / "none")
    with pytest.raises(ConfigError, match="can't be read"):
        Identity.load(tmp_path)


def test_no_two_lists_of_parts_hash_alike() -> None:
    assert identity.blake2b(b"ab", b"c") != identity.blake2b(b"a", b"bc")
    assert identity.blake2b(b"a") != identity.blake2b(b"a", b"")
    assert identity.blake2b(memoryview(b"ab")) == identity.blake2b(b"ab")
    assert len(identity.blake2b(b"x", size=16)) == 16
