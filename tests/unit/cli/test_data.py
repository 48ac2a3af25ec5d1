"""`xpeer data inspect` counts as the trainer does, and prints no text."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner, Result

from xpeer.cli import main
from xpeer.errors import ExitCode


def xpeer(home: Path, *args: str) -> Result:
    return CliRunner(env={"XPEER_HOME": str(home)}).invoke(main, args)


def shard(folder: Path) -> Path:
    made = folder / "shard"
    made.mkdir()
    rows = [{"text": f"secret {n} " + "x" * n} for n in range(40)] + [{"text": None}]
    (made / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (made / "page.txt").write_text("<html>secret</html>")
    return made


def test_the_counts_add_up(tmp_path: Path) -> None:
    arguments = ("data", "inspect", "--shard", str(shard(tmp_path)), "--sequence-tokens", "16")
    result = xpeer(tmp_path / "home", *arguments, "--json")
    assert result.exit_code == ExitCode.OK, result.output
    found = json.loads(result.output)
    sizes = [len(f"secret {n} ") + n + 2 for n in range(40)]
    assert found["documents"] + found["documents_held_out"] == 40
    assert found["document_tokens"]["0"] == min(sizes)
    assert found["document_tokens"]["1"] == max(sizes)
    records = sum(size // 16 + (size % 16 >= 8) for size in sizes)
    assert found["records"] + found["records_held_out"] == records
    assert found["shard"]["left_out"] == {"mark-up": 1}
    assert found["shard"]["skipped"] == {"null": 1}
    assert found["tokens"] + found["tokens_dropped"] <= sum(sizes)
    assert len(found["digest"]) == 64
    assert not (tmp_path / "home" / "cache").exists()

    people = xpeer(tmp_path / "home", *arguments)
    assert people.exit_code == ExitCode.OK
    for line in ("1 file left out: mark-up 1", "held out: ", found["digest"], "median "):
        assert line in people.output
    assert "secret" not in result.output + people.output


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    result = xpeer(tmp_path / "home", "data", "inspect")
    assert result.exit_code == ExitCode.BAD_CONFIG
    assert "data.shard is empty" in result.output + (result.stderr or "")
