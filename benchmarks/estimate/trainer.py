"""A node's trainer in a process of its own: the most memory that it has at its start, and in steps.

    python -m benchmarks.estimate.trainer draft CASE FOLDER
    python -m benchmarks.estimate.trainer run CASE FOLDER
    python -m benchmarks.estimate.trainer short CASE FOLDER

The first writes the home, so that nothing of it is left in the memory of the second. The third is
the second where memory is short, so that a trainer gives freed memory back.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.estimate.cases import TRAINERS
from benchmarks.trainer.case import write_texts
from benchmarks.trainer.memory import begin_anew, largest
from xpeer.config import Checkpoint, Data, Home, NodeConfig, Privacy, Training
from xpeer.drafting import draft_manifest
from xpeer.estimate import phases
from xpeer.estimate.planned import step_of
from xpeer.estimate.step import memory_of
from xpeer.founding_model import LoraOptions, initial_model
from xpeer.identity import Identity
from xpeer.manifest.signed import SignedManifest
from xpeer.shortage import keep_nothing, share_freed
from xpeer.trainer.build import assemble
from xpeer.trainer.setup import TrainerSetup
from xpeer.training.model import build

STEPS = 4


def draft(name: str, folder: Path) -> None:
    """Found a swarm whose model has random weights."""
    case = TRAINERS[name]
    model = Path(folder, "model")
    torch.manual_seed(0)
    made: Any = build(case.config)
    made.to(torch.bfloat16).save_pretrained(model)
    lora = LoraOptions(8) if case.lora else None
    source = initial_model(model, None, None, lora)
    shard, public = write_texts(folder)
    changes = [
        f"optimiser.batch_records={2 * case.micro_batch}",
        f"optimiser.sequence_tokens={case.sequence_tokens}",
        "end.steps=200",
    ]
    manifest = draft_manifest(
        "benchmark", source, tokenizer=None, public_text=public, changes=changes,
        privacy="record" if case.private else "off",
    )  # fmt: skip
    home = Home(folder / "home")
    home.path.mkdir()
    source.write(home.initial_model)
    home.manifest.write_bytes(SignedManifest.sign(manifest, Identity.generate()).to_bytes())
    assert shard.exists()


def run(name: str, folder: Path, *, short: bool = False) -> dict[str, Any]:
    """Start a trainer, and take some steps."""
    share_freed()
    if short:
        keep_nothing()
    case, home = TRAINERS[name], Home(folder / "home")
    signed = SignedManifest.load(home.manifest)
    settings = Training(
        device="cpu",
        threads=1,
        micro_batch=case.micro_batch,
        checkpoint_activations="on" if case.again else "off",
    )
    config = NodeConfig(
        data=Data(shard=[str(folder / "shard.txt")], base_model=str(folder / "model")),
        training=settings,
        checkpoint=Checkpoint(every_s=1e9),
        privacy=Privacy(register=str(folder / "register")),
    )
    node = assemble(
        TrainerSetup(
            manifest_path=str(home.manifest),
            swarm_id=signed.genesis.swarm_id,
            home=str(home.path),
            peer_id="benchmark",
            config=config,
        )
    )
    start = largest("self")
    begin_anew("self")
    began = time.process_time()
    for _ in range(STEPS):
        node.trainer.run(1)
    took_s, steps = time.process_time() - began, largest("self")
    node.close()
    step = step_of(signed.open(), settings, torch.device("cpu"))
    memory = memory_of(step)
    return {
        "start": start,
        "steps": steps,
        "cpu_s": round(took_s, 2),
        "estimated": memory.peak + phases.PROCESS,
        "slack": phases.slack(memory),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    parts: dict[str, Callable[[str, Path], object]] = {
        "draft": draft,
        "run": run,
        "short": partial(run, short=True),
    }
    done = parts[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
    print(json.dumps(done))
