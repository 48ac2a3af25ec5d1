"""Files that a search came upon are counted and ordered as dictionaries would do it."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xpeer.errors import ShardError
from xpeer.training.files import find
from xpeer.training.room import IN_MEMORY
from xpeer.training.sources import Reached, Source

KEYS = st.tuples(st.integers(0, 1), st.sampled_from([0, 1, 2, 2**64 - 1]))
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["take", "name", "leave out", "outside"]), KEYS, st.sampled_from("abc")
    )
)


@given(EVENTS)
def test_a_file_that_is_come_upon_several_times_counts_once(events: list[Any]) -> None:
    reached = Reached(IN_MEMORY)
    sources: dict[Any, Source] = {}
    left: dict[Any, str] = {}
    inside: set[Any] = set()
    outsiders: dict[Any, str] = {}
    for number, (kind, key, word) in enumerate(events):
        if kind == "leave out":
            reached.leave_out(key, word)
            left.setdefault(key, word)
            continue
        named = kind == "name"
        place = f"/{word}", f"{number}\udcff"
        outside = word if kind == "outside" else ""
        reached.take(key, *place, named=named, link=False, outside=outside)
        if named or key not in sources:
            sources[key] = Source(Path(f"/{word}/{number}\udcff"), named)
        if kind == "outside":
            outsiders.setdefault(key, word)
        else:
            inside.add(key)
    assert list(reached.sources()) == list(sources.values())
    assert list(reached.sources().paths()) == [str(each.path) for each in sources.values()]
    assert reached.left_out() == Counter(v for k, v in left.items() if k not in sources)
    assert reached.outside() == Counter(v for k, v in outsiders.items() if k not in inside)


def test_one_file_of_each_folder_and_all_links_tell_where_files_lie() -> None:
    reached = Reached(IN_MEMORY)
    for folder, name, link in (
        ("/a", "1", False), ("/a", "2", False), ("/a", "3", True), ("/a", "4", True),
        ("/b", "5", False), ("/c", "6", True),
    ):  # fmt: skip
        reached.take((1, int(name)), folder, name, named=False, link=link)
    sources = reached.sources()
    assert {str(path) for path in sources.of_each_folder()} == {
        "/a/1", "/a/3", "/a/4", "/b/5", "/c/6",
    }  # fmt: skip


def test_files_are_in_the_order_of_the_parts_of_their_paths(tmp_path: Path) -> None:
    """Not of the text of the paths, nor of the walk."""
    for name in ("a.txt", "a/z.txt", "a/b/y.txt", "a-b/x.txt", "b.txt", "a.b/w.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    (tmp_path / "c").symlink_to(tmp_path / "a.b")
    found = find([str(tmp_path)], "--shard")
    paths = [source.path for source in found.sources]
    assert paths == sorted(paths)
    assert len(paths) == 6
    assert found.left_out == Counter({"link to a folder above": 1})
    named = find([str(tmp_path), str(tmp_path / "b.txt")], "--shard").sources
    assert [source.path for source in named if source.named] == [tmp_path / "b.txt"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_can_not_be_searched_is_named(tmp_path: Path) -> None:
    (tmp_path / "shut").mkdir(mode=0)
    with pytest.raises(ShardError, match="shut can't be searched"):
        find([str(tmp_path)], "--shard")


def test_files_below_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    for pattern in ("a.txt", ".", "*.txt", "**/*.txt"):
        (source,) = find([pattern], "--shard").sources
        assert source.path == Path("a.txt")
