"""A loop that somebody writes by hand, in a process of its own.

    python -m benchmarks.trainer.by_hand KIND BATCH DEVICE [MODEL]

Each line of its input is a number of steps to take. It answers with one line of JSON: their tokens,
the seconds that the process computed (on a GPU: seconds of the clock), and its largest memory (on a
GPU: null, since the trainer's is not known from outside).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn.functional import cross_entropy

from benchmarks.trainer.case import RANK, RATE, Case, Kind, write_texts
from benchmarks.trainer.memory import largest
from xpeer.config import Checkpoint, Data, NodeConfig, Privacy, Training
from xpeer.drafting import draft_manifest
from xpeer.founding_model import LoraOptions, initial_model
from xpeer.identity import Identity
from xpeer.manifest.signed import SignedManifest
from xpeer.trainer.assembled import Assembled
from xpeer.trainer.build import assemble
from xpeer.trainer.setup import TrainerSetup
from xpeer.training.precision import choose_precision


def main() -> None:
    """Take steps when asked."""
    kind, batch, device, *model = sys.argv[1:]
    case = Case(cast("Kind", kind), "off", Path(model[0]) if model else None, int(batch), device)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        node = _node(Path(folder), case)
        step = loop(node, case)
        on_gpu = next(node.model.parameters()).device.type == "cuda"
        for line in sys.stdin:
            began = _now(on_gpu)
            tokens = sum(step() for _ in range(int(line)))
            seconds = _now(on_gpu) - began
            peak = None if on_gpu else largest("self")
            print(json.dumps({"tokens": tokens, "seconds": seconds, "peak": peak}), flush=True)
        node.close()


def _node(folder: Path, case: Case) -> Assembled:
    """The model, the records and the precision that a node would have, and no step of it."""
    lora = LoraOptions(RANK) if case.kind == "lora" else None
    source = initial_model(case.model, None, None if case.model else "small", lora)
    home = folder / "home"
    shard, public = write_texts(folder)
    manifest = draft_manifest(
        "benchmark",
        source,
        tokenizer=case.model,
        public_text=public,
        changes=case.changes,
        privacy="off",
    )
    signed = SignedManifest.sign(manifest, Identity.generate())
    home.mkdir()
    source.write(home / "initial")
    (home / "manifest.json").write_bytes(signed.to_bytes())
    config = NodeConfig(
        data=Data(shard=[str(shard)], tokenizer=str(case.model or "")),
        training=Training(device=case.device, threads=1),  # type: ignore[arg-type]
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


def loop(node: Assembled, case: Case) -> Callable[[], int]:
    """A step of a plain loop; returns its tokens."""
    model: Any = node.model
    device = next(model.parameters()).device
    precision, _ = choose_precision("auto", device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=RATE, fused=device.type in {"cpu", "cuda"})
    generator = torch.Generator().manual_seed(0)
    mechanism: Any = node.mechanism
    ids_of_all = mechanism._records
    part = case.pass_records if device.type == "cpu" else case.batch

    def step() -> int:
        chosen = torch.randint(0, len(ids_of_all), (case.batch,), generator=generator)
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


def _now(on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


if __name__ == "__main__":
    main()
