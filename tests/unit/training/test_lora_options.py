"""Layers by name and pattern, rsLoRA, and adapters that somebody trained before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from click.testing import CliRunner, Result

from tests.unit.training.homes import make_homes
from tests.unit.training.test_adapters import LORA, RANK, dense_products, logits, tiny
from xpeer.cli import main
from xpeer.config import Home
from xpeer.errors import ConfigError
from xpeer.founding_model import INITIAL_RECORDS, LoraOptions
from xpeer.manifest import Tokenizer
from xpeer.manifest.model import BaseDtype, Lora, Model
from xpeer.manifest.signed import SignedManifest
from xpeer.trainer.build import assemble
from xpeer.training import adapters, targets
from xpeer.training.document import document_of
from xpeer.training.flat import digest, digest_of, read_flat
from xpeer.training.held import hold
from xpeer.training.initial import model_of
from xpeer.training.losses import evaluate
from xpeer.training.measuring import spread
from xpeer.training.model import export_hf
from xpeer.training.records import cut
from xpeer.training.tokenizer import load_tokenizer

BASE = "model.layers.0.self_attn."


@pytest.mark.parametrize(
    ("given", "found", "count"),
    [
        ([], [], 14),
        (["all-linear"], [], 14),
        (["v_proj", "q_proj", "q_proj"], ["q_proj", "v_proj"], 4),
        (["layers.0.self_attn.q_proj"], [f"{BASE}q_proj"], 1),
        ([r".*layers\.0\..*(q|v)_proj"], [f"{BASE}q_proj", f"{BASE}v_proj"], 2),
        ([r".*\.(q|v)_proj"], ["q_proj", "v_proj"], 4),
    ],
)
def test_layers_by_name_or_pattern(given: list[str], found: list[str], count: int) -> None:
    model = tiny()
    assert targets.find(model, given) == found
    adapted = adapters.adapt(model, msgspec.structs.replace(LORA, targets=found))
    layers = {n.partition(".lora_")[0] for n, _ in adapted.named_parameters() if ".lora_A." in n}
    assert len(layers) == count


@pytest.mark.parametrize("wrong", ["nothing", "proj", ".*nothing.*", "embed_tokens"])
def test_an_unknown_layer_is_answered_with_those_that_there_are(wrong: str) -> None:
    with pytest.raises(ConfigError, match="it has down_proj \\(2\\), gate_proj \\(2\\)") as raised:
        targets.find(tiny(), ["q_proj", wrong])
    assert repr(wrong) in raised.value.problem
    with pytest.raises(ConfigError, match="no regular expression"):
        targets.find(tiny(), ["*q_proj"])


def section(lora: Lora, dtype: BaseDtype = "float32") -> Model:
    """What a manifest says of a model with these adapters."""
    return Model({}, 1, "", lora, base_dtype=dtype)


def trained(model: torch.nn.Module, **fields: object) -> torch.nn.Module:
    """With adapters that do something."""
    adapted = adapters.adapt(model, msgspec.structs.replace(LORA, **fields)).eval()
    torch.manual_seed(4)
    with torch.no_grad():
        for _, factor in adapters.factors(adapted):
            factor.add_(0.1 * torch.randn_like(factor))
    return adapted


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21
def test_rank_stabilised_adapters_scale_by_the_root_of_the_rank(tmp_path: Path) -> None:
    one = trained(tiny(), rank_stabilised=True)
    other = trained(tiny(), alpha=LORA.alpha * RANK**0.5)
    torch.testing.assert_close(logits(one), logits(other))
    assert not torch.allclose(logits(one), logits(trained(tiny())))
    adapters.write(one, section(LORA), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_rslora"] is True
    torch.testing.assert_close(logits(adapters.attach(tiny(), tmp_path).eval()), logits(one))


def test_a_founder_goes_on_with_adapters_and_joiners_get_them(tmp_path: Path) -> None:
    before = trained(tiny(), targets=["q_proj", "v_proj"], rank_stabilised=True)
    (tmp_path / "old").mkdir()
    adapters.write(before, section(LORA), tmp_path / "old")
    setups = make_homes(tmp_path, 2, lora=LoraOptions(folder=tmp_path / "old"))
    setups[1] = msgspec.structs.replace(setups[1], initial="awaited")
    manifest = SignedManifest.load(Path(setups[0].manifest_path)).open()
    lora = manifest.model.lora
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.rank_stabilised, lora.given) == (RANK, 8.0, True, True)
    assert lora.targets == ["q_proj", "v_proj"]

    founder, joiner = (assemble(setup) for setup in setups)
    assert torch.equal(dense_products(founder.model), dense_products(before))
    assert digest(founder.trainer.parameters.read()) == manifest.model.initial_digest
    assert digest(joiner.trainer.parameters.read()) != manifest.model.initial_digest
    joiner.trainer.replace(founder.trainer.parameters.read(), step=0)
    assert torch.equal(dense_products(joiner.model), dense_products(before))
    for each in (founder, joiner):
        each.close()
    weights = Path(setups[0].home) / "initial" / "adapters" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + bytes(8))
    with pytest.raises(ConfigError, match="not those that the swarm starts from"):
        assemble(setups[0])


def init(home: Path, *more: object) -> Result:
    command = ["init", "--home", str(home), "--swarm", "s", *map(str, more)]
    return CliRunner().invoke(main, command, catch_exceptions=False)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21
def test_found_with_these_options(tmp_path: Path) -> None:
    export_hf(tiny(), None, tmp_path / "base")
    made = init(tmp_path / "one", "--model", tmp_path / "base", "--lora-rank", 2,
                "--lora-target", "q_proj,v_proj", "--lora-target", r".*layers\.1\.mlp\..*",
                "--lora-rank-stabilised", "--skip-trial")  # fmt: skip
    assert made.exit_code == 0, made.stderr
    lora = SignedManifest.load(tmp_path / "one" / "manifest.json").open().model.lora
    assert lora is not None
    mlp = [f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")]
    assert lora.targets == ["q_proj", "v_proj", *mlp]
    assert (lora.rank_stabilised, lora.given) == (True, False)

    old = trained(tiny())
    (tmp_path / "old").mkdir()
    named = msgspec.structs.replace(LORA, base_digest=digest(read_flat(tiny())))
    adapters.write(old, section(named), tmp_path / "old")
    arguments = "--model", tmp_path / "base", "--lora-from", tmp_path / "old"
    made = init(tmp_path / "two", *arguments)  # with the trial: it trains and exports
    assert made.exit_code == 0, made.stderr
    manifest = SignedManifest.load(tmp_path / "two" / "manifest.json").open()
    assert manifest.model.initial_digest == digest(read_flat(old))

    for more, why in (
        (("--lora-rank", 4), "--lora-from does not go with --lora-rank"),
        (("--lora-train", "B"), "--lora-from does not go with --lora-train"),
    ):
        refused = init(tmp_path / "three", *arguments, *more)
        assert (refused.exit_code, why in refused.stderr) == (8, True), refused.stderr
    export_hf(tiny(seed=9), None, tmp_path / "other")
    refused = init(tmp_path / "three", "--model", tmp_path / "other", "--lora-from",
                   tmp_path / "old")  # fmt: skip
    assert refused.exit_code == 8
    assert "are for weights with BLAKE2b-256" in refused.stderr


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21
def test_the_base_is_held_as_the_given_adapters_were_trained_with_it(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    export_hf(tiny(), None, tmp_path / "base")
    held = digest_of(hold(tiny(), torch.bfloat16), torch.bfloat16)
    named = msgspec.structs.replace(LORA, base_digest=held)
    adapters.write(trained(tiny()), section(named, "bfloat16"), tmp_path / "old")
    arguments = "--model", tmp_path / "base", "--lora-from", tmp_path / "old", "--skip-trial"
    refused = init(tmp_path / "one", *arguments, "--base-dtype", "float32")
    assert refused.exit_code == 8
    assert "held in bfloat16" in refused.stderr
    made = init(tmp_path / "one", *arguments)
    assert made.exit_code == 0, made.stderr
    model = SignedManifest.load(tmp_path / "one" / "manifest.json").open().model
    assert model.base_dtype == "bfloat16"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21
@pytest.mark.parametrize("first", [True, False, "gaussian", "orthogonal", "eva"])
def test_given_adapters_compute_what_peft_computes_of_them(tmp_path: Path, first: Any) -> None:
    """With all settings that change nothing: of dropout, of the layers, of how they were drawn."""
    import peft

    export_hf(tiny(), None, tmp_path / "base")
    config = peft.LoraConfig(
        r=2, lora_alpha=3, lora_dropout=0.1, use_rslora=True, target_modules=["q_proj", "v_proj"],
        layers_to_transform=[1], task_type="CAUSAL_LM",
    )  # fmt: skip
    old = peft.get_peft_model(tiny(), config)
    torch.manual_seed(4)
    with torch.no_grad():
        for _, factor in adapters.factors(old):
            factor.copy_(0.3 * torch.randn_like(factor))
    old.peft_config["default"].init_lora_weights = first
    if first == "eva":
        old.peft_config["default"].eva_config = peft.EvaConfig()
    old.save_pretrained(str(tmp_path / "old"))

    made = init(tmp_path / "home", "--model", tmp_path / "base", "--lora-from", tmp_path / "old",
                "--skip-trial", "--skip-estimate")  # fmt: skip
    assert made.exit_code == 0, made.stderr
    home = Home(tmp_path / "home")
    manifest = SignedManifest.load(home.path / "manifest.json").open()
    founded = model_of(manifest, home, "", fresh=True).eval()
    theirs = peft.PeftModel.from_pretrained(tiny(), str(tmp_path / "old")).eval()
    torch.testing.assert_close(logits(founded), logits(theirs))
    document = document_of(manifest.public_text.text, "public text")
    records = cut([document], load_tokenizer(Tokenizer()), manifest.optimiser.sequence_tokens)
    some = spread(records, INITIAL_RECORDS)
    loss = evaluate(founded, some)
    assert manifest.public_text.initial_loss == pytest.approx(loss, rel=1e-4)
    worse = loss > evaluate(tiny(), some)
    assert ("with the adapters of --lora-from, and" in made.stderr) == worse
    assert not torch.allclose(logits(founded), logits(tiny().eval()))


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("peft_type", "IA3", "not LoRA"),
        ("use_dora", True, "use_dora is True"),
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("rank_pattern", {"q_proj": 8}, "rank_pattern"),
        *(
            ("init_lora_weights", kind, f"init_lora_weights is {kind}")
            for kind in ("pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga", "mica")
        ),
        ("alora_invocation_tokens", [1, 2], "alora_invocation_tokens"),
        ("use_bdlora", {"nblocks": 2}, "use_bdlora"),
        ("kasa_config", {"beta": 1e-4}, "kasa_config"),
        ("monteclora_config", {"x": 1}, "monteclora_config"),
        ("velora_config", {"x": 1}, "velora_config"),
        ("megatron_config", {"x": 1}, "megatron_config"),
        ("ensure_weight_tying", True, "ensure_weight_tying"),
        ("of_a_later_version", 3, "of_a_later_version is 3"),
        ("r", 0, "r is 0"),
    ],
)
def test_adapters_of_another_kind_are_refused(
    tmp_path: Path, field: str, value: object, why: str
) -> None:
    from xpeer.training import given_adapters

    adapters.write(trained(tiny()), section(LORA), tmp_path)
    config = tmp_path / "adapter_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, field: value}))
    with pytest.raises(ConfigError, match=why):
        given_adapters.read(tmp_path)
    config.write_text(json.dumps(content))
    made = given_adapters.read(tmp_path)
    with pytest.raises(ConfigError, match=r"is missing; the model needs|is 4 x|needs missing"):
        made.write_to(trained(tiny(), targets=["q_proj"]))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"none")
    with pytest.raises(ConfigError, match="can't be read"):
        given_adapters.read(tmp_path)
