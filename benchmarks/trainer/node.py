"""A node's trainer without a network, and a loop by hand over the same model and the same text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics
from typing import Any, Final, Literal

import torch
from torch.nn.functional import cross_entropy

from xpeer.config import Checkpoint, Data, NodeConfig, Privacy, Training
from xpeer.drafting import draft_manifest
from xpeer.founding_model import LoraOptions, initial_model
from xpeer.identity import Identity
from xpeer.manifest.signed import SignedManifest
from xpeer.policies import privacy_policy
from xpeer.trainer.assembled import Assembled
from xpeer.trainer.build import assemble
from xpeer.trainer.setup import TrainerSetup
from xpeer.training.precision import choose_precision

Kind = Literal["full", "lora"]
Mode = Literal["off", "record"]
RANK: Final = 8
NOISE: Final = "privacy.noise_multiplier=1.0", "privacy.epsilon=1000"
BATCH: Final = 32
TOKENS: Final = 128
RATE: Final = 1e-3


def make_node(folder: Path, kind: Kind, mode: Mode, model: Path | None, device: str) -> Assembled:
    """A trainer as a daemon's: its text, its model, its ledger; evaluations included.

    Args:
        folder: an empty one, for the home.
        kind: whether all weights are trained, or adapters.
        mode: of privacy.
        model: a Hugging Face folder; None = a Llama of 2 M parameters for bytes.
        device: `training.device`.
    """
    lora = LoraOptions(RANK) if kind == "lora" else None
    source = initial_model(model, None, None if model else "small", lora)
    home, text = folder / "home", "\n".join(value for _, value in sorted(topics.topics.items()))
    (home / "shard").mkdir(parents=True)
    (home / "shard" / "text.txt").write_text(text[20_000:])
    (folder / "public.txt").write_text(text[:20_000])
    changes = [
        f"optimiser.batch_records={BATCH}",
        f"optimiser.sequence_tokens={TOKENS}",
        f"optimiser.learning_rate={RATE}",
        "round.fragments=1",
        "end.steps=100000",
        *(NOISE if privacy_policy(mode).charges else ()),
    ]
    manifest = draft_manifest(
        "benchmark",
        source,
        tokenizer=model,
        public_text=folder / "public.txt",
        changes=changes,
        privacy=mode,
    )
    signed = SignedManifest.sign(manifest, Identity.generate())
    source.write(home / "initial")
    (home / "manifest.json").write_bytes(signed.to_bytes())
    config = NodeConfig(
        data=Data(shard=[str(home / "shard")], tokenizer=str(model or "")),
        training=Training(device=device),  # type: ignore[arg-type]
        checkpoint=Checkpoint(every_s=1e9),
        privacy=Privacy(register=str(folder / "register")),
    )
    return assemble(
        TrainerSetup(
            manifest_path=str(home / "manifest.json"),
            swarm_id=signed.genesis.swarm_id,
            home=str(home),
            peer_id="benchmark",
            config=config,
        )
    )


def loop_by_hand(node: Assembled) -> Callable[[], int]:
    """A step of a plain loop with the node's model, precision and batch; returns its tokens.

    It trains the node's own parameters, with moments of its own.
    """
    model: Any = node.model
    device = next(model.parameters()).device
    precision, _ = choose_precision("auto", device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=RATE, fused=device.type in {"cpu", "cuda"})
    generator = torch.Generator().manual_seed(0)
    mechanism: Any = node.mechanism
    ids_of_all = (getattr(mechanism, "_gradient", None) or mechanism)._records
    # as many at once as suit a processor's caches, as the trainer does
    part = 2048 // TOKENS if device.type == "cpu" else BATCH

    def step() -> int:
        chosen = torch.randint(0, len(ids_of_all), (BATCH,), generator=generator)
        records = ids_of_all[chosen].to(device)
        wanted = int((records[:, 1:] >= 0).sum())
        optimiser.zero_grad(set_to_none=True)
        for some in torch.split(records, part):
            ids, targets = some[:, :-1].clamp(min=0), some[:, 1:]
            with precision.context():
                logits = model(input_ids=ids, use_cache=False).logits
                flat = logits.flatten(0, 1).float(), targets.flatten()
                loss = cross_entropy(*flat, ignore_index=-1, reduction="sum")
            torch.autograd.backward(loss / wanted)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        return wanted

    return step
