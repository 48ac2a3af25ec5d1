"""The overlap benchmark: the wire's rate and delay, shares of a timeline, and its swarm."""

import json
import struct
from dataclasses import asdict

import pytest

from benchmarks.overlap import timeline
from benchmarks.overlap.__main__ import SMALL
from benchmarks.overlap.peers import Peer
from benchmarks.overlap.timeline import Row
from benchmarks.overlap.wire import Direction, on_the_wire

PLAIN = struct.pack("=BBHHHH", 0, 0, 0, 0, 0, 0)


def row(at, step, **spent):
    return Row(**{**dict.fromkeys(Row.__dataclass_fields__, 0), "at": at, "step": step, **spent})


def test_packets_leave_at_the_rate_and_arrive_after_the_delay():
    way = Direction(mbit_per_s=8.0, delay_s=0.05)  # a byte in a microsecond
    for packet in (b"a", b"b"):
        way.take(packet, 1000, now_s=10.0)
    assert way.next_s == pytest.approx(10.051)
    assert not list(way.arrived(10.0505))
    assert list(way.arrived(10.0511)) == [b"a"]
    assert way.next_s == pytest.approx(10.052)
    assert list(way.arrived(11.0)) == [b"b"]
    assert way.next_s == float("inf")


def test_a_full_queue_drops_and_an_unlimited_wire_does_not():
    way = Direction(mbit_per_s=8.0, delay_s=0.0)
    for _ in range(3):
        way.take(b"x", 90_000, now_s=0.0)
    assert (way.num_bytes, way.dropped) == (180_000, 1)
    way.mbit_per_s = float("inf")
    way.take(b"x", 90_000, now_s=1.0)
    assert list(way.arrived(1.0)) == [b"x"] * 3


def test_every_segment_of_a_large_packet_has_headers_of_its_own():
    assert on_the_wire(PLAIN + bytes(100)) == 100
    segmented = struct.pack("=BBHHHH", 1, 1, 52, 1448, 0, 0)
    assert on_the_wire(segmented + bytes(52 + 3 * 1448)) == 3 * 1500


def test_shares_of_the_time_between_the_first_row_and_the_last():
    rows = [
        row(100.0, 7, compute=1.0, core=0.5, merges=2, steps_late=4.0),
        row(105.0, 10, compute=4.0, core=0.6, merges=3, steps_late=4.0),
        row(110.0, 15, compute=9.0, snapshot=0.2, merge=0.3, blocked=0.01, core=1.0, merges=4,
            steps_late=3.0),
    ]  # fmt: skip
    found = timeline.shares(rows)
    assert (found.steps, found.merges) == (8, 2)
    assert found.steps_per_s == pytest.approx(0.8)
    assert found.steps_late == pytest.approx(2.0)
    assert found.snapshot == pytest.approx(0.02)
    assert found.merge == pytest.approx(0.03)
    assert found.compute + found.snapshot + found.merge + found.other == pytest.approx(1.0)
    assert found.blocked == pytest.approx(0.001)
    assert found.off_core == pytest.approx(1.0 - 0.8 - 0.05)


def test_milliseconds_of_every_step():
    rows = [row(0.0, 0), row(1.1, 1, compute=1.0, snapshot=0.02), row(2.2, 2, compute=2.0,
            snapshot=0.02, merge=0.04)]  # fmt: skip
    assert timeline.milliseconds(rows) == {
        "snapshot": [20.0, 0.0],
        "merge": [0.0, 40.0],
        "other": [80.0, 60.0],
    }


def test_a_row_that_is_being_written_is_not_read(tmp_path):
    path = tmp_path / "timeline.jsonl"
    assert timeline.read(path) == []
    line = json.dumps(asdict(row(1.0, 1)))
    path.write_text(f"{line}\n{line[:20]}")
    assert timeline.read(path) == [row(1.0, 1)]


def test_a_model_with_a_large_vocabulary_is_founded_without_its_tokenizer(tmp_path):
    """Steps are emulated: no text of it is read."""
    peer = Peer(tmp_path, "a", "a-host", "127.0.0.1")
    narrow = {**SMALL, "hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 1}
    peer.found(narrow, {"optimiser.sequence_tokens": 64})
    assert peer.home.manifest.exists()
