"""A model's folder that can't be read, or isn't there: the error says so, and names the option."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from xpeer import source
from xpeer.config import Data, Home
from xpeer.errors import ConfigError
from xpeer.needs import Needs

SAFETENSORS = (2).to_bytes(8, "little") + b"{}"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A model's folder below one that every user may enter."""
    above = Path(tempfile.mkdtemp(prefix="xpeer-test-"))
    above.chmod(0o755)
    made = above / "model"
    made.mkdir()
    (made / "config.json").write_text('{"vocab_size": 1000}')
    (made / "tokenizer.json").write_text("{}")
    (made / "model.safetensors").write_bytes(SAFETENSORS)
    source.check_folder(made, "--model")
    yield made
    made.chmod(0o755)
    shutil.rmtree(above)


@pytest.fixture
def as_anybody() -> Iterator[Callable[[], None]]:
    """Gives up root's rights, who may read everything, until the test's end."""
    was = os.geteuid()

    def given_up() -> None:
        if was == 0:
            os.seteuid(65534)

    yield given_up
    os.seteuid(was)


WAYS = {
    "check_folder": lambda path: source.check_folder(path, "--base-model"),
    "tokenizer_of": lambda path: source.tokenizer_of(str(path), None, None),
    "the model's tokenizer": lambda path: source.tokenizer_of(None, path, {"vocab_size": 1000}),
}


@pytest.mark.parametrize("mode", [0o000, 0o444], ids=oct)
@pytest.mark.parametrize("way", WAYS)
def test_a_folder_that_cant_be_read(
    folder: Path, as_anybody: Callable[[], None], way: str, mode: int
) -> None:
    folder.chmod(mode)
    as_anybody()
    with pytest.raises(ConfigError, match="Permission denied") as caught:
        WAYS[way](folder)
    assert caught.value.problem.startswith("--")
    assert str(folder) in caught.value.problem
    assert "owner and mode" in caught.value.remedy


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_in_it_that_cant_be_read(
    folder: Path, as_anybody: Callable[[], None], name: str
) -> None:
    (folder / name).chmod(0)
    as_anybody()
    with pytest.raises(ConfigError, match=f"its {name} can't be read: Permission") as caught:
        source.check_folder(folder, "--model")
    assert "owner and mode" in caught.value.remedy


def test_a_base_model_that_cant_be_read_is_one_need(
    folder: Path, as_anybody: Callable[[], None], tmp_path: Path
) -> None:
    folder.chmod(0)
    home = Home(folder.parent / "home")
    as_anybody()
    needs = Needs(base_model="00" * 32, tokenizer="00" * 32)
    (item,) = [
        each
        for each in needs.unmet(Data(base_model=str(folder)), home)
        if not each.startswith("peft")
    ]
    assert item.startswith("data.base_model")
    assert "Permission denied" in item


def test_a_link_that_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m").mkdir()
    Path("m/loop").symlink_to("loop")
    Path("gone").symlink_to("nowhere")
    for path, told in (
        ("m/loop", "m/loop can't be used: it is a link, or leads through one, that leads back to"),
        ("gone/inner", "gone/inner can't be followed: the link gone leads to nothing"),
    ):
        with pytest.raises(ConfigError, match=told) as caught:
            source.check_folder(Path(path), "--model")
        assert "hf download" not in caught.value.remedy


def test_a_name_below_a_folder_that_is_here_is_none_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m").mkdir()
    with pytest.raises(ConfigError, match="no such folder") as caught:
        source.check_folder(Path("m/missing"), "--model")
    assert "hf download" not in str(caught.value)
    with pytest.raises(ConfigError, match="downloads no models") as caught:
        source.check_folder(Path("org/name"), "--model")
