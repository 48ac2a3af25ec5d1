"""Arrays with a row for each document lie in files; results are those of arrays in memory."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xpeer.training.document import HexIds, among, firsts, in_hex
from xpeer.training.listing import Listing
from xpeer.training.record_view import MappedRecords
from xpeer.training.records import FILL
from xpeer.training.room import Room
from xpeer.training.token_file import (
    BEGINS,
    CONTINUES,
    ENDS,
    OPEN,
    PASSAGE,
    SOURCE,
    TokenFileWriter,
    open_token_file,
)

LARGE = 1 << 18


def lies_in_a_file(array: Any) -> bool:
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, mmap.mmap)


def test_large_arrays_lie_in_files_that_have_no_name(tmp_path: Path) -> None:
    room = Room(tmp_path)
    large, small = room.empty((LARGE, 2), ">u8"), room.empty(5, np.int64)
    assert (lies_in_a_file(large), lies_in_a_file(small)) == (True, False)
    assert not lies_in_a_file(Room().empty(LARGE, np.int64))
    assert not list(tmp_path.iterdir())
    values = np.arange(2 * LARGE, dtype=">u8").reshape(-1, 2)
    large[:] = values
    chosen = np.arange(LARGE)[::-1]
    taken = room.taken(large, chosen)
    assert lies_in_a_file(taken)
    assert np.array_equal(taken, values[::-1])
    assert taken.dtype == values.dtype
    assert len(room.taken(values[:0], np.empty(0, np.int64))) == 0


def test_on_a_full_disk_they_are_in_memory_and_this_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    array = Room(tmp_path).empty(LARGE, np.int64)
    assert not lies_in_a_file(array)
    assert array.shape == (LARGE,)
    assert "has no room" in caplog.text


def test_a_long_column_lies_in_a_file(tmp_path: Path) -> None:
    column = Room(tmp_path).column(np.int64)
    assert not len(column.values())
    column.append(7)
    assert column.values().tolist() == [7]
    column.extend(range(LARGE))
    column.add(np.arange(3))
    values = column.values()
    assert lies_in_a_file(values)
    assert not list(tmp_path.iterdir())
    column.append(9)
    wanted = [7, *range(LARGE), 0, 1, 2]
    assert (values.tolist(), column.values().tolist()) == (wanted, [*wanted, 9])
    assert len(column) == len(wanted) + 1
    assert not lies_in_a_file(Room().column(np.int64).values())


@pytest.mark.parametrize("room_for", [0, 1000, 5 << 17])
def test_a_column_that_does_not_fit_on_the_disk_is_in_memory_and_this_is_said(
    tmp_path: Path, room_for: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel takes only as many bytes of the file as there is room for."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room_for, before[1]))
    try:
        column = Room(tmp_path).column(np.int64)
        for at in range(0, LARGE, 1000):
            column.extend(range(at, at + 1000))
        values = column.values()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not lies_in_a_file(values)
    assert values.tolist() == list(range(len(column)))
    (said,) = caplog.messages
    assert said.startswith("lists of files and documents are kept in memory, since")


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 2**63, 2**64 - 1]))))
def test_first_occurrences_also_where_halves_are_shared(pairs: list[tuple[int, int]]) -> None:
    ids = np.array(pairs, np.uint64).reshape(-1, 2)
    wanted = [n for n, pair in enumerate(pairs) if pair not in pairs[:n]]
    for order in (ids, ids.astype(">u8")):
        assert firsts(order).tolist() == wanted


HALVES = st.tuples(st.integers(0, 3), st.integers(0, 2))


@given(st.lists(HALVES), st.lists(HALVES))
def test_ids_that_are_among_others(pairs: list[tuple[int, int]], some: list[Any]) -> None:
    ids, others = (np.array(each, np.uint64).reshape(-1, 2) for each in (pairs, some))
    assert among(ids.astype(">u8"), others).tolist() == [pair in some for pair in pairs]


def test_pieces_that_go_on_in_another_file_are_listed_once(tmp_path: Path) -> None:
    """As many documents as fill several blocks, in two files, read in another order."""
    count = 100_000
    files = []
    for number in range(2):
        writer = TokenFileWriter(tmp_path, "<u2")
        passages = np.zeros(count, PASSAGE)
        passages["tokens"] = 1 + np.arange(count) % 3
        passages["characters"] = 7
        passages["flags"] = BEGINS | ENDS
        passages["id"] = passages["whole"] = np.stack([np.arange(count), np.full(count, number)], 1)
        if number:
            passages["flags"][0] = CONTINUES | ENDS
        else:
            passages["flags"][-1] = BEGINS | OPEN
        writer.add(np.arange(int(passages["tokens"].sum())).astype("<u2"))
        sources = np.zeros(1, SOURCE)
        sources["passages"] = count
        files.append(open_token_file(writer.publish(passages, sources), verify=True))
    rows = np.arange(2 * count)
    table = Listing(files, Room(tmp_path)).table(rows, np.repeat([0, 1], count))
    assert len(table) == 2 * count - 1
    across = count - 1
    assert table.tokens[across] == 1 + (count - 1) % 3 + 1
    assert table.characters[across] == 14
    assert np.diff(table.passages)[across] == 2
    assert lies_in_a_file(table.id)
    chosen = np.array([across + 1, across, 0])
    few = table.select(chosen)
    assert few.tokens.tolist() == table.tokens[chosen].tolist()
    assert few.passages.tolist() == [0, 1, 3, 4]
    assert few.file.tolist() == [1, 0, 1, 0]
    assert few.begin.tolist() == [1, int(table.begin[across]), 0, 0]
    assert few.id.tolist() == table.id[chosen].tolist()


@pytest.mark.parametrize("examples", [False, True])
def test_records_of_more_pieces_than_are_looked_at_together(tmp_path: Path, examples: bool) -> None:
    count = 150_000
    writer = TokenFileWriter(tmp_path, "<u2")
    passages, sources = np.zeros(count, PASSAGE), np.zeros(1, SOURCE)
    passages["tokens"], passages["flags"] = np.arange(count) % 40, BEGINS | ENDS
    passages["id"][:, 0] = passages["whole"][:, 0] = np.arange(count)
    sources["passages"] = count
    writer.add((np.arange(int(passages["tokens"].sum())) % 65_536).astype("<u2"))
    file = open_token_file(writer.publish(passages, sources), verify=True)
    table = Listing([file], Room(tmp_path)).table(np.arange(count), np.zeros(count, np.int64))
    records = MappedRecords(table, 16, examples=examples)
    made = {n: [min(16, n - at) for at in range(0, n, 16) if n - at >= 8] for n in range(40)}
    made = {n: lengths[:1] if examples else lengths for n, lengths in made.items()}
    owners = [n for n in range(count) for _ in made[n % 40]]
    assert records.owners().tolist() == owners
    assert len(records) == len(owners)
    assert records.num_tokens() == sum(sum(made[n % 40]) for n in range(count))
    assert records.too_short() == sum(not made[n % 40] for n in range(count))
    begin = int(passages["tokens"][: owners[-1]].sum()) + sum(made[39][:-1])
    last = np.full(16, FILL)
    tokens = np.asarray(file.tokens[begin : begin + made[39][-1]], np.int64)
    if examples:
        tokens = np.where(tokens & 1, -2 - (tokens >> 1), tokens >> 1)
    last[: len(tokens)] = tokens
    assert records[-1:][0].tolist() == last.tolist()


def test_a_file_of_tokens_takes_one_descriptor(tmp_path: Path) -> None:
    writer = TokenFileWriter(tmp_path, "<u2")
    writer.add(np.zeros(3, "<u2"))
    passages, sources = np.zeros(1, PASSAGE), np.zeros(1, SOURCE)
    passages["tokens"], sources["passages"] = 3, 1
    path = writer.publish(passages, sources)
    before = len(list(Path("/proc/self/fd").iterdir()))
    opened = [open_token_file(path, verify=False) for _ in range(5)]
    assert len(list(Path("/proc/self/fd").iterdir())) - before == len(opened)


def test_ids_are_written_when_they_are_asked_for() -> None:
    ids = np.random.default_rng(1).integers(0, 2**63, (70_000, 2)).astype(">u8")
    named, wanted = HexIds(ids), in_hex(ids)
    assert len(named) == len(wanted)
    assert list(named) == wanted
    assert (named[0], named[-1], named[5:7]) == (wanted[0], wanted[-1], wanted[5:7])
    assert wanted[3] in named
    assert HexIds(np.concatenate([ids, ids[5:9]])).distinct() == len(wanted)
