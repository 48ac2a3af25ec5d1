"""What this machine has, in its control groups too."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from xpeer.estimate import room

GB = 10**9


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(total=16 * GB, available=9 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(total=2 * GB))


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def own(tmp_path: Path, line: str) -> Path:
    file = tmp_path / "own"
    file.write_text(f"{line}\n")
    return file


def test_a_machine_without_limits(tmp_path: Path) -> None:
    group(tmp_path / "groups" / "a", memory__max="max")
    found = room.host(tmp_path / "groups", own(tmp_path, "0::/a"))
    assert (found.most, found.free) == (18 * GB, 9 * GB)
    assert room.host(tmp_path / "none", tmp_path / "missing") == found


def test_the_smallest_limit_of_all_groups_above_counts(tmp_path: Path) -> None:
    groups = tmp_path / "groups"
    group(groups / "system.slice", memory__max=4 * GB, memory__current=3 * GB)
    group(groups / "system.slice" / "xpeer.service", memory__max=6 * GB, memory__current=GB)
    found = room.host(groups, own(tmp_path, "0::/system.slice/xpeer.service"))
    assert (found.most, found.free) == (6 * GB, GB), "swap may be used, and does not count as free"
    assert "system.slice" in found.what


def test_pages_of_files_give_way_and_swap_may_be_forbidden(tmp_path: Path) -> None:
    stat = f"anon 1\ninactive_file {GB}\nactive_file {GB}\nslab 5"
    group(
        tmp_path / "groups" / "a",
        memory__max=4 * GB,
        memory__current=3 * GB,
        memory__swap__max=0,
        memory__stat=stat,
    )
    found = room.host(tmp_path / "groups", own(tmp_path, "0::/a"))
    assert (found.most, found.free) == (4 * GB, 3 * GB)


def test_groups_of_version_1_and_paths_of_the_host(tmp_path: Path) -> None:
    group(tmp_path / "groups" / "memory", memory__limit_in_bytes=2 * GB)
    found = room.host(tmp_path / "groups", own(tmp_path, "7:cpu,memory:/docker/abc"))
    assert (found.most, found.free) == (4 * GB, 2 * GB)
    group(tmp_path / "groups" / "memory", memory__limit_in_bytes=2**63 - 4096)
    assert room.host(tmp_path / "groups", own(tmp_path, "7:memory:/docker/abc")).most == 18 * GB


def test_the_disk_of_a_home_that_is_not_there_yet(tmp_path: Path) -> None:
    assert room.disk(tmp_path / "a" / "b").most == room.disk(tmp_path).most > 0
