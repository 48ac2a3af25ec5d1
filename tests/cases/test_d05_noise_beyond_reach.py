"""D05: noise moved positions that no record is long enough to reach."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cases.homes import assembled, export, found_here, train
from tests.cases.support import model_folder, skipping, tokenizer_folder, write_shard

FIELDS = ("optimiser.sequence_tokens=32", "optimiser.weight_decay=0.1")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return found


def test_noise_leaves_positions_beyond_the_record(tmp_path: Path, shard: Path) -> None:
    model = model_folder(tmp_path / "model", "gpt2")
    tokens, home = tokenizer_folder(tmp_path / "tokenizer"), tmp_path / "home"
    found_here(
        home, shard, "--model", model, "--tokenizer", tokens,
        fields=(*FIELDS, "end.steps=40"),
    )  # fmt: skip
    train(home, 40)
    name = "transformer.wpe.weight"
    before, after = weights(model)[name], weights(export(home, tmp_path / "out"))[name]
    moved = (after - before)[32:].norm() / before[32:].norm()
    assert float(moved) == 0, f"rows 32 to 127 of the positions moved by {float(moved):.0%}"
    assert not torch.equal(after[:31], before[:31])
    assert torch.equal(after[31:], before[31:])  # what comes after the last token isn't predicted


UNTIED = {"tie_word_embeddings": False}


@pytest.mark.parametrize(
    ("family", "config", "kept"),
    [
        # OPT's positions begin with two rows that are never looked up
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32},
         {"model.decoder.embed_positions.weight": (2, 33)}),
        # rows of an input embedding beyond the tokenizer's ids; the output's are reached
        ("llama", {"vocab_size": 320, **UNTIED}, {"model.embed_tokens.weight": (0, 300)}),
        ("llama", {"vocab_size": 320, "tie_word_embeddings": True}, {}),
        # experts are reached by some text, if not by this one
        ("mixtral", {"num_local_experts": 4, **UNTIED}, {}),
    ],
)  # fmt: skip
def test_two_shards_freeze_the_same_and_no_more(
    tmp_path: Path, family: str, config: dict[str, object], kept: dict[str, tuple[int, int]]
) -> None:
    from xpeer.manifest.signed import SignedManifest

    model = model_folder(tmp_path / "model", family, **config)
    tokens = tokenizer_folder(tmp_path / "tokenizer")
    before, frozen = weights(model), []
    for name, text in (("a", "aaa bbb "), ("b", "Zyx! 789 ")):
        shard = write_shard(tmp_path / f"text-{name}", 0)
        for n in range(9):
            (shard / f"{n}.txt").write_text(text * (40 + n))
        home = tmp_path / name
        again = skipping() if name == "b" else []  # a trial is of the model, and that is the same
        found_here(home, shard, "--model", model, "--tokenizer", tokens, *again, fields=FIELDS)
        part = SignedManifest.load(home / "manifest.json").open().model
        frozen.append(part.frozen)
        assert {
            k: tuple(v) for k, v in (part.frozen.parameters if part.frozen else {}).items()
        } == kept
        train(home, 2)
        after = weights(export(home, tmp_path / f"out-{name}"))
        for key, (first, end) in kept.items():
            assert torch.equal(after[key][:first], before[key][:first])
            assert torch.equal(after[key][end:], before[key][end:])
        same = {k for k in before if torch.equal(before[k], after[k])}
        assert not same  # noise reaches every row that is trained
        for key, value in after.items():
            if value.dim() < 2:  # a single number may come back to where it was
                continue
            first, end = kept.get(key, (0, len(value)))
            still = (value[first:end] == before[key][first:end]).reshape(end - first, -1)
            assert not bool(still.all(1).any()), key
    assert frozen[0] == frozen[1]


def test_a_joiner_gets_what_is_frozen_and_refuses_anything_else(
    tmp_path: Path, shard: Path
) -> None:
    from xpeer.errors import PeerError
    from xpeer.training import checkpoint

    model = model_folder(tmp_path / "model", "gpt2")
    tokens, home = tokenizer_folder(tmp_path / "tokenizer"), tmp_path / "home"
    found_here(home, shard, "--model", model, "--tokenizer", tokens, fields=FIELDS)
    donor = assembled(home)
    values = donor.frozen.read()
    assert values.numel() == (128 - 31) * 32
    donor.close()
    (home / "initial").rename(tmp_path / "aside")
    joiner = assembled(home, initial="awaited")
    assert joiner.trainer.parameters.num_params == donor.trainer.parameters.num_params
    assert not torch.equal(joiner.frozen.read(), values)
    with pytest.raises(PeerError, match="frozen values"):
        joiner.frozen.replace(values + 1)
    joiner.frozen.replace(values)
    joiner.trainer.replace(donor.trainer.parameters.read(), 0)
    joiner.checkpoints.copy()()
    joiner.close()
    bundle, _ = checkpoint.load_latest(home / "checkpoints")
    assert bundle is not None
    assert torch.equal(bundle.frozen, values)
    resumed = assembled(home)
    assert torch.equal(resumed.frozen.read(), values)
    resumed.close()
    written = weights(export(home, tmp_path / "out"))
    assert all(torch.equal(written[k], v) for k, v in weights(model).items())
