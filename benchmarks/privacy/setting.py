"""Model, text, public start and manifests of the privacy benchmark.

The public text is the first kind that `simulator.corpora` finds; each of the others is one peer's
private shard. A record is 64 bytes. Everybody starts from the same model, warmed up on the public
text: private training from nothing teaches little.
"""

from __future__ import annotations

import functools
from typing import Any, Final, Literal

import torch

from benchmarks.simulator import corpora
from xpeer.founding_model import PRESETS
from xpeer.identity import blake2b
from xpeer.manifest import End, Manifest, Optimiser, PublicText
from xpeer.manifest.model import Model
from xpeer.manifest.privacy import Privacy
from xpeer.manifest.round import Round
from xpeer.policies import RULES
from xpeer.training.flat import read_flat
from xpeer.training.losses import record_losses
from xpeer.training.model import build

PEERS: Final = 4
RECORD_TOKENS: Final = 64
FRAGMENTS: Final = 5
WINDOW_STEPS: Final = 5
WARMUP_STEPS: Final = 5
"""Of the learning rate."""
CONFIG: Final[dict[str, Any]] = {
    **PRESETS["tiny"],
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
}
"""A byte-level Llama of 0.36 M parameters."""

START_STEPS: Final = 200
START_BATCH: Final = 32
START_RATE: Final = 3e-3

EPSILONS: Final[tuple[float | None, ...]] = (None, 8.0, 2.0)
"""None: privacy off."""


@torch.no_grad()
def losses_by_record(model: torch.nn.Module, records: torch.Tensor) -> torch.Tensor:
    """Mean nats per byte of each of (n, T) records, (n,) float32."""
    out = []
    for part in torch.split(records, 64):
        losses, counts = record_losses(model, part)
        out.append(losses / counts.clamp(min=1))
    return torch.cat(out)


@functools.cache
def shards() -> tuple[torch.Tensor, ...]:
    """The peers' records, each (n, RECORD_TOKENS) int64."""
    return tuple(_records(corpus) for corpus in corpora.collect(PEERS + 1)[1:])


@functools.cache
def held_out() -> tuple[torch.Tensor, torch.Tensor]:
    """Mixed text of all peers: one set to tune by, one to report."""
    return corpora.held_out(corpora.collect(PEERS + 1)[1:], RECORD_TOKENS)


def kinds() -> list[str]:
    """Of the peers' text."""
    return [corpus.kind for corpus in corpora.collect(PEERS + 1)[1:]]


@functools.cache
def public_start(seed: int, steps: int = START_STEPS) -> torch.Tensor:
    """Parameters after a warm-up on the public text, (P,) float32.

    Args:
        seed: of the initial parameters and of the batches.
        steps: of the warm-up.
    """
    records = _records(corpora.collect(PEERS + 1)[0])
    model = build(CONFIG, seed=seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=START_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, START_RATE, total_steps=max(2, steps), pct_start=0.15
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(records), (START_BATCH,), generator=generator)
        losses, counts = record_losses(model, records[chosen])
        optimiser.zero_grad()
        torch.autograd.backward(losses.sum() / counts.sum())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return read_flat(model)


def manifest_of(
    epsilon: float | None,
    *,
    rate: float,
    batch: int,
    steps: int,
    rule: Literal["gossip", "gradient"] = "gossip",
    num_params: int = 1,
) -> Manifest:
    """As a founder would write it; sigma is calibrated by every peer.

    Args:
        epsilon: None = privacy.mode off.
        rate: peak of the learning rate.
        batch: expected records per step.
        steps: until the end of the run.
        rule: what is exchanged.
        num_params: of the model.
    """
    privacy = Privacy(mode="off") if epsilon is None else Privacy(epsilon=epsilon)
    return Manifest(
        name="privacy benchmark",
        created_unix_s=0,
        model=Model(config={}, num_params=num_params, initial_digest=""),
        optimiser=Optimiser(
            learning_rate=rate,
            warmup_steps=min(WARMUP_STEPS, steps // 2),
            batch_records=batch,
            sequence_tokens=RECORD_TOKENS,
        ),
        round=Round(rule=rule, fragments=FRAGMENTS, window_steps=WINDOW_STEPS)
        if not RULES[rule].waits
        else Round(rule=rule, fragments=1, group=0, window_steps=1, codec="float32"),
        privacy=privacy,
        public_text=PublicText(digest=blake2b(b"").hex(), text=""),
        end=End(steps=steps),
    )


def _records(corpus: corpora.Corpus) -> torch.Tensor:
    text = corpus.train
    whole = text.numel() // RECORD_TOKENS
    return text[: whole * RECORD_TOKENS].view(whole, RECORD_TOKENS).long()
