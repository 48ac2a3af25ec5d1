from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from xpeer.cli import main
from xpeer.config import Home
from xpeer.errors import ConfigError, LocalError
from xpeer.identity import Identity, blake2b
from xpeer.manifest import End, Manifest, PublicText
from xpeer.manifest.model import Model
from xpeer.manifest.signed import SignedManifest
from xpeer.training import checkpoint, model, tensor_file
from xpeer.training.checkpoint import Bundle, load, load_latest, save
from xpeer.training.checkpoint_files import paths, saved_at, step_of
from xpeer.training.tensor_file import CorruptFileError

P = 50


def bundle(step: int, num_params: int = P) -> Bundle:
    generator = torch.Generator().manual_seed(step)
    return Bundle(
        flat=torch.randn(num_params, generator=generator),
        exp_avg=torch.randn(num_params, generator=generator),
        exp_avg_sq=torch.rand(num_params, generator=generator),
        optimiser_step=step,
        rule={"anchor.0": torch.full((7,), float(step)), "residual": torch.zeros(2)},
        counters={"step": step, "tokens": 7 * step, "seconds": 0.5},
        ledger_id="a1",
        manifest_hash="b2",
    )


def same(one: Bundle, two: Bundle) -> bool:
    names = ("flat", "exp_avg", "exp_avg_sq")
    equal = all(torch.equal(getattr(one, name), getattr(two, name)) for name in names)
    equal = equal and one.rule.keys() == two.rule.keys()
    equal = equal and all(torch.equal(one.rule[name], two.rule[name]) for name in one.rule)
    rest = ("optimiser_step", "counters", "ledger_id", "manifest_hash", "step")
    return equal and all(getattr(one, name) == getattr(two, name) for name in rest)


def test_when_a_checkpoint_was_saved_is_known_by_its_name(tmp_path: Path):
    for step in (3, 8):
        os.utime(save(tmp_path, bundle(step)), (0, 1000 + step))
    assert [saved_at(tmp_path, step) for step in (2, 3, 7, 100)] == [None, 1003, 1003, 1008]
    assert saved_at(tmp_path / "gone", 3) is None


def test_what_is_saved_is_loaded(tmp_path: Path):
    folder = tmp_path / "new" / "checkpoints"
    path = save(folder, bundle(3))
    assert path.name == "ckpt-000000003.safetensors"
    loaded, warnings = load_latest(folder)
    assert loaded is not None
    assert same(loaded, bundle(3))
    assert warnings == []
    assert list(folder.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_no_checkpoint_is_no_error(tmp_path: Path):
    assert load_latest(tmp_path) == (None, [])
    assert load_latest(tmp_path / "missing") == (None, [])


def test_only_the_newest_are_kept(tmp_path: Path):
    for step in range(5):
        save(tmp_path, bundle(step), keep=2)
    assert [step_of(p) for p in paths(tmp_path)] == [4, 3]
    save(tmp_path, bundle(9), keep=1)
    assert [step_of(p) for p in paths(tmp_path)] == [9]


def test_a_later_state_that_was_given_up_does_not_come_back(tmp_path: Path):
    save(tmp_path, bundle(8))
    save(tmp_path, bundle(10))
    save(tmp_path, bundle(9))
    loaded, _ = load_latest(tmp_path)
    assert loaded is not None
    assert loaded.step == 9
    assert [step_of(p) for p in paths(tmp_path)] == [9, 8]


def test_steps_beyond_nine_digits_still_sort(tmp_path: Path):
    save(tmp_path, bundle(999_999_999))
    save(tmp_path, bundle(1_000_000_000))
    assert [step_of(p) for p in paths(tmp_path)] == [1_000_000_000, 999_999_999]


def test_truncated_at_any_byte_the_previous_one_is_loaded(tmp_path: Path):
    save(tmp_path, bundle(1))
    newest = save(tmp_path, bundle(2))
    data = newest.read_bytes()
    for length in range(0, len(data), 3):
        newest.write_bytes(data[:length])
        loaded, warnings = load_latest(tmp_path)
        assert loaded is not None
        assert same(loaded, bundle(1))
        assert len(warnings) == 1
        assert str(newest) in warnings[0]
    newest.write_bytes(data)
    loaded, warnings = load_latest(tmp_path)
    assert loaded is not None
    assert loaded.step == 2
    assert warnings == []


def test_every_flipped_byte_is_found(tmp_path: Path):
    path = save(tmp_path, bundle(1, num_params=8))
    data = bytearray(path.read_bytes())
    for position in range(len(data)):
        data[position] ^= 0x10
        path.write_bytes(data)
        with pytest.raises((CorruptFileError, LocalError)):
            load(path)
        data[position] ^= 0x10
    path.write_bytes(data)
    assert same(load(path), bundle(1, num_params=8))


def resident_bytes(path: Path) -> int:
    """Memory of this process that pages of a file take."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


def test_a_loaded_checkpoint_takes_memory_only_while_it_is_read(tmp_path: Path):
    written = bundle(1, num_params=1 << 20)
    path = save(tmp_path, written)
    loaded = load(path)
    assert resident_bytes(path) < 1 << 20  # it was verified without
    float(loaded.flat.sum())
    assert resident_bytes(path) >= loaded.flat.nbytes
    loaded.forget()
    assert resident_bytes(path) == 0
    assert same(loaded, written)


def test_a_file_that_is_replaced_does_not_change_what_was_loaded(tmp_path: Path):
    path = save(tmp_path, bundle(1))
    loaded = load(path)
    save(tmp_path, bundle(2), keep=1)
    assert not path.exists()
    loaded.forget()
    assert same(loaded, bundle(1))


def test_no_silent_fresh_start(tmp_path: Path):
    for step in (1, 2):
        save(tmp_path, bundle(step)).write_bytes(b"")
    with pytest.raises(LocalError, match=r"ckpt-000000002.*ckpt-000000001.*backup"):
        load_latest(tmp_path)


def test_a_foreign_safetensors_file_is_no_checkpoint(tmp_path: Path):
    path = tmp_path / "ckpt-000000001.safetensors"
    save_file({"flat": torch.zeros(1)}, path)
    with pytest.raises(CorruptFileError, match="not written by xpeer"):
        load(path)
    tensor_file.write_tensors(path, {"flat": torch.zeros(1)}, {})
    with pytest.raises(CorruptFileError, match="metadata"):
        load(path)


def test_another_format_is_said_not_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint, "SCHEMA_VERSION", 2)
    save(tmp_path, bundle(1))
    monkeypatch.undo()
    with pytest.raises(LocalError, match="format 2, this version reads 1"):
        load_latest(tmp_path)


def partial_write(error: Exception) -> Callable[..., None]:
    def write(_tensors: Any, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise error

    return write


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        RuntimeError("unexpected pos 64 vs 0: No space left on device"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_a_full_disk_leaves_the_old_one_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    old = save(tmp_path, bundle(1))
    monkeypatch.setattr(tensor_file, "save_file", partial_write(error))
    with pytest.raises(LocalError, match=r"No space left.*check free space"):
        save(tmp_path, bundle(2))
    assert list(tmp_path.iterdir()) == [old]
    loaded, warnings = load_latest(tmp_path)
    assert loaded is not None
    assert (loaded.step, warnings) == (1, [])


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_an_error_at_the_end_of_a_write_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
):
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    old = save(tmp_path, bundle(1))
    with monkeypatch.context() as patched:
        patched.setattr(*((os, "fsync", fail) if moment == "fsync" else (Path, "replace", fail)))
        with pytest.raises(LocalError, match="Input/output error"):
            save(tmp_path, bundle(2))
    assert list(tmp_path.iterdir()) == [old]


def test_what_a_killed_writer_left_is_ignored_and_removed(tmp_path: Path):
    save(tmp_path, bundle(1))
    left = tmp_path / ".writing-abc"
    left.mkdir()
    (left / "ckpt-000000002.safetensors").write_bytes(b"half")
    loaded, warnings = load_latest(tmp_path)
    assert loaded is not None
    assert (loaded.step, warnings) == (1, [])
    save(tmp_path, bundle(3))
    assert not left.exists()


def test_it_belongs_to_a_manifest_a_ledger_and_a_model():
    good = bundle(1)
    good.require("b2", "a1", P)
    with pytest.raises(ConfigError, match="of manifest b2"):
        good.require("c3", "a1", P)
    with pytest.raises(ConfigError, match=r"ledger a1.*twice"):
        good.require("b2", "c3", P)
    with pytest.raises(LocalError, match="50 parameters, the model 51"):
        good.require("b2", "a1", P + 1)


def adamw(parameters: list[torch.nn.Parameter], fused: bool) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.01, fused=fused)


def room(parameters: list[torch.nn.Parameter]) -> tuple[torch.Tensor, torch.Tensor]:
    size = sum(p.numel() for p in parameters)
    return torch.full((size,), 7.0), torch.full((size,), 7.0)


def some_parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, 4), (5,), ()]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def take_steps(
    optimiser: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], seeds: range
) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimiser.step()


@pytest.mark.parametrize("fused", [False, True])
def test_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path, fused: bool):
    straight, first = some_parameters(), some_parameters()
    take_steps(adamw(straight, fused), straight, range(6))

    optimiser = adamw(first, fused)
    take_steps(optimiser, first, range(3))
    exp_avg, exp_avg_sq, step = checkpoint.read_moments(optimiser, first, room(first))
    flat = torch.cat([p.detach().reshape(-1) for p in first])
    save(tmp_path, Bundle(flat, exp_avg, exp_avg_sq, step, counters={"step": 3}))

    loaded, _ = load_latest(tmp_path)
    assert loaded is not None
    second = some_parameters()
    with torch.no_grad():
        for p, part in zip(second, loaded.flat.split([12, 5, 1]), strict=True):
            p.copy_(part.view_as(p))
    resumed = adamw(second, fused)
    checkpoint.write_moments(
        resumed, second, loaded.exp_avg, loaded.exp_avg_sq, loaded.optimiser_step
    )
    take_steps(resumed, second, range(3, 6))
    for one, two in zip(straight, second, strict=True):
        assert torch.equal(one, two)


def test_moments_of_a_fresh_optimiser_stay_fresh():
    parameters = some_parameters()
    optimiser = adamw(parameters, fused=False)
    exp_avg, exp_avg_sq, step = checkpoint.read_moments(optimiser, parameters, room(parameters))
    assert step == 0
    assert not exp_avg.any()
    checkpoint.write_moments(optimiser, parameters, exp_avg, exp_avg_sq, step)
    assert not optimiser.state
    with pytest.raises(LocalError, match="do not fit"):
        checkpoint.write_moments(optimiser, parameters, torch.zeros(3), torch.zeros(3), 1)


# ---- the command line ------------------------------------------------------------------------

TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 259,
    "max_position_embeddings": 32,
    "bos_token_id": 256,
    "eos_token_id": 257,
}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path / "home")
    made.path.mkdir()
    public = PublicText(digest=blake2b(b"text").hex(), text="text")
    manifest = Manifest(
        name="t",
        created_unix_s=0,
        model=Model(config=TINY, num_params=1, initial_digest=""),
        public_text=public,
        end=End(steps=1),
    )
    signed = SignedManifest.sign(manifest, Identity.generate())
    made.manifest.write_bytes(signed.to_bytes())
    return made


def run(home: Home, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["checkpoint", *arguments, "--home", str(home.path)])


def save_model(home: Home, step: int) -> torch.nn.Module:
    made = model.build(TINY, seed=step)
    flat = model.read_flat(made)
    zeros = torch.zeros_like(flat)
    save(home.checkpoints, Bundle(flat, zeros, zeros.clone(), 0, counters={"step": step}))
    return made


def test_list(home: Home):
    empty = run(home, "list")
    assert (empty.exit_code, empty.stdout) == (0, "")
    assert "no checkpoints in" in empty.stderr
    save_model(home, 1)
    save_model(home, 20)
    listed = run(home, "list").stdout.splitlines()
    assert [line.split()[1] for line in listed] == ["20", "1"]
    rows = json.loads(run(home, "list", "--json").stdout)
    assert [row["step"] for row in rows] == [20, 1]
    assert rows[0]["bytes"] == Path(rows[0]["path"]).stat().st_size


def test_verify(home: Home):
    save_model(home, 1)
    save_model(home, 2)
    assert run(home, "verify").exit_code == 0
    newest = paths(home.checkpoints)[0]
    newest.write_bytes(newest.read_bytes()[:-1])
    result = run(home, "verify", "--json")
    assert result.exit_code == 1
    assert [bool(row["problem"]) for row in json.loads(result.stdout)] == [True, False]
    assert "damaged" in run(home, "verify").stdout


def test_export_needs_no_daemon(home: Home, tmp_path: Path):
    save_model(home, 1)
    trained = save_model(home, 2)
    folder = tmp_path / "out"
    result = run(home, "export", "--hf", str(folder))
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == str(folder)
    assert "exported step 2" in result.stderr
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Grüße", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [list("Grüße".encode())]
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    assert torch.equal(
        loaded(input_ids=ids).logits, trained(input_ids=ids, position_ids=positions).logits
    )
    again = run(home, "export", "--hf", str(folder))
    assert again.exit_code == 8
    assert "not empty" in again.stderr


def test_export_passes_over_a_damaged_one_aloud(home: Home, tmp_path: Path):
    save_model(home, 1)
    save_model(home, 2)
    paths(home.checkpoints)[0].write_bytes(b"")
    result = run(home, "export", "--hf", str(tmp_path / "out"))
    assert result.exit_code == 0
    assert "warning: checkpoint" in result.stderr
    assert "exported step 1" in result.stderr


def test_export_without_a_checkpoint_or_of_another_model(home: Home, tmp_path: Path):
    result = run(home, "export", "--hf", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "there is no checkpoint" in result.stderr
    save(home.checkpoints, bundle(1))
    result = run(home, "export", "--hf", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "belongs to another model" in result.stderr
    assert not (tmp_path / "out").exists()


def test_save_needs_the_daemon(home: Home):
    assert run(home, "save").exit_code == 3
