"""`xpeer generate` and `xpeer eval`, of a home's checkpoint, an export, and adapters."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from tests.cases.support import model_folder, tokenizer_folder
from xpeer.cli import main
from xpeer.errors import ConfigError, ExitCode
from xpeer.manifest.model import Lora, Model
from xpeer.training import adapters, trained
from xpeer.training.export import export_adapters, export_hf
from xpeer.training.flat import digest, read_flat
from xpeer.training.model import from_folder
from xpeer.training.tokenizer import HuggingFaceTokenizer

TEXT = "The quick brown fox jumps over the lazy dog, again and again. " * 9


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    model_folder(folder)
    tokenizer_folder(folder)
    return folder


def xpeer(*arguments: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, [str(a) for a in arguments], prog_name="xpeer")
    return done.exit_code, done.stdout, done.stderr


def by_hand(model: torch.nn.Module, ids: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0].double()
    return float(-torch.log_softmax(logits, -1)[range(len(ids) - 1), ids[1:]].sum())


def test_each_token_but_the_first_is_predicted_once(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trained, "BATCH_RECORDS", 3)
    monkeypatch.setattr(trained, "LONGEST_RECORD", 50)
    made = trained.from_export(base)
    assert made.tokenizer.bos_id == 0
    assert made.tokenizer.eos_id == 1
    ids = [0, *made.tokenizer.encode(TEXT), 1]
    found = trained.evaluate_text(made, TEXT)
    assert found.tokens == len(ids) - 1
    assert found.bytes == len(TEXT.encode())
    by_parts = sum(by_hand(made.model, ids[at : at + 50]) for at in range(0, len(ids) - 1, 49))
    assert found.nats == pytest.approx(by_parts, rel=1e-5)


def test_eval_of_an_export(base: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    model = from_folder(base)
    export_hf(model, HuggingFaceTokenizer(base), tmp_path / "export")
    options: list[str | Path] = ["--model", tmp_path / "export", "--text", tmp_path / "text"]
    code, out, err = xpeer("eval", *options, "--json")
    assert code == ExitCode.OK, err
    found = json.loads(out)
    assert found["loss_per_token"] == pytest.approx(math.log(300), abs=0.5)
    assert found["loss_per_byte"] * found["bytes"] == pytest.approx(
        found["loss_per_token"] * found["tokens"]
    )
    code, out, err = xpeer("eval", *options)
    assert f"{found['loss_per_token']:.4f} nats per token" in out
    code, _, err = xpeer("eval", "--model", tmp_path / "export", "--text", tmp_path / "none")
    assert code == ExitCode.BAD_CONFIG
    assert "--text" in err


def test_generate_repeats_with_its_seed(base: Path) -> None:
    options: list[str | Path] = ["generate", "--model", base, "--prompt", "The", "--tokens", "8"]
    code, first, err = xpeer(*options, "--temperature", "1", "--seed", "3")
    assert code == ExitCode.OK, err
    assert xpeer(*options, "--temperature", "1", "--seed", "3")[1] == first
    assert len({xpeer(*options, "--temperature", "1", "--seed", str(n))[1] for n in range(4)}) > 1
    assert json.loads(xpeer(*options, "--json")[1])["prompt"] == "The"
    assert xpeer(*options, "--temperature", "nan")[0] == ExitCode.BAD_CONFIG


def test_adapters_need_their_own_base(base: Path, tmp_path: Path) -> None:
    model = from_folder(base)
    lora = Lora(rank=2, alpha=4.0, seed=1, base_digest=digest(read_flat(model)))
    adapted = adapters.adapt(model, lora)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    folder = tmp_path / "adapters"
    section = Model({}, 1, "", lora, "tiny")
    export_adapters(adapted, section, HuggingFaceTokenizer(base), folder)
    made = trained.from_export(folder, base)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.allclose(made.model(input_ids=ids).logits, adapted(input_ids=ids).logits)
    with pytest.raises(ConfigError, match="--base-model is not set"):
        trained.from_export(folder)
    other = tmp_path / "other"
    model_folder(other, initializer_range=0.03)
    with pytest.raises(ConfigError, match="the adapters are for"):
        trained.from_export(folder, other)


def test_a_home_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    code, _, err = xpeer("init", "--home", tmp_path / "h", "--swarm", "s", "--preset", "tiny")
    assert code == ExitCode.OK, err
    code, _, err = xpeer("generate", "--home", tmp_path / "h", "--prompt", "a")
    assert code == ExitCode.ERROR
    assert "there is no checkpoint" in err


def test_a_folder_without_a_tokenizer_names_the_option(tmp_path: Path) -> None:
    model_folder(tmp_path / "bare")
    code, _, err = xpeer("generate", "--model", tmp_path / "bare", "--prompt", "a")
    assert code == ExitCode.BAD_CONFIG
    assert "--tokenizer" in err
