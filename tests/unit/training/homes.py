"""Homes of tiny nodes: manifest, initial model, shard. For tests that start real trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from xpeer.config import Checkpoint, Data, NodeConfig, Privacy, Training
from xpeer.drafting import draft_manifest
from xpeer.founding_model import LoraOptions, initial_model
from xpeer.identity import Identity
from xpeer.manifest.signed import SignedManifest
from xpeer.trainer.setup import TrainerSetup

SENTENCE = "the quick brown fox jumps over the lazy dog, and node {node} saw it on day {day}. "
FAST = (
    "optimiser.batch_records=4",
    "optimiser.sequence_tokens=32",
    "optimiser.warmup_steps=2",
    "round.window_steps=4",
    "round.fragments=3",
)
USUAL: dict[str, Any] = {
    "threads": 1,
    "device": "cpu",
    "validation_records": 4,
    "precision": "float32",  # auto depends on how fast the processor is at the moment
}


def make_homes(
    folder: Path,
    count: int,
    *,
    privacy: Literal["record", "off"] = "off",
    changes: tuple[str, ...] = (),
    lora: LoraOptions | None = None,
    **training: Any,
) -> list[TrainerSetup]:
    """Nodes of one swarm with different shards, with these settings of training."""
    (folder / "public.txt").write_text("a public text, which everybody may read. " * 20)
    source = initial_model(None, None, "tiny", lora)
    manifest = draft_manifest(
        "test",
        source,
        tokenizer=None,
        public_text=folder / "public.txt",
        changes=[*FAST, *changes],
        privacy=privacy,
    )
    signed = SignedManifest.sign(manifest, Identity.generate())
    setups = []
    for node in range(count):
        home = folder / f"node{node}"
        (home / "shard").mkdir(parents=True)
        source.write(home / "initial")
        (home / "manifest.json").write_bytes(signed.to_bytes())
        for day in range(12):
            text = SENTENCE.format(node=node, day=day) * 4
            (home / "shard" / f"{day}.txt").write_text(text)
        setups.append(
            TrainerSetup(
                manifest_path=str(home / "manifest.json"),
                swarm_id=signed.genesis.swarm_id,
                home=str(home),
                peer_id=f"peer{node}",
                config=NodeConfig(
                    data=Data(shard=[str(home / "shard")]),
                    training=Training(**(USUAL | training)),
                    checkpoint=Checkpoint(every_s=3600.0),
                    privacy=Privacy(register=str(folder / "register")),
                ),
            )
        )
    return setups
