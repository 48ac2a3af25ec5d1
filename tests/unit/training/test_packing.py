"""Short records in one row: each has the loss and the gradient that it has alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import masking_utils

from benchmarks.families.models import FAMILIES, VOCABULARY
from tests.unit.training.homes import make_homes
from xpeer.config import Training
from xpeer.manifest.signed import SignedManifest
from xpeer.privacy.clipping import trainable
from xpeer.privacy.mechanism import OffMechanism
from xpeer.privacy.options import Options
from xpeer.trainer.build import assemble
from xpeer.trainer.computing import computing_of
from xpeer.training import packing
from xpeer.training.losses import record_losses
from xpeer.training.model import build
from xpeer.training.packing import PackedLosses, choose_packing
from xpeer.training.records import FILL

T = 96
SIZES = (96, 20, 9, 50, 8, 96, 33, 12, 60)
"""Two full ones, and one that is longer than the sliding windows of 32."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def records(sizes: tuple[int, ...] = SIZES) -> torch.Tensor:
    """The first half of each record's tokens is read only, but for the first record."""
    made = torch.randint(0, VOCABULARY, (len(sizes), T), generator=torch.Generator().manual_seed(1))
    for record, size in zip(made, sizes, strict=True):
        record[size:] = FILL
    for record, size in zip(made[1:], sizes[1:], strict=True):
        record[: size // 2] = -2 - record[: size // 2]
    return made


def alone(model: torch.nn.Module, record: torch.Tensor) -> torch.Tensor:
    """The loss of one record by itself, without anything of ours."""
    kept = record[record != FILL]
    ids = kept.where(kept >= 0, -2 - kept)
    logits = model(input_ids=ids[None]).logits[0, :-1]
    return cross_entropy(logits, kept[1:].where(kept[1:] >= 0, -100), reduction="sum")


def family(name: str) -> torch.nn.Module:
    return build(dict(FAMILIES[name]), seed=1)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3, text", "mistral", "gpt2"])
def test_losses_and_gradients_are_those_of_the_records_one_by_one(name: str) -> None:
    model = family(name)
    packed, note = choose_packing(model, T)
    assert packed is not None, note
    passes = packed.divide(records(), 2)
    assert sum(map(len, passes)) == len(SIZES)
    wanted = torch.stack([alone(model, record) for part in passes for record in part])
    found = [packed(model, part) for part in passes]
    torch.testing.assert_close(torch.cat([losses for losses, _ in found]), wanted)
    counted = [int((record[1:] >= 0).sum()) for part in passes for record in part]
    assert torch.cat([tokens for _, tokens in found]).tolist() == counted
    total = torch.cat([losses for losses, _ in found]).sum()
    for mine, plain in zip(
        torch.autograd.grad(total, trainable(model)),
        torch.autograd.grad(wanted.sum(), trainable(model)),
        strict=True,
    ):
        torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-5)


def rows_of(packed: PackedLosses, part: torch.Tensor) -> tuple[int, int]:
    """Rows and width of what the model computes."""
    seen: list[torch.Tensor] = []
    before = packed._losses

    def noting(ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(ids)
        return before(ids, *rest)

    packed._losses = noting
    packed(torch.nn.Identity(), part)
    packed._losses = before
    ((rows, width),) = [tuple(ids.shape) for ids in seen]
    return rows, width


def test_a_pass_has_no_more_rows_than_it_may_and_little_filling() -> None:
    packed = PackedLosses(family("llama"))
    many = records((96, 40, 8) * 16)
    shapes = [rows_of(packed, part) for part in packed.divide(many, 4)]
    assert max(rows for rows, _ in shapes) == 4
    computed = sum(rows * width for rows, width in shapes)
    assert 16 * (95 + 39 + 7) <= computed < 16 * (95 + 39 + 7) * 1.15


def test_rows_are_narrow_where_records_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_WIDTH", 24)
    monkeypatch.setattr(packing, "_STEP", 8)
    packed = PackedLosses(family("llama"))
    shapes = [rows_of(packed, part) for part in packed.divide(records((96, 12, 9, 13) * 16), 2)]
    assert max(rows * width for rows, width in shapes) <= 2 * (T - 1)
    # 16 rows of 95 alone; 8 of 12 + 12, 8 of 11 + 11 and 5 of 8 + 8 + 8, seven in a pass; one of 8
    assert shapes == [*[(2, 95)] * 8, (1, 8), *[(7, 24)] * 3]


def test_full_records_are_computed_as_without_packing() -> None:
    packed = PackedLosses(family("llama"))
    full = records((T,) * 5)
    passes = packed.divide(full, 2)
    for mine, usual in zip(passes, torch.split(full, 2), strict=True):
        assert torch.equal(mine, usual)
        assert rows_of(packed, mine) == (len(usual), T - 1)


@pytest.mark.parametrize("name", ["bloom", "opt", "llama, rope dynamic"])
def test_a_family_that_does_not_keep_them_apart_is_not_packed(name: str) -> None:
    """Bloom takes no positions, and OPT makes no mask where they begin anew. Dynamic scaling goes
    by the longest record of a pass.
    """
    packed, note = choose_packing(family(name), T)
    assert packed is None
    assert f"not packed: {FAMILIES[name]['model_type']}" in note


def test_records_that_see_one_another_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda _: None)
    assert choose_packing(family("llama"), T)[0] is None


def test_a_step_has_the_same_gradient_in_fewer_rows(tmp_path: Path) -> None:
    (setup,) = make_homes(tmp_path, 1, privacy="off", changes=("optimiser.batch_records=9",))
    manifest = SignedManifest.load(Path(setup.manifest_path)).open()
    model = family("llama")
    packed = PackedLosses(model)
    results = []
    for losses, divide in ((record_losses, None), (packed, packed.divide)):
        options = Options(micro_batch=2, divide=divide)
        mechanism = OffMechanism(manifest, model, records(), losses, options)
        found = mechanism.step_gradient()
        results.append((found, [p.grad.clone() for p in trainable(model) if p.grad is not None]))
    (usual, wanted), (result, got) = results
    assert (result.records, result.tokens) == (usual.records, usual.tokens)
    assert result.loss == pytest.approx(usual.loss, rel=1e-5)
    for mine, plain in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("pack", "mode"), [("auto", "off"), ("off", "off"), ("auto", "record")])
def test_only_without_privacy_and_unless_the_operator_says_no(
    tmp_path: Path, pack: Any, mode: Any
) -> None:
    sigma = ("privacy.noise_multiplier=2",) if mode == "record" else ()
    (setup,) = make_homes(tmp_path, 1, privacy=mode, changes=sigma)
    manifest = SignedManifest.load(Path(setup.manifest_path)).open()
    settings = Training(pack=pack)
    found = computing_of(settings, family("llama"), torch.device("cpu"), manifest)
    packs = (pack, mode) == ("auto", "off")
    assert (found.packed is not None) == packs
    assert any("packed" in note for note in found.notes) == packs


def test_a_trainer_packs(tmp_path: Path) -> None:
    (setup,) = make_homes(tmp_path, 1, privacy="off")
    node = assemble(setup)
    assert any("short records are packed" in note for note in node.beginning.notes)
    node.trainer.run(1)
    assert node.trainer.counters.tokens > 0
    node.close()
