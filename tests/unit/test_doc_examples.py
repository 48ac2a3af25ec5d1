"""Whatever a reader may copy out of the docs works where it is pasted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from xpeer import config_sources
from xpeer.cli import main
from xpeer.cli.common import GivenPath
from xpeer.cli.new_config import _EXPLAINED, as_toml
from xpeer.config import settings

ROOT = Path(__file__).parents[2]
HISTORY = {"decisions.md", "benchmarks.md"}
"""What says how things were, or how they were measured."""
PAGES = sorted(
    [ROOT / "README.md", *(p for p in (ROOT / "docs").glob("*.md") if p.name not in HISTORY)]
)
SETTINGS = {f"{section}.{key}" for section, key, _ in settings()}
SECTIONS = {name.partition(".")[0] for name in SETTINGS}
KEYS = {name.partition(".")[2] for name in SETTINGS}


def blocks(page: Path) -> list[str]:
    """What is indented as code, also below a point of a list."""
    found, block = [], list[str]()
    for line in [*page.read_text(encoding="utf-8").splitlines(), "."]:
        if line.startswith("    ") or (not line and block):
            block.append(line.strip())
        elif block:
            found.append("\n".join(block).strip())
            block = []
    return found


def is_toml(block: str) -> bool:
    """Whether it is a part of config.toml, whole or not."""
    named = re.findall(r"^\[(\w+)\]$|^([\w.]+)\s*=\s", block, re.M)
    return any(section in SECTIONS or key in SETTINGS | KEYS for section, key in named)


CONFIGS = [(page.name, block) for page in PAGES for block in blocks(page) if is_toml(block)]


def commands() -> list[tuple[str, str]]:
    """Each page with a command of xpeer in one of its blocks, and as code in its text."""
    found = []
    for page in PAGES:
        typed = [line for block in blocks(page) for line in block.splitlines()]
        text = re.sub(r"\n    .*", "", page.read_text(encoding="utf-8"))
        spoken = [c for c in re.findall(r"`([^`\n]+)`", text) if re.search(r" plan .*\d", c)]
        for line in [*typed, *spoken]:
            shown = re.sub(r"^(cloud )?[A-Z]\$ |^sudo -u \w+ (\S*/)?(?=xpeer )", "", line)
            for one in re.split(r"\s&&\s|\s\|\s", re.split(r"\s#\s|(?<=\w)\s{3,}", shown)[0]):
                if one.startswith("xpeer "):
                    found.append((page.name, one.strip()))
    return found


def words_of(command: str) -> list[str]:
    """Without what the shell takes, and without the sign for "and so on"."""
    return [w for w in shlex.split(re.sub(r"\s[<>]\s*\S+", "", command))[1:] if w != "…"]


@pytest.mark.parametrize(("page", "block"), CONFIGS, ids=[page for page, _ in CONFIGS])
def test_settings_load_behind_what_init_wrote(page: str, block: str, tmp_path: Path) -> None:
    written = as_toml(dict.fromkeys(_EXPLAINED, ""))
    known = set(re.findall(r"^\[\w+\]$", written, re.M))
    named = set(re.findall(r"^\[\w+\]$", block, re.M))
    file = tmp_path / "config.toml"
    # a block whose sections `init` has written shows the whole file
    file.write_text(block if named and named <= known else f"{written}\n{block}\n")
    assert config_sources.load(file, {}) != config_sources.load(tmp_path / "none", {})


def test_there_is_something_to_copy() -> None:
    assert len(CONFIGS) > 1
    assert len(commands()) > 40


@pytest.mark.parametrize(("page", "command"), commands())
def test_options_of_commands_exist(
    page: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XPEER_HOME", str(tmp_path))
    monkeypatch.setattr(GivenPath, "convert", lambda _, value, *_others: Path(value))  # not here
    words, name = words_of(command), "xpeer"
    found: click.Command = main
    while isinstance(found, click.Group):
        name = words.pop(0)
        inner = found.get_command(click.Context(found), name)
        assert inner is not None, f"{page}: there is no command {name}"
        found = inner
    found.make_context(name, words)


PLANS = [entry for entry in commands() if re.match(r"xpeer (privacy )?plan\b", entry[1])]


@pytest.mark.parametrize(("page", "command"), PLANS)
def test_plans_run(page: str, command: str) -> None:
    done = CliRunner().invoke(main, words_of(command))
    assert done.exit_code == 0, f"{page}: {command}\n{done.stderr}"


def test_pip_takes_the_pinned_versions_of_the_source() -> None:
    """`pip install xpeer` would take whatever a registry has under that name."""
    found = [
        (page.name, line)
        for page in PAGES
        for line in re.findall(r"pip install [^`\n]*", page.read_text(encoding="utf-8"))
        if re.search(r"\.(\[|$| )|xpeer(\[|$| )", line)
    ]
    assert found
    assert [entry for entry in found if "-c constraints.txt" not in entry[1]] == []
    pinned = re.findall(r"^torch==.*$", (ROOT / "constraints.txt").read_text(), re.M)
    named = re.findall(r"torch==[\d.]+\d", " ".join(line for _, line in found))
    assert set(named) == set(pinned)


@pytest.mark.parametrize("option", ["--announce", "--listen", "--shard", "--base-model"])
def test_what_has_to_last_is_given_to_init(option: str) -> None:
    """Flags of `start` count for that start only."""
    given = [e for e in commands() if e[1].startswith("xpeer start") and option in e[1]]
    assert given == []
