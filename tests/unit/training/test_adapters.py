"""Adapters alone are trained, exchanged, saved and exported."""

from __future__ import annotations

import asyncio
import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from tests.unit.daemon.fakes import BETA, FakeNode
from tests.unit.trainer.processes import (
    Watch,
    from_peer,
    parameters_of,
    with_config,
)
from tests.unit.training.homes import make_homes
from xpeer.cli import main
from xpeer.config import Home
from xpeer.errors import ConfigError
from xpeer.founding_model import PRESETS, LoraOptions, initial_model
from xpeer.manifest.model import Lora
from xpeer.manifest.signed import SignedManifest
from xpeer.trainer.build import assemble
from xpeer.trainer.client import TrainerProcess
from xpeer.trainer.setup import TrainerSetup
from xpeer.training import checkpoint
from xpeer.training.adapters import adapt, factor_pairs, merged
from xpeer.training.flat import digest, read_flat
from xpeer.training.initial import model_of
from xpeer.training.loop import TrainingLoop
from xpeer.training.model import build, from_folder

RANK = 4
LORA = Lora(rank=RANK, alpha=8.0, seed=5, base_digest="")
IDS = torch.arange(24).view(2, 12)


def tiny(seed: int = 1) -> torch.nn.Module:
    torch.set_num_threads(1)
    return build(PRESETS["tiny"], seed=seed)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def test_the_same_adapters_at_every_member() -> None:
    torch.manual_seed(1)
    one = adapt(tiny(), LORA)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    two = adapt(tiny(), LORA)
    assert torch.equal(torch.get_rng_state(), before)
    other = adapt(tiny(), msgspec.structs.replace(LORA, seed=6))
    assert digest(read_flat(one)) == digest(read_flat(two)) != digest(read_flat(other))
    trained = {n: p for n, p in one.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert read_flat(one).numel() == 2 * RANK * (4 * (64 + 64) + 3 * (64 + 176))
    torch.testing.assert_close(logits(one), logits(tiny()))  # B is zero at the start


def test_the_layers_that_are_named_and_no_others() -> None:
    one = adapt(tiny(), msgspec.structs.replace(LORA, targets=["q_proj", "v_proj"]))
    names = {
        n.split(".lora_")[0].split(".")[-1] for n, p in one.named_parameters() if p.requires_grad
    }
    assert names == {"q_proj", "v_proj"}
    for wrong in ("nothing", "embed_tokens"):
        with pytest.raises(ConfigError, match=r"model\.lora\.targets"):
            adapt(tiny(), msgspec.structs.replace(LORA, targets=[wrong]))


def test_without_peft_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name == "peft":
            raise ModuleNotFoundError("No module named 'peft'", name="peft")
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="peft is not installed") as raised:
        adapt(tiny(), LORA)
    assert "xpeer[lora]" in raised.value.remedy


def test_a_founders_model_keeps_its_weights() -> None:
    source = initial_model(None, None, "tiny", LoraOptions(RANK, targets=("q_proj",)))
    assert source.lora is not None
    assert (source.lora.rank, source.lora.alpha) == (RANK, 2.0 * RANK)
    assert source.lora.base_digest == digest(read_flat(source.module))  # not adapted itself
    assert source.num_params == 2 * RANK * (64 + 64)


@pytest.fixture(scope="module")
def setups(tmp_path_factory: pytest.TempPathFactory) -> list[TrainerSetup]:
    return make_homes(
        tmp_path_factory.mktemp("adapters"),
        2,
        privacy="record",
        changes=("end.steps=500", "round.fragments=1"),
        lora=LoraOptions(RANK),
    )


async def test_two_peers_train_and_average_adapters(setups: list[TrainerSetup]) -> None:
    watches = Watch(), Watch()
    a, b = await asyncio.gather(
        *(TrainerProcess.start(s, w) for s, w in zip(setups, watches, strict=True))
    )
    try:
        assert a.num_params == b.num_params == 2 * RANK * (4 * 128 + 3 * 240)
        await asyncio.gather(*(w.step(3) for w in watches))
        await asyncio.gather(a.run("pause"), b.run("pause"))
        before = await parameters_of(a, b)
        assert not np.array_equal(before[0], before[1])
        ours, theirs = await asyncio.gather(*(t.snapshot(0, 0, averaging=False) for t in (a, b)))
        assert ours.form.num_values == a.num_params
        assert ours.stamp.mode == "record"
        await asyncio.gather(a.verify(0, 1, from_peer(theirs)), b.verify(0, 1, from_peer(ours)))
        await asyncio.gather(a.merge(0, {1: 0.5}), b.merge(0, {1: 0.5}))
        after = await parameters_of(a, b)
    finally:
        await asyncio.gather(a.kill(), b.kill())
    np.testing.assert_allclose(sum(after), sum(before), atol=1e-6)
    apart = [float(np.linalg.norm(x - y)) for x, y in (before, after)]
    assert apart[1] < 0.1 * apart[0]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21
def test_an_export_loads_in_peft_and_names_its_base(
    setups: list[TrainerSetup], tmp_path: Path
) -> None:
    from peft import PeftModel

    home = Path(setups[0].home)
    assembled = assemble(setups[0])
    assembled.trainer.run(2)
    base = [p.clone() for p in assembled.model.parameters() if not p.requires_grad]
    assembled.trainer.run(2)
    frozen = [p for p in assembled.model.parameters() if not p.requires_grad]
    assert all(torch.equal(x, y) for x, y in zip(base, frozen, strict=True))
    assembled.checkpoints.copy()()
    spent = assembled.spent()
    assembled.close()
    model = assembled.model.eval()
    manifest = SignedManifest.load(home / "manifest.json").open()
    assert manifest.model.lora is not None

    def export(*more: str) -> None:
        command = ["checkpoint", "export", "--home", str(home), *more]
        result = CliRunner().invoke(main, command, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert "exported step" in result.stderr

    export("--hf", str(tmp_path / "adapters"))
    names = {path.name for path in (tmp_path / "adapters").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "base_model.json"} <= names
    named = json.loads((tmp_path / "adapters" / "base_model.json").read_text())
    assert named["blake2b_256"] == manifest.model.lora.base_digest
    assert (tmp_path / "adapters" / "adapter_model.safetensors").stat().st_size < 100_000
    loaded = PeftModel.from_pretrained(from_folder(home / "initial"), tmp_path / "adapters").eval()
    torch.testing.assert_close(logits(loaded), logits(model))
    ledger = home / "ledger.sqlite"
    ledger.rename(tmp_path / "kept")  # what it cost can't be told without it
    command = ["checkpoint", "export", "--home", str(home), "--hf", str(tmp_path / "none")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert "was made with privacy ledger" in result.output
    assert not (tmp_path / "none").exists()
    (tmp_path / "kept").rename(ledger)
    export("--merged", "--hf", str(tmp_path / "whole"))
    torch.testing.assert_close(
        logits(from_folder(tmp_path / "whole").eval()), logits(model), rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(logits(from_folder(home / "initial").eval()), logits(model))
    for name in ("adapters", "whole"):
        words = (tmp_path / name / "README.md").read_text()
        card = json.loads((tmp_path / name / "privacy.json").read_text())
        assert 0 < spent.epsilon_spent <= card["epsilon_spent"] < spent.epsilon_spent + 0.5
        assert f"epsilon at most {card['epsilon_target']:g}" in words
        assert f"epsilon = {card['epsilon_spent']:g} at" in words


def test_a_joiner_names_its_own_copy_of_the_base(
    setups: list[TrainerSetup], tmp_path: Path
) -> None:
    home = tmp_path / "joiner"
    shutil.copytree(setups[1].home, home)
    shutil.rmtree(home / "checkpoints", ignore_errors=True)
    shutil.move(home / "initial", tmp_path / "copy")
    setup = msgspec.structs.replace(setups[1], home=str(home), initial="awaited")
    with pytest.raises(ConfigError, match=r"data\.base_model is not set"):
        assemble(setup)
    assembled = assemble(with_config(setup, "data", base_model=str(tmp_path / "copy")))
    manifest = SignedManifest.load(home / "manifest.json").open()
    assert assembled.trainer.parameters.num_params == manifest.model.num_params
    assert digest(assembled.trainer.parameters.read()) == manifest.model.initial_digest
    assembled.close()
    from xpeer.training.model import export_hf

    other = tmp_path / "other"
    export_hf(tiny(seed=9), None, other)
    with pytest.raises(ConfigError, match="is not the one that the swarm's adapters are for"):
        assemble(with_config(setup, "data", base_model=str(other)))


def test_merged_weights_do_what_adapters_did() -> None:
    model = adapt(tiny(), LORA).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05)
    expected = logits(model)
    torch.testing.assert_close(logits(merged(model)), expected, rtol=1e-4, atol=1e-5)


def test_checkpoints_hold_adapters_alone(setups: list[TrainerSetup]) -> None:
    assembled = assemble(setups[1])
    assembled.checkpoints.copy()()
    assembled.close()
    bundle, _ = checkpoint.load_latest(Path(setups[1].home) / "checkpoints")
    assert bundle is not None
    assert bundle.flat.numel() == 2 * RANK * (4 * 128 + 3 * 240)


def test_found_with_adapters(tmp_path: Path) -> None:
    home = tmp_path / "home"
    result = CliRunner().invoke(
        main,
        ["init", "--home", str(home), "--swarm", "s", "--preset", "tiny", "--lora-rank", "2",
         "--lora-target", "q_proj"],
        catch_exceptions=False,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "512 parameters of adapters" in result.stderr
    manifest = SignedManifest.load(home / "manifest.json").open()
    assert manifest.model.lora is not None
    assert (manifest.model.lora.alpha, manifest.model.lora.targets) == (4.0, ["q_proj"])
    assert manifest.model.num_params == 512
    refused = CliRunner().invoke(
        main, ["init", "--home", str(tmp_path / "x"), "--swarm", "s", "--lora-alpha", "3"]
    )
    assert refused.exit_code == 8
    assert "--lora-rank" in refused.stderr


def exchange_all(a: TrainingLoop, b: TrainingLoop, first_id: int) -> None:
    """Exchange and merge every fragment once, between two loops in this process."""
    for fragment in range(a.exchanges.fragments.num_fragments):
        meeting, sent = first_id + fragment, []
        for loop in (a, b):
            private = loop.snapshot(meeting, fragment, averaging=False)
            sent.append(loop.exchanges.compress(meeting, private))
        for loop, theirs in ((a, sent[1]), (b, sent[0])):
            loop.exchanges.verify(meeting, 1, from_peer(theirs))
            loop.exchanges.resolve(meeting, {1: 0.5})
            loop.merge(meeting)


def test_a_pair_whose_adapters_drifted_apart_is_misaligned_and_one_in_step_is_not(
    tmp_path: Path,
) -> None:
    setups = make_homes(
        tmp_path,
        2,
        changes=("end.steps=500", "optimiser.learning_rate=0.02", "round.codec=float32"),
        lora=LoraOptions(RANK),
    )
    opened = [assemble(setup) for setup in setups]
    a, b = (each.trainer for each in opened)
    node = FakeNode(BETA)
    for loop in (a, b):
        loop.run(60)  # alone
    assert a.progress().adapter_misalignment is None
    apart = [read_products(each.model) for each in opened]
    exchange_all(a, b, 1)
    assert not a.counters.merges_clipped
    a.measure()
    exact = relative((apart[0] + apart[1]) / 2, read_products(opened[0].model))
    assert a.progress().adapter_misalignment == pytest.approx(exact, rel=0.02)
    assert exact > 0.05
    node.node.follow_trainer("training", a.progress())
    assert node.codes == ["adapters-misaligned"]
    assert f"loses {exact:.0%} of what they do" in node.text("adapters-misaligned")

    exchange_all(a, b, 101)  # they are the same by now
    a.measure()
    lost = a.progress().adapter_misalignment
    assert lost is not None
    assert lost < 1e-4
    node.node.follow_trainer("training", a.progress())
    assert node.codes == []
    for each in opened:
        each.close()


def read_products(adapted: torch.nn.Module) -> torch.Tensor:
    """B A of all layers, dense and flat."""
    flat = read_flat(adapted)
    made = [pair.of(flat) for pair in factor_pairs(adapted)]
    return torch.cat([(b @ a).flatten() for b, a in made])


def relative(exact: torch.Tensor, other: torch.Tensor) -> float:
    return float((exact - other).norm() / exact.norm())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21
def test_with_b_alone_a_is_drawn_by_everybody_and_averaging_is_exact(tmp_path: Path) -> None:
    setups = make_homes(
        tmp_path,
        2,
        privacy="record",
        changes=("end.steps=500", "optimiser.learning_rate=0.02", "round.codec=float32"),
        lora=LoraOptions(RANK, train="B"),
    )
    setups[1] = msgspec.structs.replace(setups[1], initial="awaited")
    opened = [assemble(setup) for setup in setups]
    a, b = (each.trainer for each in opened)
    assert a.parameters.num_params == 2 * RANK * (4 * 64 + 2 * 176 + 64)
    drawn = [factors_a(each.model) for each in opened]
    assert torch.equal(*drawn)
    b.replace(a.parameters.read(), step=0)
    for loop in (a, b):
        loop.run(10)
    assert all(torch.equal(factors_a(each.model), drawn[0]) for each in opened)
    opened[0].checkpoints.copy()()
    expected = logits(opened[0].model.eval())
    before = [dense_products(each.model) for each in opened]
    assert relative(*before) > 0.1
    exchange_all(a, b, 1)
    assert not a.counters.merges_clipped
    mean = (before[0] + before[1]) / 2
    for each in opened:
        assert relative(mean, dense_products(each.model)) < 1e-6
    a.measure()
    assert a.progress().adapter_misalignment == 0.0
    assert 0 < opened[0].spent().epsilon_spent < 8
    for each in opened:
        each.close()

    from peft import PeftModel

    home = Path(setups[0].home)
    made = export(home, tmp_path / "adapters")
    assert "exported step" in made.stderr
    loaded = PeftModel.from_pretrained(from_folder(home / "initial"), tmp_path / "adapters").eval()
    torch.testing.assert_close(logits(loaded), expected)
    assert any("lora_A" in name for name, _ in loaded.named_parameters())


def test_another_a_than_the_founders_is_refused(tmp_path: Path) -> None:
    [setup] = make_homes(tmp_path, 1, lora=LoraOptions(RANK, train="B"))
    manifest = SignedManifest.load(Path(setup.manifest_path)).open()
    lora = manifest.model.lora
    assert lora is not None
    assert len(lora.fixed_digest) == 64
    for wrong in ({"seed": lora.seed ^ 1}, {"fixed_digest": ""}):
        model = msgspec.structs.replace(manifest.model, lora=msgspec.structs.replace(lora, **wrong))
        with pytest.raises(ConfigError, match="are not those that the swarm starts from"):
            model_of(msgspec.structs.replace(manifest, model=model), Home(Path(setup.home)))


def factors_a(adapted: torch.nn.Module) -> torch.Tensor:
    named = adapted.named_parameters()
    return torch.cat([p.detach().flatten() for n, p in named if ".lora_A." in n])


def dense_products(adapted: torch.nn.Module) -> torch.Tensor:
    """B A of all layers, whatever is trained."""
    known = {n: p.detach().double() for n, p in adapted.named_parameters()}
    names = [n for n in known if ".lora_A." in n]
    return torch.cat([(known[n.replace("lora_A", "lora_B")] @ known[n]).flatten() for n in names])


def export(home: Path, to: Path, *more: str) -> Result:
    command = ["checkpoint", "export", "--home", str(home), "--hf", str(to), *more]
    result = CliRunner().invoke(main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_b_alone_needs_adapters(tmp_path: Path) -> None:
    arguments = ["init", "--home", str(tmp_path / "x"), "--swarm", "s", "--lora-train", "B"]
    refused = CliRunner().invoke(main, arguments)
    assert (refused.exit_code, "--lora-train needs --lora-rank" in refused.stderr) == (8, True)
