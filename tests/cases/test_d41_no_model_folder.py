"""D41, --model: what the path really is, and what to do."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from tests.cases.support import model_folder, xpeer
from xpeer.cli import main

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


def test_a_name_of_the_hub(tmp_path: Path) -> None:
    done = xpeer("init", "--swarm", "s", "--home", "h", "--model", "org/name", cwd=tmp_path)
    assert done.returncode == 8
    assert "download" in done.stderr, "it should say that org/name has to be downloaded first"
    assert "hf download org/name --local-dir name" in done.stderr
    assert "--model name" in done.stderr


def without(folder: Path, *names: str, **files: str) -> Path:
    for name in names:
        (folder / name).unlink()
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return folder


def _gguf(path: Path) -> Path:
    (path / "x.gguf").write_bytes(b"GGUF")
    return path / "x.gguf"


def _adapters(path: Path) -> Path:
    folder = path / "adapters"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


def _empty(path: Path) -> Path:
    (path / "empty").mkdir()
    return path / "empty"


def _index(path: Path) -> Path:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    folder = without(model_folder(path / "m"), "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    return folder


def _cut(path: Path) -> Path:
    file = model_folder(path / "m") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    return path / "m"


def _below(path: Path) -> Path:
    model_folder(path / "m" / "inner")
    return path / "m"


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("was-run"),))  # type: ignore[return-value]


def _evil(path: Path) -> Path:
    folder = without(model_folder(path / "m"), "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": _Evil()}, protocol=2))
    return folder


KINDS = {
    "a gguf file": (_gguf, ["GGUF", "original model"]),
    "a gguf folder": (lambda p: _gguf(p).parent, ["GGUF"]),
    "weights": (
        lambda p: model_folder(p / "m") / "model.safetensors", ["one file", "give the folder"],
    ),
    "adapters": (_adapters, ["adapters of peft", "org/base", "merge"]),
    "empty": (_empty, ["the folder is empty"]),
    "one folder too high": (_below, ["inner"]),
    "no weights": (
        lambda p: without(model_folder(p / "m"), "model.safetensors"),
        ["no weights", "--model-config"],
    ),
    "TensorFlow": (
        lambda p: without(model_folder(p / "m"), "model.safetensors", tf_model__h5="x"),
        ["tf_model.h5", "TensorFlow"],
    ),
    "a pointer of git-lfs": (
        lambda p: without(model_folder(p / "m"), model__safetensors=POINTER),
        ["git lfs pull", "model.safetensors"],
    ),
    "a pointer as config": (
        lambda p: without(model_folder(p / "m"), config__json=POINTER), ["git lfs pull"],
    ),
    "a missing part": (_index, ["2 of 2 parts", "model-1.safetensors"]),
    "cut off": (_cut, ["damaged", "again"]),
    "a pickle that runs something": (_evil, ["can't be loaded"]),
    "an address": (
        lambda _p: Path("https://huggingface.co/org/name"), ["hf download org/name"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_is_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    make, told = KINDS[kind]
    done = CliRunner().invoke(
        main, ["init", "--swarm", "s", "--home", "h", "--model", str(make(tmp_path))]
    )
    assert done.exit_code == 8, done.output
    assert all(part in done.stderr for part in told), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not Path("h").exists()
    assert not Path("was-run").exists()


def test_a_pickle_of_weights_is_read_without_running_it(tmp_path: Path) -> None:
    from xpeer.founding_model import initial_model

    folder = model_folder(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert initial_model(folder, None, None).num_params == 34_720
