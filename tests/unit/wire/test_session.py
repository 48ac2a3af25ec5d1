"""The handshake and the frames of a sealed session, attacked byte by byte."""

from __future__ import annotations

import msgspec
import pytest

from xpeer.errors import PeerError, Reason
from xpeer.identity import Domain, Identity, PeerId
from xpeer.wire.session import FRAME_BYTES, Handshake, Hello, Session, SignedHello

SWARM, KEY, MODEL = "ab" * 32, b"k" * 32, b"m" * 32


def side(me: Identity, partner: PeerId, *, initiator: bool, **changed) -> Handshake:
    facts = {
        "swarm_id": SWARM, "swarm_key": KEY, "manifest_hash": MODEL, "serial": 1,
        "purpose": "exchange",
    }  # fmt: skip
    return Handshake(me, partner, initiator=initiator, **{**facts, **changed})


@pytest.fixture
def pair() -> tuple[Identity, Identity]:
    return Identity.generate(), Identity.generate()


def established(pair, **responder) -> tuple[Session, Session]:
    low, high = pair
    first = side(low, high.peer_id, initiator=True)
    second = side(high, low.peer_id, initiator=False, **responder)
    second.receive(first.hello())
    first.receive(second.hello())
    a, b = first.session(), second.session()
    a.start(b.header())
    b.start(a.header())
    return a, b


def test_frames_arrive_in_order_both_ways(pair):
    a, b = established(pair)
    frames = [a.seal(bytes([i]) * 1000) for i in range(5)]
    assert [b.open(f) for f in frames] == [bytes([i]) * 1000 for i in range(5)]
    assert a.open(b.seal(b"back")) == b"back"


def test_final_frame_ends_the_session(pair):
    a, b = established(pair)
    b.open(a.seal(b"", final=True))
    assert b.ended
    with pytest.raises(PeerError, match=Reason.TAMPERED):
        b.open(a.seal(b"more"))


def test_replayed_reordered_and_dropped_frames_do_not_open(pair):
    a, b = established(pair)
    first, second, third = (a.seal(x) for x in (b"1", b"2", b"3"))
    assert b.open(first) == b"1"
    for wrong in (first, third):
        with pytest.raises(PeerError, match=Reason.TAMPERED):
            b.open(wrong)
    assert b.open(second) == b"2"


@pytest.mark.parametrize("position", [0, 5, -1])
def test_an_altered_frame_does_not_open(pair, position):
    a, b = established(pair)
    frame = bytearray(a.seal(b"payload"))
    frame[position] ^= 1
    with pytest.raises(PeerError, match=Reason.TAMPERED):
        b.open(bytes(frame))


def test_without_the_swarm_key_no_frame_opens(pair):
    a, b = established(pair, swarm_key=b"x" * 32)
    with pytest.raises(PeerError, match=Reason.TAMPERED):
        b.open(a.seal(b"payload"))


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
    replayer = Session(b"g" * 32, b"g" * 32)
    session.start(replayer.header())
    with pytest.raises(PeerError, match=Reason.TAMPERED):
        session.open(replayer.seal(b"x"))


def test_a_degenerate_key_is_refused(pair):
    low, high = pair
    body = msgspec.msgpack.encode(
        Hello(1, "exchange", SWARM, MODEL, low.peer_id, high.peer_id, 1, b"\0" * 32)
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
        a.seal(b"x" * (FRAME_BYTES + 1))
