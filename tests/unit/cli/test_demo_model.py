"""`xpeer demo --model`: its flow with the real command line, without daemons or training."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from tests import fake_swarm
from tests.cases.support import model_folder, tokenizer_folder
from xpeer.cli import main
from xpeer.cli.demo import flow, plan
from xpeer.cli.demo.exported import BATCH_RECORDS, loss_of_export
from xpeer.cli.demo.heldout import HeldOut, average_of, mean
from xpeer.cli.demo.report import samples_of, words_of
from xpeer.config import Home
from xpeer.errors import ExitCode
from xpeer.manifest.signed import SignedManifest
from xpeer.training.checkpoint import load_latest
from xpeer.training.flat import write_flat
from xpeer.training.initial import model_of
from xpeer.training.model import from_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    tokenizer_folder(model_folder(made))
    return made


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A socket's path in a home below pytest's own folder may be too long."""
    with tempfile.TemporaryDirectory(prefix="xd-") as folder:
        yield Path(folder)


def test_adapters_of_a_given_model_from_text_to_export(
    short_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_swarm.install(monkeypatch)
    short = replace(
        plan.MODEL, steps=fake_swarm.STEPS, sequence_tokens=32, batch_records=4, held_out_records=4,
        shard_bytes=300_000, curve_steps=1, reply_tokens=3,
    )  # fmt: skip
    demo = flow.Demo(short_path, 1, short, folder)
    report = demo.run()

    assert report.unit == "token"
    assert report.model == str(folder)
    # the swarm and the two lone runs, each of adapters of that model
    assert len(calls.inits()) == 3
    for words in calls.inits():
        assert words[words.index("--model") + 1] == str(folder)
        assert "--lora-rank" in words
    manifest = SignedManifest.load(Home(short_path / "run" / "python").manifest).open()
    assert manifest.model.lora is not None
    assert manifest.model.lora.targets == ["down_proj"]
    assert manifest.tokenizer.kind != "byte"
    started = demo._processes.started  # type: ignore[attr-defined] # FakeDaemons
    for name in ("headers", "licences"):  # joiners have no config.toml that would say so
        settings = started[name][1]
        assert settings["XPEER_DATA_BASE_MODEL"] == settings["XPEER_DATA_TOKENIZER"] == str(folder)
    # one peer alone, at two rates, of which the better one counts
    alone = {peer.corpus: peer for peer in report.peers if peer.alone_by_kind}
    assert list(alone) == ["python"]
    assert alone["python"].alone_learning_rate in plan.MODEL.alone_rates
    assert report.loss_alone_averaged is None
    for peer in report.peers:
        assert [step for step, _ in peer.swarm_curve] == [0, fake_swarm.STEPS]
        assert peer.loss_swarm != pytest.approx(report.loss_start, abs=1e-6)
    # plain transformers and peft compute what the node's own model has
    assert report.loss_exported == pytest.approx(report.peers[0].loss_swarm, abs=1e-3)
    lines = words_of(report)
    assert any("to save time only python trained alone" in line for line in lines)
    assert any("loaded by transformers and peft alone" in line for line in lines)
    assert [sample.corpus for sample in report.samples] == list(plan.PROMPTS)
    assert any(sample.before != sample.after for sample in report.samples)
    assert len(samples_of(report)) == 9


def test_a_given_model_is_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    words = ["demo", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, words, prog_name="xpeer")
    assert done.exit_code == ExitCode.BAD_CONFIG
    assert "config.json" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("quick", [False, True])
def test_a_quick_plan_has_no_lone_runs(given: bool, quick: bool) -> None:
    chosen = plan.choose(given, quick, "off")
    assert chosen.privacy == "off"
    assert bool(chosen.alone_rates) is not quick
    assert (chosen.reply_tokens > 0) is given


def test_losses_of_an_export_weight_all_records_alike(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    records = torch.randint(0, 300, (BATCH_RECORDS + 3, 16), generator=generator)
    parts = {"a": records, "b": records[:5]}
    ours = HeldOut(parts, from_folder(folder))
    assert loss_of_export(folder, None, ours.parts) == pytest.approx(
        mean(ours.of_start()), abs=1e-5
    )


def test_the_average_of_lone_adapters_is_that_of_whole_models(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, nodes = fake_swarm.install(monkeypatch), fake_swarm.FakeDaemons(tmp_path / "logs")
    start = dict(from_folder(folder).named_parameters())
    last = "model.layers.0.mlp.down_proj"
    homes, moved = [], []
    for name in ("a", "b"):
        home = Home(tmp_path / name)
        calls(
            ["init", "--home", str(home.path), "--swarm", name, "--model", str(folder), *plan.LORA,
             "--listen", flow.LOOPBACK, "--set", "optimiser.sequence_tokens=32",
             "--set", "round.fragments=1"]
        )  # fmt: skip
        nodes.start(name, ["start", "--home", str(home.path)], {})
        manifest = SignedManifest.load(home.manifest).open()
        model = model_of(manifest, home, str(folder))
        write_flat(model, load_latest(home.checkpoints)[0].flat)  # type: ignore[union-attr]
        factors = {n: p for n, p in model.named_parameters() if last in n and "lora" in n}
        a, b = (factors[f"base_model.model.{last}.lora_{x}.default.weight"] for x in "AB")
        moved.append(start[f"{last}.weight"] + 2 * b @ a)
        homes.append(home)
    assert not torch.allclose(moved[0], moved[1])  # each drew an A of its own
    averaged = from_folder(folder)
    write_flat(averaged, average_of(homes, str(folder)))
    found = dict(averaged.named_parameters())
    assert torch.allclose(found[f"{last}.weight"], (moved[0] + moved[1]) / 2, atol=1e-6)
    untouched = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(found[untouched], start[untouched])
