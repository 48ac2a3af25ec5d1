"""Loads an export with transformers and peft alone, as its users do, and measures its loss."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from xpeer.cli.demo.heldout import mean

BATCH_RECORDS = 16


@torch.no_grad()
def loss_of_export(folder: Path, base: Path | None, parts: Mapping[str, torch.Tensor]) -> float:
    """The mean loss on all kinds, nats per token, as transformers itself computes it.

    Nothing of xpeer has a part in it: the weights, the model's code and the loss are theirs.

    Args:
        folder: what `xpeer checkpoint export --hf` wrote.
        base: folder of the model that adapters are for; None = `folder` holds a whole model.
        parts: (n, T) int64 records per kind of text.
    """
    where: Any = base or folder
    model: Any = AutoModelForCausalLM.from_pretrained(
        where, dtype=torch.float32, local_files_only=True
    )
    if base is not None:
        import peft  # noqa: PLC0415 - an extra, and slow

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(model, str(folder))
    model.eval()
    return mean({kind: _loss(model, records) for kind, records in parts.items()})


def _loss(model: Any, records: torch.Tensor) -> float:
    nats = 0.0
    for batch in torch.split(records, BATCH_RECORDS):
        nats += float(model(input_ids=batch, labels=batch).loss) * len(batch)
    return nats / len(records)
