"""Two ways to tokens, each run in a process of its own: the trainer's, and that of `datasets`.

Where `datasets` is not installed, processes that encode batches by hand stand in for it: they read
rows, call the tokenizers library, and write the tokens to files.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import re
import time
from pathlib import Path
from typing import Any, Final

import numpy as np

_BATCH: Final = 1000
"""Rows of a batch, as `datasets.map` has it."""
_RECORD: Final = 512
"""Tokens."""


def ours(text: Path, tokenizer: Path, out: Path) -> dict[str, float]:
    """What a trainer's start does with a shard, up to its records."""
    from xpeer.trainer.text import read_table  # noqa: PLC0415 - torch
    from xpeer.training.piece_table import split_pieces  # noqa: PLC0415
    from xpeer.training.reading import Recipe  # noqa: PLC0415
    from xpeer.training.record_view import MappedRecords  # noqa: PLC0415
    from xpeer.training.tokenising import ignore  # noqa: PLC0415
    from xpeer.training.tokenizer import HuggingFaceTokenizer  # noqa: PLC0415

    recipe, before = Recipe(HuggingFaceTokenizer(tokenizer)), _resident("VmRSS")
    began, used = time.monotonic(), _processor_s()
    table, summary = read_table([str(text)], "data.shard", recipe, out, ignore)
    training, held_out = split_pieces(table, 0.05, "document")
    records = MappedRecords(table.select(training), _RECORD)
    owners, validation = records.owners(), MappedRecords(table.select(held_out), _RECORD)
    seconds = time.monotonic() - began
    peak = _resident("VmHWM")
    return {
        "seconds": seconds,
        "processor_s": _processor_s() - used,
        "tokens": int(table.tokens.sum()),
        "documents": summary.documents,
        "records": len(owners) + len(validation),
        "resident_gb": peak / 1e9,
        "resident_gb_over_start": (peak - before) / 1e9,
    }


def theirs(text: Path, tokenizer: Path, out: Path) -> dict[str, float]:
    """`datasets.map(batched=True)` on all cores, or what stands in for it."""
    files = sorted(map(str, text.rglob("*.jsonl")))
    cores = len(os.sched_getaffinity(0))
    out.mkdir(exist_ok=True)
    began, used = time.monotonic(), _processor_s()
    if importlib.util.find_spec("datasets"):
        tokens = _by_datasets(files, tokenizer, out, cores)
    else:
        tokens = _by_hand(files, tokenizer, out, cores)
    seconds = time.monotonic() - began
    return {"seconds": seconds, "processor_s": _processor_s() - used, "tokens": tokens}


def _by_datasets(files: list[str], tokenizer: Path, out: Path, cores: int) -> int:
    import datasets  # type: ignore[import-not-found,import-untyped,unused-ignore]  # noqa: PLC0415
    from pyarrow import compute  # noqa: PLC0415

    _start(str(tokenizer / "tokenizer.json"))
    rows: Any = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(out))
    made = rows.map(
        lambda batch: {"ids": [each.ids for each in _encoded(batch["text"])]},
        batched=True, batch_size=_BATCH, num_proc=cores, remove_columns=["text"],
    )  # fmt: skip
    lengths = compute.list_value_length(made.data.column("ids"))  # made into no Python lists
    return int(compute.sum(lengths).as_py())


def _by_hand(files: list[str], tokenizer: Path, out: Path, cores: int) -> int:
    context = multiprocessing.get_context("fork")
    work = [(file, part, cores, str(out)) for part in range(cores) for file in files]
    with context.Pool(cores, _start, (str(tokenizer / "tokenizer.json"),)) as pool:
        tokens = sum(pool.imap_unordered(_encode_part, work))
        pool.close()
        pool.join()
    return tokens


_fast: Any = None


def _start(file: str) -> None:
    from tokenizers import Tokenizer  # noqa: PLC0415 - threads of its own begin at its first use

    global _fast  # noqa: PLW0603 - a worker has one
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core
    _fast = Tokenizer.from_file(file)


def _encoded(texts: list[str]) -> Any:
    return _fast.encode_batch(texts, add_special_tokens=False)


def _encode_part(work: tuple[str, int, int, str]) -> int:
    """Tokenise every `parts`-th row of a file."""
    file, part, parts, out = work
    tokens, batch = 0, []
    with open(file, encoding="utf-8") as lines, open(f"{out}/{Path(file).stem}-{part}", "wb") as to:  # noqa: PTH123
        for number, line in enumerate(lines):
            if number % parts == part:
                batch.append(json.loads(line)["text"])
            if len(batch) == _BATCH:
                tokens, batch = tokens + _write(batch, to), []
        tokens += _write(batch, to)
    return tokens


def _write(batch: list[str], to: Any) -> int:
    ids = [np.array(each.ids, np.uint16) for each in _encoded(batch)]
    for each in ids:
        to.write(each.tobytes())
    return sum(map(len, ids))


def _processor_s() -> float:
    """Processor time of this process, and of its processes that have ended."""
    return sum(os.times()[:4])


def _resident(key: str) -> int:
    """Bytes of this process, by /proc: VmRSS now, VmHWM at its peak."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10
