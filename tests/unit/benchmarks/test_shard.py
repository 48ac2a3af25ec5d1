"""The benchmark of shards: both ways make the tokens of all rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from benchmarks.shard import text, ways


def test_both_ways_make_the_tokens_of_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")  # a worker sets it
    monkeypatch.setattr(ways, "_fast", None)
    parts = [f"paragraph {n}, with {n * n} words or so" for n in range(50)]
    tokenizer, rows, out = (tmp_path / name for name in ("tokenizer", "rows", "out"))
    text.write_tokenizer(tokenizer, parts)
    rows.mkdir()
    out.mkdir()
    text.write_rows(rows, parts, 20_000, seed=1)
    (file,) = rows.iterdir()
    assert 20_000 <= file.stat().st_size < 21_000
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    fast = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    counts = {each: len(fast.encode(each).ids) for each in texts}
    ways._start(str(tokenizer / "tokenizer.json"))
    by_hand = sum(ways._encode_part((str(file), part, 2, str(out))) for part in range(2))
    assert by_hand == sum(counts[each] for each in texts)
    ours = ways.ours(rows, tokenizer, tmp_path / "cache")
    assert ours["documents"] == len(counts)
    assert ours["tokens"] == sum(counts.values()) + 2 * len(counts)  # begin and end of each
    assert 0 < ours["resident_gb_over_start"] < ours["resident_gb"]
