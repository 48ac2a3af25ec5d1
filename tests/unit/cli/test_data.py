"""`xpeer data inspect` counts as the trainer does, and prints no text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.cases.support import tokenizer_folder
from tests.unit.test_founding import picture
from tests.unit.test_trial import init
from xpeer.cli import main
from xpeer.cli.data import _inspected
from xpeer.cli.naming import naming
from xpeer.errors import ExitCode, LocalError
from xpeer.manifest import Optimiser
from xpeer.trainer.text import read_table
from xpeer.training import tokenising
from xpeer.training.documents import name_documents
from xpeer.training.piece_table import split_pieces
from xpeer.training.reading import Recipe
from xpeer.training.tokenising import ignore
from xpeer.training.tokenizer import ByteTokenizer


def xpeer(home: Path, *args: str) -> Result:
    return CliRunner(env={"XPEER_HOME": str(home)}).invoke(main, args)


def shard(folder: Path) -> Path:
    made = folder / "shard"
    made.mkdir()
    rows = [{"text": f"secret {n} " + "x" * n} for n in range(40)] + [{"text": None}]
    (made / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (made / "page.txt").write_text("<html>secret</html>")
    return made


def test_a_document_in_pieces_counts_once(tmp_path: Path) -> None:
    """The digest was not the one that the manifest of a shared corpus has."""
    texts = ["x" * 900, "y" * 30, "z" * 2000]
    for text in texts:
        (tmp_path / f"{text[0]}.txt").write_text(text)
    files = [str(tmp_path / f"{text[0]}.txt") for text in texts]
    recipe = Recipe(ByteTokenizer(), piece_characters=100)
    table, summary = read_table(files, "data.corpus", recipe, tmp_path / "cache", ignore)
    found = _inspected(table, summary, 16, recipe, split_pieces(table, 0.05, "document"), 0)
    assert found.digest == name_documents(files).digest()
    assert (found.document_tokens["0"], found.document_tokens["1"]) == (32, 2002)
    assert found.documents + found.documents_held_out == 3


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


def found(result: Result) -> Any:
    assert result.exit_code == ExitCode.OK, result.output
    return json.loads(result.stdout)


def pairs(folder: Path, *completions: str) -> str:
    folder.mkdir()
    rows = [{"prompt": f"{n}: ", "completion": text} for n, text in enumerate(completions)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


def test_records_are_shown_if_they_are_asked_for(tmp_path: Path) -> None:
    """With what is predicted between brackets, and nothing that could steer a terminal."""
    text = pairs(tmp_path / "text", *(f"\x1b[31m\n\u202eé {n}." for n in range(4)))
    arguments = ("data", "inspect", "--shard", text, "--text-field", "prompt+completion")
    result = xpeer(tmp_path / "home", *arguments, "--show", "2")
    assert result.exit_code == ExitCode.OK, result.output
    shown = [line for line in result.stdout.splitlines() if line.startswith("record ")]
    assert len(shown) == 2
    for line in shown:
        number = line.split("<|begin|>")[1][0]
        wanted = rf"<|begin|>{number}: \u27e6\x1b[31m\n\u202eé {number}.<|end|>\u27e7"
        assert line.endswith(wanted.replace(r"\u27e6", "\u27e6").replace(r"\u27e7", "\u27e7"))
    assert "record 1" not in xpeer(tmp_path / "home", *arguments).stdout
    assert len(found(xpeer(tmp_path / "home", *arguments, "--show", "3", "--json"))["shown"]) == 3


def test_records_of_texts_are_shown_too(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path / "tokenizer")
    arguments = ("data", "inspect", "--shard", str(shard(tmp_path)), "--tokenizer", str(folder))
    result = xpeer(tmp_path / "home", *arguments, "--show", "1")
    line = next(line for line in result.stdout.splitlines() if line.startswith("record 1"))
    assert "\u27e6<s>secret " in line


def test_examples_that_are_cut_off_are_counted(tmp_path: Path) -> None:
    """One is too long; of another one not even the answer's beginning is in the record."""
    text = pairs(tmp_path / "text", *["short"] * 6, "a long answer " * 3)
    rows = [{"prompt": f"{n} " + "why " * 20, "completion": "so"} for n in range(3)]
    (tmp_path / "text" / "more.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ("data", "inspect", "--shard", text, "--text-field", "prompt+completion",
                 "--sequence-tokens", "24")  # fmt: skip
    result = xpeer(tmp_path / "home", *arguments, "--json")
    summary = json.loads(result.stdout)["shard"]
    held_out = 10 - json.loads(result.stdout)["documents"]
    assert 4 - held_out <= summary["cut"] <= 4
    assert 3 - held_out <= summary["unanswered"] <= 3
    assert summary["cut"] - summary["unanswered"] in (0, 1)
    said = xpeer(tmp_path / "home", *arguments).stdout
    assert f"{summary['cut']} examples cut off, {summary['unanswered']} before their answer" in said


def test_a_joiner_of_adapters_is_counted_with_its_base_models_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It needs no data.tokenizer, and the trainer looks there, too."""
    base, text = tokenizer_folder(tmp_path / "base", bos_token=None), str(shard(tmp_path))
    arguments = ("data", "inspect", "--shard", text, "--json")
    named = found(xpeer(tmp_path / "home", *arguments, "--tokenizer", str(base)))
    monkeypatch.setenv("XPEER_DATA_BASE_MODEL", str(base))
    assert found(xpeer(tmp_path / "home", *arguments)) == named


def test_the_help_says_how_long_records_are(tmp_path: Path) -> None:
    said = xpeer(tmp_path, "data", "inspect", "--help").output
    assert f"else {Optimiser().sequence_tokens}." in " ".join(said.split())


def test_the_homes_tokens_are_used_and_left_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be in use by its trainer, and of another user."""
    home, text = tmp_path / "h", shard(tmp_path)
    code, err = init(home, "--preset", "tiny", "--skip-trial", "--shard", str(text))
    assert code == 0, err
    first = found(xpeer(home, "data", "inspect", "--json"))
    assert not (home / "cache").exists()
    read_table([str(text)], "--shard", Recipe(ByteTokenizer()), home / "cache", ignore)
    tokens = list((home / "cache" / "tokens").rglob("*.tokens"))
    assert tokens
    tokens[0].with_name(".writing-by-the-trainer").touch()
    before = picture(home)
    with monkeypatch.context() as patch:
        patch.setattr(tokenising, "_run", None)
        assert found(xpeer(home, "data", "inspect", "--json")) == first
    other = tmp_path / "other"
    shutil.copytree(text, other)
    found(xpeer(home, "data", "inspect", "--shard", str(other), "--json"))
    assert picture(home) == before


def test_an_error_names_the_option_that_was_given(tmp_path: Path) -> None:
    """Not the setting, which the operator has not touched."""
    text, wrong = tmp_path / "a.jsonl", str(tmp_path / "wrong")
    Path(wrong).mkdir()
    text.write_text(json.dumps({"conversations": [{"from": "human", "value": "Two and two?"}]}))
    home, of_text = tmp_path / "home", ("--shard", str(text))
    for command in (("data", "inspect"), ("privacy", "plan", "--steps", "10")):
        done = xpeer(home, *command, *of_text, "--tokenizer", wrong)
        assert done.exit_code == ExitCode.BAD_CONFIG
        assert done.stderr.startswith(f"xpeer: error: --tokenizer: {wrong}/tokenizer.json")
        done = xpeer(home, *command, *of_text, "--text-field", "conversations")
        assert done.exit_code == ExitCode.BAD_CONFIG
        assert "set --text-field to a field of texts; chats are read from a field" in done.stderr
        done = xpeer(home, *command, *of_text, "--text-field", "")
        assert (done.exit_code, "--text-field is empty" in done.stderr) == (8, True)
    done = xpeer(home, "data", "inspect", *of_text)
    assert "set data.text_field to the field" in done.stderr
    xpeer(home, "id")
    for asks in (("generate", "--prompt", "a"), ("eval", "--text", str(text))):
        done = xpeer(home, *asks, "--model", str(tmp_path), "--tokenizer", wrong)
        assert done.exit_code == ExitCode.BAD_CONFIG
        assert done.stderr.startswith(f"xpeer: error: --tokenizer: {wrong}/tokenizer.json")


def test_only_whole_names_of_settings_are_options() -> None:
    with pytest.raises(LocalError) as caught, naming({"data.shard": "--shard", "data.x": ""}):
        raise LocalError("/data.shard/a, data.shard: x", "set data.shard. Not data.shard_x, data.x")
    assert caught.value.problem == "/data.shard/a, --shard: x"
    assert caught.value.remedy == "set --shard. Not data.shard_x, data.x"
    assert str(caught.value) == f"{caught.value.problem} - {caught.value.remedy}"
