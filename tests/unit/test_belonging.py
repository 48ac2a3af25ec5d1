"""What a model's folder may hold: files of its own, and nothing of anybody else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cases.support import model_folder, tokenizer_folder
from xpeer import belonging
from xpeer.config import Data, Home
from xpeer.config_sources import load
from xpeer.errors import ConfigError
from xpeer.founding_model import initial_model
from xpeer.needs import Needs
from xpeer.source import check_folder, config_in, tokenizer_of
from xpeer.training import kept
from xpeer.training.tokenizer import HuggingFaceTokenizer
from xpeer.training.trained import from_export

SECRET = '{"auths": {"host": {"auth": "SECRET"}}, "model_type": "llama"}'


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "user" / ".docker" / "config.json"
    path.parent.mkdir(parents=True)
    path.write_text(SECRET)
    return path


def _copied(folder: Path) -> None:
    out = folder.parent / "out"
    out.mkdir()
    kept.Source(folders=[folder]).copy_files(out, carded=False)
    kept.copy(folder, out, kept.TOKENIZER_FILES)


def _needed(folder: Path) -> None:
    home = Home(folder.parent / "home")
    found = Needs(tokenizer="ab" * 32).unmet(Data(tokenizer=str(folder)), home)
    raise ConfigError("; ".join(found))


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "generation": ("generation_config.json", kept.read_generation),
    "licence": ("LICENSE", _copied),
    "card": ("README.md", _copied),
    "template": ("chat_template.jinja", _copied),
    "template below": ("additional_chat_templates/a.jinja", _copied),
    "config": ("config.json", lambda folder: config_in(folder, None)),
    "whole model": ("generation_config.json", lambda folder: initial_model(folder, None, None)),
    "weights": ("model.safetensors", check_folder),
    "tokenizer": ("tokenizer.json", HuggingFaceTokenizer),
    "special tokens": ("special_tokens_map.json", HuggingFaceTokenizer),
    "given tokenizer": ("tokenizer.json", lambda folder: tokenizer_of(str(folder), None, None)),
    "needed tokenizer": ("tokenizer.json", _needed),
    "adapters": ("base_model.json", lambda folder: from_export(folder, folder)),
}


def _folder(path: Path, name: str) -> Path:
    tokenizer_folder(model_folder(path))
    if name == "base_model.json":
        (path / "adapter_config.json").write_text("{}")
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).unlink(missing_ok=True)
    return path


@pytest.mark.parametrize("reader", READERS)
def test_a_link_to_elsewhere_is_refused(tmp_path: Path, secret: Path, reader: str) -> None:
    name, use = READERS[reader]
    folder = _folder(tmp_path / "m", name)
    (folder / name).symlink_to(os.path.relpath(secret, (folder / name).parent))
    with pytest.raises(ConfigError) as caught:
        use(folder)
    assert name in str(caught.value)
    assert f"is a link to {secret}" in str(caught.value)
    assert "SECRET" not in str(caught.value)
    assert not any("SECRET" in f.read_text() for f in tmp_path.glob("out/**/*") if f.is_file())


@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_is_not_waited_for(tmp_path: Path, reader: str) -> None:
    name, use = READERS[reader]
    folder = _folder(tmp_path / "m", name)
    os.mkfifo(folder / name)
    if use is _copied or reader == "config":  # no file of that name
        use(folder)
        return
    with pytest.raises(ConfigError, match="pipe"):
        use(folder)


def test_a_config_that_is_a_pipe(tmp_path: Path) -> None:
    home = Home(tmp_path)
    os.mkfifo(home.config)
    with pytest.raises(ConfigError, match="pipe"):
        load(home.config, {})
    with pytest.raises(ConfigError, match="pipe"):
        initial_model(None, home.config, None)


def test_a_snapshot_of_the_hubs_cache_is_whole(tmp_path: Path, secret: Path) -> None:
    whole = model_folder(tmp_path / "whole")
    (whole / "generation_config.json").write_text('{"top_k": 3}')
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot = blobs.parent / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(whole.iterdir()):
        file.rename(blobs / f"{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (tmp_path / "link").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "link"):
        assert initial_model(folder, None, None).origin.generation == {"top_k": 3}
    (snapshot / "NOTICE").symlink_to("../../../user/.docker/config.json")
    with pytest.raises(ConfigError, match="NOTICE is a link"):
        check_folder(snapshot)


def test_a_link_inside_of_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "c").symlink_to("c")
    assert belonging.read_inside(tmp_path / "b", tmp_path) == b"x"
    with pytest.raises((ConfigError, OSError)):
        belonging.read_inside(tmp_path / "c", tmp_path)


@pytest.mark.parametrize("content", [SECRET, "[1]", '"x"', "[" * 200_000])
def test_only_settings_of_a_generation_get_into_a_manifest(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    if content == SECRET:
        assert kept.read_generation(tmp_path) == {}
    else:
        with pytest.raises(ConfigError):
            kept.read_generation(tmp_path)
    wanted = {"top_p": 0.9, "do_sample": True, "eos_token_id": [1, 2]}
    (tmp_path / "generation_config.json").write_text(json.dumps(wanted | {"auths": 1}))
    assert kept.read_generation(tmp_path) == wanted


@pytest.mark.parametrize(
    "header",
    [
        "[" * 200_000,
        '{"a.weight": {"dtype": "F32", "data_offsets": [0, 1e999]}}',
        '{"a.weight": {"dtype": [], "data_offsets": [0, 0]}}',
    ],
    ids=["deep", "endless", "no type"],
)
def test_a_header_that_was_made_up_is_an_error(tmp_path: Path, header: str) -> None:
    folder = model_folder(tmp_path / "m")
    data = len(header).to_bytes(8, "little") + header.encode()
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ConfigError):
        check_folder(folder)
