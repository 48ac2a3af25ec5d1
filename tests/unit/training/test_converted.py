"""A base in another type than nodes hold it in is converted on the disk, and read from there."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.cases.support import model_folder, tokenizer_folder
from tests.unit.test_trial import init
from tests.unit.trainer.processes import with_config
from tests.unit.training.homes import make_homes
from xpeer.cli import main
from xpeer.config import Home
from xpeer.errors import LocalError
from xpeer.founding_model import LoraOptions
from xpeer.manifest.model import BaseDtype, Lora, Model
from xpeer.manifest.signed import SignedManifest
from xpeer.trainer.build import assemble
from xpeer.training import adapters, converted
from xpeer.training.export import export_adapters, export_hf
from xpeer.training.flat import digest_of
from xpeer.training.held import DTYPES
from xpeer.training.kept import Source
from xpeer.training.model import from_folder, read_config
from xpeer.training.tokenizer import HuggingFaceTokenizer


def half(folder: Path, family: str = "llama", to: str = "float16") -> Path:
    """A folder with a model of 16 bits."""
    whole = from_folder(model_folder(folder / "whole", family))
    export_hf(
        whole, None, folder / to, source=Source({**read_config(folder / "whole"), "dtype": to})
    )
    return folder / to


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[set[torch.dtype]]:
    """Types of the matrices in the folders that transformers reads."""
    found: list[set[torch.dtype]] = []
    real = AutoModelForCausalLM.from_pretrained

    def from_pretrained(folder: Path, **options: Any) -> Any:
        tensors = load_file(Path(folder) / "model.safetensors").values()
        found.append({tensor.dtype for tensor in tensors if tensor.dim() > 1})
        return real(folder, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    return found


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_the_model_that_was_converted_in_memory(
    tmp_path: Path, read: list[set[torch.dtype]], family: str, dtype: torch.dtype
) -> None:
    folder, near = half(tmp_path, family), tmp_path / "home" / "cache"
    read.clear()
    usual, ours = from_folder(folder, dtype=dtype), from_folder(folder, dtype=dtype, near=near)
    assert read == [{torch.float16}, {dtype}]
    for kind in ("named_parameters", "named_buffers"):
        theirs, mine = (dict(getattr(made, kind)()) for made in (usual, ours))
        assert theirs.keys() == mine.keys()
        for name, value in theirs.items():
            assert (value.dtype, mine[name].dtype) == (value.dtype, value.dtype)
            assert torch.equal(value, mine[name]), name
    assert not list(near.iterdir()), "what is loaded needs no names of files"


def test_what_has_the_type_already_is_read_as_it_is(tmp_path: Path) -> None:
    folder, near = half(tmp_path, to="bfloat16"), tmp_path / "cache"
    from_folder(folder, dtype=torch.bfloat16, near=near)
    assert not near.exists()
    assert converted.bytes_of(folder, torch.bfloat16) == 0
    size = (folder / "model.safetensors").stat().st_size
    assert converted.bytes_of(folder, torch.float32) == pytest.approx(2 * size, rel=0.05)


def test_a_joiner_converts_in_its_home(tmp_path: Path, read: list[set[torch.dtype]]) -> None:
    (setup,) = make_homes(tmp_path, 1, lora=LoraOptions(2, base_dtype="bfloat16"))
    home = Home(Path(setup.home))
    manifest = SignedManifest.load(home.manifest).open()
    founders = from_folder(home.initial_model)
    kept = Source({**manifest.model.config, "dtype": "float32"})
    export_hf(founders, None, tmp_path / "copy", source=kept)
    read.clear()
    made = assemble(with_config(setup, "data", base_model=str(tmp_path / "copy")))
    made.close()
    assert read == [{torch.bfloat16}]
    assert not list(home.cache.glob(".writing-*"))


@pytest.mark.parametrize("adapters", [True, False])
def test_a_founder_converts_what_stays_frozen_beside_its_home(
    tmp_path: Path, read: list[set[torch.dtype]], adapters: bool
) -> None:
    """Weights that are trained are memory in any case."""
    folder, beside = half(tmp_path), tmp_path / "beside"
    beside.mkdir()
    home, options = beside / "new" / "home", ["--lora-rank", "2"] if adapters else []
    read.clear()
    code, err = init(home, "--model", str(folder), "--skip-trial", "--skip-estimate", *options)
    assert code == 0, err
    assert read[0] == {torch.bfloat16 if adapters else torch.float16}
    assert [path.name for path in beside.iterdir()] == ["new"]


@pytest.mark.parametrize("there", [True, False])
def test_a_founder_converts_in_its_home_if_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """A service's user can't write beside it, and it may be a disk of its own."""
    folder, beside = half(tmp_path), tmp_path / "beside"
    home, used = beside / "home", list[Path]()
    (home if there else beside).mkdir(parents=True, mode=0o700)
    left = (home if there else beside) / ".home.writing-abc"
    left.mkdir()
    (left / "model.safetensors").touch()  # a conversion was killed
    real = converted._convert

    def convert(folder: Path, to: Path, dtype: torch.dtype) -> None:
        used.append(to)
        real(folder, to, dtype)

    monkeypatch.setattr(converted, "_convert", convert)
    code, err = init(
        *(home, "--model", str(folder), "--skip-trial", "--skip-estimate", "--lora-rank", "2")
    )
    assert code == 0, err
    assert used[0].parent.parent == (home if there else beside)
    assert not used[0].exists()
    assert [path.name for path in beside.iterdir()] == ["home"]
    assert not list(home.glob(".*"))


def test_a_folder_of_others_is_not_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, beside = half(tmp_path), tmp_path / "beside"
    beside.mkdir()

    def refused(*_: object, **__: object) -> str:
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refused)
    with pytest.raises(LocalError, match="Permission denied") as start:
        from_folder(folder, dtype=torch.bfloat16, near=beside)
    assert "let this user write there" in start.value.remedy
    code, err = init(
        *(beside / "home", "--model", str(folder), "--skip-trial", "--skip-estimate"),
        *("--lora-rank", "2"),
    )
    assert code
    assert f"{beside} can't be written: Permission denied" in err
    assert f"make the folder {beside / 'home'} first" in err


def adapters_for(folder: Path, base: Path, dtype: BaseDtype) -> Path:
    """An export of adapters that were trained on a base in this type, with a tokenizer."""
    model = from_folder(base, dtype=DTYPES[dtype])
    lora = Lora(2, 4.0, seed=1, base_digest=digest_of(model, DTYPES[dtype]))
    section = Model({}, 1, "", lora, "tiny", base_dtype=dtype)
    tokenizer = HuggingFaceTokenizer(tokenizer_folder(folder / "tokenizer"))
    export_adapters(adapters.adapt(model, lora), section, tokenizer, folder / "adapters")
    return folder / "adapters"


@pytest.mark.parametrize("command", [("eval", "--text"), ("generate", "--tokens=2", "--prompt")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_commands_convert_the_base_of_adapters_on_a_disk(
    tmp_path: Path,
    read: list[set[torch.dtype]],
    command: tuple[str, ...],
    dtype: BaseDtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, disk, text = half(tmp_path), tmp_path / "disk", tmp_path / "text"
    exported = adapters_for(tmp_path, base, dtype)
    disk.mkdir()
    text.write_text("The quick brown fox jumps over the lazy dog.")
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    read.clear()
    options = [*command, str(text), "--model", str(exported), "--base-model", str(base)]
    done = CliRunner().invoke(main, options)
    assert done.exit_code == 0, done.output
    assert read == [{DTYPES[dtype]}]
    assert not list(disk.iterdir())


def test_large_files_are_not_put_where_memory_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    monkeypatch.setattr(converted, "_LARGE_FILES", tmp_path)
    assert converted.temporary() == tmp_path
    monkeypatch.setattr(converted, "_LARGE_FILES", tmp_path / "missing")
    assert converted.temporary() == Path("/tmp")
    monkeypatch.setattr(tempfile, "tempdir", "/elsewhere")
    assert converted.temporary() == Path("/elsewhere")


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = half(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(converted, "save_file", full)
    with pytest.raises(LocalError, match="No space left") as refused:
        from_folder(folder, dtype=torch.bfloat16, near=tmp_path / "cache")
    assert "data.base_model" in refused.value.remedy
    assert not list((tmp_path / "cache").iterdir())
