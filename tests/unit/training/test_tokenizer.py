from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Fast
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer

from xpeer import manifest
from xpeer.errors import ConfigError
from xpeer.identity import blake2b
from xpeer.training.tokenizer import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@given(TEXTS)
def test_bytes_round_trip(text: str):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode([256, *ids, 257, 258]) == text
    assert all(0 <= i < 256 < tokenizer.vocab_size for i in ids)


def test_broken_characters_are_replaced():
    assert ByteTokenizer().decode([0xE2, 0x82, ord("a")]) == "\ufffda"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("byte")
    ByteTokenizer().save_hf(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_the_exported_byte_tokenizer_is_equal(exported):
    @given(TEXTS | st.sampled_from(["<|begin|>", "a <|end|><|pad|> b", " a  b ", "Ġ", "\0"]))
    @settings(max_examples=200)
    def check(text: str):
        ids = ByteTokenizer().encode(text)
        assert exported(text, add_special_tokens=False)["input_ids"] == ids
        assert exported(text)["input_ids"] == ids
        assert exported.decode([*ids, 257], skip_special_tokens=True) == text

    check()
    assert len(exported) == 259
    assert [exported.bos_token_id, exported.eos_token_id, exported.pad_token_id] == [256, 257, 258]


def write_tokenizer(folder: Path, **special: str | None) -> str:
    words = {"[UNK]": 0, "once": 1, "upon": 2, "a": 3, "time": 4}
    fast = Fast(models.WordLevel(words, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.add_special_tokens(["<s>", "</s>"])
    fast.enable_truncation(2)
    fast.enable_padding(length=8)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(fast.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return blake2b((folder / "tokenizer.json").read_bytes()).hex()


def test_hugging_face(tmp_path: Path):
    digest = write_tokenizer(tmp_path, bos_token="<s>", eos_token="</s>", pad_token=None)
    spec = manifest.Tokenizer(kind="huggingface", digest=digest)
    tokenizer = load_tokenizer(spec, str(tmp_path))
    assert tokenizer.encode("once upon a time") == [1, 2, 3, 4]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (5, 6)
    assert tokenizer.vocab_size == 7
    assert tokenizer.decode([5, 1, 3, 6]) == "once a"
    assert digest in tokenizer.name


def test_text_can_not_forge_special_tokens(tmp_path: Path):
    write_tokenizer(tmp_path, eos_token="</s>")
    assert not {5, 6} & set(HuggingFaceTokenizer(tmp_path).encode("once </s> <s> a"))


def test_special_tokens_may_be_objects(tmp_path: Path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}}')
    tokenizer = HuggingFaceTokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 6)


def test_saved_again_it_is_the_same(tmp_path: Path):
    digest = write_tokenizer(tmp_path / "a", eos_token="</s>")
    (tmp_path / "b").mkdir()
    HuggingFaceTokenizer(tmp_path / "a").save_hf(tmp_path / "b")
    assert HuggingFaceTokenizer(tmp_path / "b", digest).eos_id == 6


def test_another_tokenizer_is_refused(tmp_path: Path):
    write_tokenizer(tmp_path, pad_token="</s>")
    with pytest.raises(ConfigError, match="the manifest says 00000000"):
        HuggingFaceTokenizer(tmp_path, "00" * 32)


def test_errors_name_the_file(tmp_path: Path):
    spec = manifest.Tokenizer(kind="huggingface", digest="00" * 32)
    with pytest.raises(ConfigError, match=r"data\.tokenizer is not set"):
        load_tokenizer(spec, "")
    with pytest.raises(ConfigError, match=r"tokenizer\.json can't be read"):
        load_tokenizer(spec, str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json is malformed"):
        HuggingFaceTokenizer(tmp_path)
    write_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="names no padding"):
        HuggingFaceTokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json can't be read"):
        HuggingFaceTokenizer(tmp_path)
