"""A long text has the same ids in pieces as at once."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from xpeer.training import tokens
from xpeer.training.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from xpeer.training.tokens import ids_of, parts_of

ENGLISH = "\n\n".join(text for _, text in sorted(topics.items()))[:60_000]
TEXTS = {
    "english": ENGLISH,
    "windows": ENGLISH[:9000].replace("\n", "\r\n"),
    "no spaces": "".join(ENGLISH[:20_000].split()),
    "spaces": ENGLISH[:2000] + " " * 5000 + "\n" * 3000 + "end",
    "accents": "e\u0301a\u0308 o\u0302\u4e2d\u6587\u3002 " * 900,
}


def folder_of(tokenizer: Any, trainer: Any, folder: Path) -> HuggingFaceTokenizer:
    tokenizer.train_from_iterator([ENGLISH, TEXTS["accents"]], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"unk_token": "<unk>"}))
    return HuggingFaceTokenizer(folder)


def byte_level(folder: Path) -> HuggingFaceTokenizer:
    """As GPT-2's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return folder_of(
        made,
        trainers.BpeTrainer(
            vocab_size=900,
            special_tokens=["<unk>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
        folder,
    )


def metaspace(folder: Path) -> HuggingFaceTokenizer:
    """As Llama 2's: a space is put before the text."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return folder_of(
        made,
        trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>"], show_progress=False),
        folder,
    )


def unsplit(folder: Path) -> HuggingFaceTokenizer:
    """Spaces are marked, but tokens may reach over them; every text begins with a mark."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("_"), normalizers.Replace(" ", "_")]
    )
    made.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    return folder_of(
        made,
        trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"], show_progress=False),
        folder,
    )


@pytest.mark.parametrize("make", [byte_level, metaspace, unsplit, lambda _: ByteTokenizer()])
def test_the_same_ids(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "PIECE", 3000)
    tokenizer = make(tmp_path)
    for name, text in TEXTS.items():
        assert ids_of(tokenizer, text).tolist() == tokenizer.encode(text), name


def test_pieces_are_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "PIECE", 3000)
    tokenizer = byte_level(tmp_path)
    parts = list(parts_of(tokenizer, [ENGLISH]))
    assert "".join(parts) == ENGLISH
    assert max(map(len, parts)) <= 3000


@pytest.mark.parametrize("size", [1, 700, 2999, 3000, 10_000])
def test_parts_do_not_depend_on_blocks(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "PIECE", 3000)
    tokenizer = byte_level(tmp_path)
    for name, text in TEXTS.items():
        blocks = (text[at : at + size] for at in range(0, len(text), size))
        assert list(parts_of(tokenizer, blocks)) == list(parts_of(tokenizer, [text])), name
