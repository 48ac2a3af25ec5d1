"""The handshake and the frames of a sealed session, attacked byte by byte."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from hypothesis import given
from hypothesis import strategies as st

from xpeer.errors import PeerError, Reason
from xpeer.identity import Domain, Identity, PeerId
from xpeer.network.membership.keyring import KeyRing
from xpeer.wire import frames
from xpeer.wire.aead import NONCE_BYTES, TAG_BYTES, Aead, Cipher, ForgedError, supported
from xpeer.wire.frames import (
    FRAME_BYTES,
    HEADER,
    MAX_SEALED_BYTES,
    Kind,
    Opener,
    Sealer,
    parse_header,
)
from xpeer.wire.session import Credentials, Handshake, Hello, Session, SignedHello

CIPHERS: tuple[Cipher, ...] = ("aes-256-gcm", "chacha20-poly1305")
SWARM, KEY, MODEL = "ab" * 32, b"k" * 32, b"m" * 32


def side(me: Identity, partner: PeerId, *, initiator: bool, **changed) -> Handshake:
    how: dict[str, Any] = {"purpose": "exchange"}
    how.update({name: changed.pop(name) for name in ("purpose", "ciphers") if name in changed})
    facts = {"swarm_id": SWARM, "keys": KeyRing(KEY), "manifest_hash": MODEL, "serial": 1}
    own = Credentials(me, **{**facts, **changed})
    return Handshake(own, partner, initiator=initiator, **how)


@pytest.fixture
def pair() -> tuple[Identity, Identity]:
    return Identity.generate(), Identity.generate()


def established(pair, *, initiator=None, **responder) -> tuple[Session, Session]:
    low, high = pair
    first = side(low, high.peer_id, initiator=True, **(initiator or {}))
    second = side(high, low.peer_id, initiator=False, **responder)
    second.receive(first.hello())
    first.receive(second.hello())
    return first.session(), second.session()


def seal(session: Session, plaintext: bytes, kind: Kind = Kind.BULK) -> bytes:
    return session.sealer.seal(kind, plaintext)


def opened(session: Session, frame: bytes) -> bytes:
    header, sealed = frame[: HEADER.size], frame[HEADER.size :]
    _, size = parse_header(header)
    assert size == len(sealed)
    return session.opener.open(header, sealed)


def test_frames_arrive_in_order_both_ways(pair):
    a, b = established(pair)
    frames = [seal(a, bytes([i]) * 1000) for i in range(5)]
    assert [opened(b, f) for f in frames] == [bytes([i]) * 1000 for i in range(5)]
    assert opened(a, seal(b, b"back")) == b"back"


@given(
    st.lists(st.tuples(st.sampled_from(Kind), st.binary(max_size=3000)), max_size=8),
    st.sampled_from(CIPHERS),
)
def test_what_is_sealed_opens_to_the_same(frames, cipher):
    sealer, opener = Sealer(b"a" * 32, cipher), Opener(b"a" * 32, cipher)
    buffer, out = memoryview(bytearray(MAX_SEALED_BYTES)), bytearray(3000)
    for number, (kind, plaintext) in enumerate(frames):
        count = sealer.seal_into(kind, plaintext, buffer)
        header, sealed = bytes(buffer[: HEADER.size]), buffer[HEADER.size : count]
        assert parse_header(header) == (kind, len(sealed))
        if any(kind is Kind.END for kind, _ in frames[:number]):
            with pytest.raises(PeerError, match=Reason.TAMPERED):
                opener.open(header, sealed)
            return
        opener.open_into(header, sealed, memoryview(out)[: len(plaintext)])
        assert out[: len(plaintext)] == plaintext
        assert opener.ended == (kind is Kind.END)


@given(st.binary(max_size=200), st.integers(min_value=0), st.sampled_from(CIPHERS))
def test_no_flipped_bit_of_a_frame_opens(plaintext, position, cipher):
    sealer, opener = Sealer(b"a" * 32, cipher), Opener(b"a" * 32, cipher)
    frame = bytearray(sealer.seal(Kind.BULK, plaintext))
    position %= 8 * len(frame)
    frame[position // 8] ^= 1 << position % 8
    with pytest.raises(PeerError, match=Reason.TAMPERED):
        opener.open(bytes(frame[: HEADER.size]), frame[HEADER.size :])
    frame[position // 8] ^= 1 << position % 8
    assert opener.open(bytes(frame[: HEADER.size]), frame[HEADER.size :]) == plaintext


def test_frames_are_plain_aead_with_a_counter():
    """Against the library alone, so that another implementation can follow the module's words."""
    sealer = Sealer(b"a" * 32, "aes-256-gcm")
    sealer.seal(Kind.MESSAGE, b"first")
    frame = sealer.seal(Kind.END, b"second")
    header = (len(b"second") + TAG_BYTES).to_bytes(4, "big") + b"\x02"
    sealed = AESGCM(b"a" * 32).encrypt((1).to_bytes(12, "big"), b"second", header)
    assert frame == header + sealed


def test_a_frame_of_one_direction_does_not_open_in_the_other(pair):
    a, b = established(pair)
    frame = seal(a, b"x")
    with pytest.raises(PeerError, match=Reason.TAMPERED):
        opened(a, frame)
    assert opened(b, frame) == b"x"


def test_the_end_frame_ends_the_session(pair):
    a, b = established(pair)
    opened(b, seal(a, b"", Kind.END))
    assert b.opener.ended
    with pytest.raises(PeerError, match=Reason.TAMPERED):
        opened(b, seal(a, b"more"))


def test_replayed_reordered_and_dropped_frames_do_not_open(pair):
    a, b = established(pair)
    first, second, third = (seal(a, x) for x in (b"1", b"2", b"3"))
    assert opened(b, first) == b"1"
    for wrong in (first, third):
        with pytest.raises(PeerError, match=Reason.TAMPERED):
            opened(b, wrong)
    assert opened(b, second) == b"2"


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (HEADER.pack(FRAME_BYTES + TAG_BYTES + 1, Kind.BULK), Reason.OVERSIZE),
        (HEADER.pack(1 << 31, Kind.MESSAGE), Reason.OVERSIZE),
        (HEADER.pack(TAG_BYTES - 1, Kind.BULK), Reason.MALFORMED),
        (HEADER.pack(100, 4), Reason.MALFORMED),
    ],
)
def test_a_header_out_of_bounds_is_refused(header, reason):
    with pytest.raises(PeerError, match=reason):
        parse_header(header)


def test_a_key_is_not_used_for_ever(pair, monkeypatch):
    a, b = established(pair)
    opened(b, seal(a, b"last"))
    monkeypatch.setattr(frames, "MAX_FRAMES", 1)
    frame = Sealer(b"a" * 32, a.cipher).seal(Kind.BULK, b"x")
    with pytest.raises(PeerError, match=Reason.CLOSED):
        seal(a, b"one more")
    with pytest.raises(PeerError, match=Reason.CLOSED):
        opened(b, frame)


def test_a_child_session_has_keys_of_its_own(pair):
    a, b = established(pair)
    one, other = a.child(b"1"), b.child(b"1")
    assert opened(other, seal(one, b"forth")) == b"forth"
    assert opened(one, seal(other, b"back")) == b"back"
    for wrong in (b, b.child(b"2")):
        with pytest.raises(PeerError, match=Reason.TAMPERED):
            opened(wrong, seal(one, b"x"))


@pytest.mark.parametrize(
    ("low", "high", "chosen"),
    [
        (CIPHERS, CIPHERS, "aes-256-gcm"),
        (CIPHERS, CIPHERS[::-1], "aes-256-gcm"),
        (CIPHERS[::-1], CIPHERS, "chacha20-poly1305"),
        (CIPHERS, CIPHERS[1:], "chacha20-poly1305"),
        (CIPHERS[1:], CIPHERS, "chacha20-poly1305"),
    ],
)
def test_the_first_cipher_of_the_initiator_that_both_have_is_taken(pair, low, high, chosen):
    a, b = established(pair, initiator={"ciphers": low}, ciphers=high)
    assert a.cipher == b.cipher == chosen
    assert opened(b, seal(a, b"x")) == b"x"


def test_no_cipher_in_common_is_no_session(pair):
    low, high = pair
    first = side(low, high.peer_id, initiator=True, ciphers=("rot13",))
    second = side(high, low.peer_id, initiator=False)
    second.receive(first.hello())
    second.hello()
    with pytest.raises(PeerError, match="no cipher"):
        second.session()


def test_this_machine_offers_what_every_machine_has():
    assert supported()[-1] == "chacha20-poly1305"


REFERENCES: dict[str, type[AESGCM] | type[ChaCha20Poly1305]] = {
    "aes-256-gcm": AESGCM,
    "chacha20-poly1305": ChaCha20Poly1305,
}


@pytest.mark.parametrize("cipher", supported())
@given(
    plaintext=st.binary(max_size=300),
    data=st.binary(max_size=20),
    key=st.binary(min_size=32, max_size=32),
)
def test_aeads_are_those_of_another_library(cipher, plaintext, data, key):
    """OpenSSL's, on the same key, nonce and associated data, both ways."""
    nonce, out = b"n" * NONCE_BYTES, bytearray(len(plaintext) + TAG_BYTES)
    Aead(cipher, key).seal_into(nonce, plaintext, data, memoryview(out))
    assert out == REFERENCES[cipher](key).encrypt(nonce, plaintext, data)
    opened = bytearray(len(plaintext))
    Aead(cipher, key).open_into(nonce, memoryview(out), data, opened)
    assert opened == plaintext
    out[-1] ^= 1
    with pytest.raises(ForgedError):
        Aead(cipher, key).open_into(nonce, out, data, opened)


@pytest.mark.parametrize("cipher", supported())
def test_buffers_of_the_wrong_size_are_refused_before_the_library_sees_them(cipher):
    aead, nonce = Aead(cipher, bytes(32)), bytes(NONCE_BYTES)
    with pytest.raises(ValueError, match="wrong size"):
        aead.seal_into(nonce, b"four", b"", memoryview(bytearray(4 + TAG_BYTES - 1)))
    with pytest.raises(ValueError, match="wrong size"):
        aead.seal_into(nonce[:-1], b"four", b"", memoryview(bytearray(4 + TAG_BYTES)))
    with pytest.raises(ValueError, match="wrong size"):
        aead.open_into(nonce, bytes(4 + TAG_BYTES), b"", bytearray(5))
    with pytest.raises(ForgedError):
        aead.open_into(nonce, bytes(TAG_BYTES - 1), b"", bytearray(0))
    with pytest.raises(ValueError, match="32 bytes"):
        Aead(cipher, bytes(16))


def test_without_the_swarm_key_no_frame_opens(pair):
    a, b = established(pair, keys=KeyRing(b"x" * 32))
    with pytest.raises(PeerError, match=Reason.TAMPERED):
        opened(b, seal(a, b"payload"))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"swarm_id": "cd" * 32}, Reason.WRONG_SWARM),
        ({"manifest_hash": b"n" * 32}, Reason.WRONG_MODEL),
        ({"purpose": "state"}, Reason.MALFORMED),
    ],
)
def test_a_hello_about_something_else_is_refused(pair, changed, reason):
    low, high = pair
    hello = side(low, high.peer_id, initiator=True, **changed).hello()
    with pytest.raises(PeerError, match=reason):
        side(high, low.peer_id, initiator=False).receive(hello)


def test_a_hello_of_another_version_is_refused(pair):
    low, high = pair
    ours = side(low, high.peer_id, initiator=True).hello()
    hello = msgspec.msgpack.decode(msgspec.msgpack.decode(ours, type=SignedHello).body, type=Hello)
    body = msgspec.msgpack.encode(msgspec.structs.replace(hello, version=99))
    signed = SignedHello(body, low.sign(Domain.HELLO, body))
    with pytest.raises(PeerError, match=Reason.WRONG_VERSION):
        side(high, low.peer_id, initiator=False).receive(msgspec.msgpack.encode(signed))


def test_a_hello_for_or_of_somebody_else_is_refused(pair):
    low, high = pair
    other = Identity.generate()
    for_other = side(low, other.peer_id, initiator=True).hello()
    of_other = side(other, high.peer_id, initiator=True).hello()
    for hello in (for_other, of_other):
        with pytest.raises(PeerError, match=Reason.TAMPERED):
            side(high, low.peer_id, initiator=False).receive(hello)


def test_a_recorded_answer_does_not_fit_a_new_hello(pair):
    low, high = pair
    first = side(low, high.peer_id, initiator=True)
    responder = side(high, low.peer_id, initiator=False)
    responder.receive(first.hello())
    recorded = responder.hello()
    fresh = side(low, high.peer_id, initiator=True)
    fresh.hello()
    with pytest.raises(PeerError, match=Reason.REPLAYED):
        fresh.receive(recorded)


def test_a_recorded_hello_gives_the_replayer_no_session(pair):
    low, high = pair
    recorded = side(low, high.peer_id, initiator=True).hello()
    responder = side(high, low.peer_id, initiator=False)
    responder.receive(recorded)
    responder.hello()
    session = responder.session()
    replayer = Session(b"g" * 32, b"g" * 32, session.cipher)
    with pytest.raises(PeerError, match=Reason.TAMPERED):
        opened(session, seal(replayer, b"x"))


def test_a_degenerate_key_is_refused(pair):
    low, high = pair
    body = msgspec.msgpack.encode(
        Hello(
            1, "exchange", SWARM, MODEL, low.peer_id, high.peer_id, 1, b"\0" * 32, ["aes-256-gcm"]
        )
    )
    responder = side(high, low.peer_id, initiator=False)
    responder.receive(msgspec.msgpack.encode(SignedHello(body, low.sign(Domain.HELLO, body))))
    responder.hello()
    with pytest.raises(PeerError, match=Reason.TAMPERED):
        responder.session()


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xc1" * 40, b"x" * 2000])
def test_garbage_instead_of_a_hello_is_a_peer_error(pair, data):
    low, high = pair
    with pytest.raises(PeerError):
        side(high, low.peer_id, initiator=False).receive(data)


def test_every_flipped_bit_of_a_hello_is_noticed(pair):
    low, high = pair
    hello = side(low, high.peer_id, initiator=True).hello()
    for bit in range(0, len(hello) * 8, 7):
        wrong = bytearray(hello)
        wrong[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PeerError):
            side(high, low.peer_id, initiator=False).receive(bytes(wrong))


def test_a_frame_over_the_limit_is_our_bug(pair):
    a, _ = established(pair)
    with pytest.raises(ValueError, match="at most"):
        seal(a, b"x" * (FRAME_BYTES + 1))


@pytest.mark.parametrize("cipher", supported())
def test_an_error_holds_no_buffer(cipher: Cipher) -> None:
    """CPython 3.11 crashes once its garbage collector finds such a buffer with its memoryview."""
    key, size = Aead(cipher, bytes(32)), 100
    sealed, out = memoryview(bytearray(size + TAG_BYTES)), memoryview(bytearray(size))
    with pytest.raises(ForgedError) as forged:
        key.open_into(bytes(12), sealed, b"", out)
    assert forged.tb is not None  # the frames are alive
    for view in (sealed, out):
        view.release()  # BufferError while C may write there
