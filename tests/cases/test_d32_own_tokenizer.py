"""D32: a model's folder brings its own tokenizer; bytes only where they are meant."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.cases.support import model_folder, tokenizer_folder, xpeer
from xpeer import config_sources
from xpeer.cli import main
from xpeer.config import Home
from xpeer.manifest.signed import SignedManifest


def test_the_folders_own_tokenizer(tmp_path: Path) -> None:
    model = tokenizer_folder(model_folder(tmp_path / "m"))
    done = xpeer("init", "--swarm", "s", "--home", tmp_path / "h", "--model", model)
    assert done.returncode == 0, done.stderr
    made = SignedManifest.load(Home(tmp_path / "h").manifest).open().tokenizer
    assert made.kind == "huggingface", "a swarm for bytes on the vocabulary of another tokenizer"
    assert config_sources.load(Home(tmp_path / "h").config, {}).data.tokenizer == str(model)
    assert str(model) in done.stderr


def init(tmp_path: Path, *arguments: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(
        main, ["init", "--swarm", "s", "--home", str(tmp_path / "h"), *map(str, arguments)]
    )
    return done.exit_code, done.stderr


def test_bytes_when_asked(tmp_path: Path) -> None:
    model = tokenizer_folder(model_folder(tmp_path / "m"))
    code, err = init(tmp_path, "--model", model, "--tokenizer", "bytes")
    assert code == 0, err
    assert SignedManifest.load(Home(tmp_path / "h").manifest).open().tokenizer.kind == "byte"
    assert config_sources.load(Home(tmp_path / "h").config, {}).data.tokenizer == ""


def test_bytes_where_a_small_model_has_no_tokenizer_are_told(tmp_path: Path) -> None:
    code, err = init(tmp_path, "--model", model_folder(tmp_path / "m"))
    assert (code, "bytes are its tokens" in err) == (0, True), err


@pytest.mark.parametrize("option", ["--model", "--model-config"])
def test_a_large_vocabulary_is_not_one_of_bytes(tmp_path: Path, option: str) -> None:
    model = model_folder(tmp_path / "m", vocab_size=600)
    given = model if option == "--model" else model / "config.json"
    code, err = init(tmp_path, option, given)
    assert (code, "a vocabulary of 600 is not one of bytes" in err) == (8, True), err
    assert init(tmp_path, option, given, "--tokenizer", "bytes")[0] == 0


def test_a_tokenizer_in_another_form(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "m")
    (model / "tokenizer.model").write_bytes(b"sentencepiece")
    code, err = init(tmp_path, "--model", model)
    assert (code, "only tokenizer.model" in err, "save_pretrained" in err) == (8, True, True), err


@pytest.mark.parametrize(
    ("given", "told"),
    [("org/name", "hf download org/name"), ("missing/", "no such folder"), ("m", "tokenizer.json")],
)
def test_a_tokenizer_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model = model_folder(tmp_path / "m")
    code, err = init(tmp_path, "--model", model, "--tokenizer", given)
    assert (code, told in err) == (8, True), err
