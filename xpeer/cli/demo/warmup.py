"""The public start: a small model, trained on public text once per environment and then cached.

Private training from a random start learns little. So every peer begins with this model, which
anybody could make.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from xpeer.founding_model import PRESETS
from xpeer.identity import blake2b
from xpeer.training.export import export_hf
from xpeer.training.losses import record_losses
from xpeer.training.model import build, from_folder
from xpeer.training.tokenizer import ByteTokenizer, Tokenizer

STEPS = 160
BATCH_RECORDS = 32
LEARNING_RATE = 3e-3
WARMUP_STEPS = 20
PRIVATE_OVERHEAD = 1.3
"""A private step with its noise and exchanges takes this many times as long as a plain one."""
Progress = Callable[[int, int], None]


def records_of(
    texts: Sequence[str], sequence_tokens: int, tokenizer: Tokenizer | None = None
) -> torch.Tensor:
    """Cut texts into whole sequences, each of one text: (n, sequence_tokens) int64.

    Args:
        texts: of any length.
        sequence_tokens: length of a record.
        tokenizer: None = its bytes.
    """
    tokenizer = tokenizer or ByteTokenizer()
    rows = []
    for text in texts:
        ids = tokenizer.encode(text)
        rows += [
            ids[start : start + sequence_tokens]
            for start in range(0, len(ids) - sequence_tokens + 1, sequence_tokens)
        ]
    return torch.tensor(rows, dtype=torch.int64)


def warmed_up(
    texts: Sequence[str],
    sequence_tokens: int,
    seed: int,
    cache: Path,
    progress: Progress,
    steps: int = STEPS,
) -> Path:
    """A Hugging Face folder with the public start, from the cache if it is there.

    Args:
        texts: public text.
        sequence_tokens: length of a record.
        seed: random seed of the initial parameters and of the batches.
        cache: folder of finished starts.
        progress: called with (steps done, steps in all).
        steps: steps of training.
    """
    key = blake2b(
        torch.__version__.encode(),
        repr(
            (PRESETS["small"], steps, BATCH_RECORDS, LEARNING_RATE, sequence_tokens, seed)
        ).encode(),
        *(text.encode() for text in texts),
        size=8,
    ).hex()
    folder = cache / f"start-{key}"
    if not folder.exists():
        model = _train(records_of(texts, sequence_tokens), seed, progress, steps)
        export_hf(model, ByteTokenizer(), folder)
    progress(steps, steps)
    return folder


def _train(records: torch.Tensor, seed: int, progress: Progress, steps: int) -> torch.nn.Module:
    model = build(PRESETS["small"], seed=seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, LEARNING_RATE, total_steps=steps, pct_start=min(0.5, WARMUP_STEPS / steps)
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        chosen = torch.randint(len(records), (BATCH_RECORDS,), generator=generator)
        losses, counts = record_losses(model, records[chosen])
        optimiser.zero_grad()
        torch.autograd.backward(losses.sum() / counts.sum())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        progress(step + 1, steps)
    return model.eval()


def step_seconds(start: Path, batch_records: int, sequence_tokens: int, speed: float) -> float:
    """Estimate the seconds of a private step at full speed while all peers train here.

    Args:
        start: the public start.
        batch_records: records of a step.
        sequence_tokens: length of a record.
        speed: sum of all peers' fractions of the time in which they compute.
    """
    model = from_folder(start)
    records = torch.randint(0, 256, (batch_records // 6, sequence_tokens))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    began = time.perf_counter()
    for _ in range(6):
        losses, counts = record_losses(model, records)
        torch.autograd.backward(losses.sum() / counts.sum())
    took_s = time.perf_counter() - began
    torch.set_num_threads(threads)
    return PRIVATE_OVERHEAD * max(1.0, speed / (os.cpu_count() or 1)) * took_s


def clear(folder: Path) -> None:
    """Remove the files of an earlier run, if there are any."""
    shutil.rmtree(folder, ignore_errors=True)
