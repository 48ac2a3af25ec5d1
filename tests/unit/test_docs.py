"""What an operator can set, type or see must be in docs/operating.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from xpeer.cli import COMMANDS
from xpeer.cli.start import start
from xpeer.config import Home, settings
from xpeer.errors import ExitCode

TEXT = (Path(__file__).parents[2] / "docs" / "operating.md").read_text()
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in TEXT.splitlines()
    if line.startswith("|")
]


def row(first: str) -> list[str]:
    """The table row that begins with this cell."""
    found = [cells for cells in ROWS if cells[0] == first]
    assert len(found) == 1, f"docs/operating.md needs one row for {first}"
    return found[0]


@pytest.mark.parametrize(
    ("section", "key", "default"), [(s, k, d) for s, k, d in settings()],
    ids=[f"{s}.{k}" for s, k, _ in settings()],
)  # fmt: skip
def test_setting(section: str, key: str, default: Any) -> None:
    _, documented, meaning = row(f"`{section}.{key}`")
    assert msgspec.json.decode(documented.strip("`")) == default
    assert meaning


def test_no_setting_that_is_gone() -> None:
    sections = "|".join({section for section, _, _ in settings()})
    documented = {c[0] for c in ROWS if re.fullmatch(rf"`({sections})\.[a-z_]+`", c[0])}
    assert documented - {"`daemon.log`"} == {f"`{s}.{k}`" for s, k, _ in settings()}


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str) -> None:
    assert row(f"`xpeer {command}`")[1]


@pytest.mark.parametrize("option", [o for p in start.params for o in p.opts if o != "--home"])
def test_flag_of_start(option: str) -> None:
    assert any(option in cells[0] for cells in ROWS)


@pytest.mark.parametrize("code", ExitCode)
def test_exit_code(code: ExitCode) -> None:
    assert row(str(int(code)))[1] == code.name


def test_file() -> None:
    named = " ".join(cells[0] for cells in ROWS)
    for path in vars(Home(Path("/home"))).values():
        if path != Path("/home"):
            assert path.name in named, path.name


def test_links_inside() -> None:
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in TEXT.splitlines()
        if line.startswith("#")
    }
    assert set(re.findall(r"\(#([^)]+)\)", TEXT)) <= headings
