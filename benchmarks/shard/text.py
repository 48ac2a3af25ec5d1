"""Text to tokenise: documents put together from real paragraphs, and a tokenizer for them."""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics
from typing import Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

_BASE_CHARACTERS: Final = 8_000_000
_VOCABULARY: Final = 8192
_FILE_BYTES: Final = 64 << 20
_PARAGRAPHS: Final = 1, 16
"""Fewest and most paragraphs of a document."""
_SMALL: Final = 400
"""Bytes of a small file, about."""
_FILES_IN_FOLDER: Final = 1000


def paragraphs() -> list[str]:
    """Paragraphs of the Python manual and of the standard library's sources."""
    found = [part for text in topics.topics.values() for part in text.split("\n\n")]
    size = sum(map(len, found))
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if size > _BASE_CHARACTERS:
            break
        if "site-packages" in path.parts:
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        size += len(text)
        found += text.split("\n\n")
    return [part for part in found if part.strip()]


def write_rows(folder: Path, parts: list[str], num_bytes: int, seed: int) -> None:
    """Write files of rows, .jsonl with a field `text`, of so many bytes together."""
    documents = _documents(parts, seed)
    for number in range(-(-num_bytes // _FILE_BYTES)):
        left = min(_FILE_BYTES, num_bytes - number * _FILE_BYTES)
        with (folder / f"{number:05}.jsonl").open("w", encoding="utf-8") as file:
            while left > 0:
                left -= file.write(json.dumps({"text": next(documents)}) + "\n")


def write_small_files(folder: Path, parts: list[str], count: int, seed: int) -> None:
    """Write so many small text files, in folders of a thousand."""
    choose = random.Random(seed)
    for number in range(count):
        inside = folder / f"{number // _FILES_IN_FOLDER:05}"
        inside.mkdir(exist_ok=True)
        (inside / f"{number:08}.txt").write_text(f"{number} {choose.choice(parts)[:_SMALL]}")


def write_tokenizer(folder: Path, parts: list[str]) -> None:
    """Train byte-level BPE on the paragraphs, and write it as transformers does."""
    folder.mkdir()
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(parts[::4], trainer)
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


def _documents(parts: list[str], seed: int) -> Iterator[str]:
    choose = random.Random(seed)
    while True:
        yield "\n\n".join(choose.choices(parts, k=choose.randint(*_PARAGRAPHS)))
