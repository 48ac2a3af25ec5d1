"""Builds the model offline from a config or a folder: always a causal language model, in float32,
or with matrices held in bfloat16 (`held`).

Knows nothing of privacy, partners or the shard. `flat` has the parameters as one vector, `losses`
computes losses, `export` writes trained models. Their usual names can be imported from here, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from xpeer import belonging
from xpeer.errors import ConfigError
from xpeer.shortage import in_words, out_of_memory
from xpeer.source import check_folder
from xpeer.training.converted import in_dtype
from xpeer.training.export import export_adapters, export_hf, generate
from xpeer.training.filler import Filler
from xpeer.training.flat import FlatParameters, digest, num_params, read_flat, write_flat
from xpeer.training.held import hold
from xpeer.training.losses import (
    autocast,
    choose_device,
    evaluate,
    record_losses,
    transformers_model,
)
from xpeer.training.rebuild import ALONE, require_complete

__all__ = [
    "FlatParameters",
    "autocast",
    "build",
    "check_fits",
    "choose_device",
    "context_tokens",
    "digest",
    "evaluate",
    "export_adapters",
    "export_hf",
    "from_folder",
    "generate",
    "num_params",
    "read_config",
    "read_flat",
    "record_losses",
    "skeleton",
    "vocab_size",
    "write_flat",
]

_REFUSED_KEYS: Final = frozenset({"auto_map", "quantization_config", "adapters"})
"""Keys that would load code or weights from elsewhere, or train something that is not float32."""

_LOADING_ERRORS: Final = (
    *(ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError),
    *(ZeroDivisionError, AssertionError, StrictDataclassError),
)
"""Errors that transformers raises at a config that makes no sense."""


def build(config: dict[str, Any], seed: int | None = None) -> torch.nn.Module:
    """Build a causal language model with initial weights, in training mode, on the CPU.

    Dropout is switched off, whatever the config says. A record's gradient has to be a function of
    the record and the parameters alone, or the engines' self-test could not check it.

    Args:
        config: Hugging Face config as JSON, `model_type` included.
        seed: of the initial weights; None = nothing is drawn, and the caller replaces the weights.

    Raises:
        ConfigError: transformers knows no causal language model with this config.
    """
    if seed is None:
        with Filler():
            made = _made(_parse_config(config))
        return _ready(made)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _ready(_made(_parse_config(config)))


def skeleton(config: dict[str, Any]) -> torch.nn.Module:
    """Build a model without memory for its values: with names, shapes and tying only.

    Raises:
        ConfigError: see `build`.
    """
    with torch.device("meta"):
        return _made(_parse_config(config))


def _made(made: Any) -> torch.nn.Module:
    try:
        model: torch.nn.Module = AutoModelForCausalLM.from_config(
            made,
            attn_implementation=_attention(made),
            dtype=torch.float32,
            trust_remote_code=False,
        )
    except _LOADING_ERRORS as e:
        if out_of_memory(e):
            raise in_words(e) from e
        raise ConfigError(
            f"model.config: no causal language model can be built from it: {_one_line(e)}",
            "correct the value that this names",
        ) from e
    return model


def from_folder(
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    config: dict[str, Any] | None = None,
    near: Path | None = None,
) -> torch.nn.Module:
    """Load a pretrained causal language model from a local folder; nothing is ever downloaded.

    Args:
        path: of the folder.
        dtype: what to hold the weights in: float32, or bfloat16, which rounds them (`held`).
        config: the manifest's, in place of the folder's own; None = the folder's.
        near: folder on a disk where matrices of another type are converted, to be pages of a file;
            None = they are converted in memory.

    Raises:
        ConfigError: the folder is missing, or holds no causal language model with all weights.
        LocalError: `near` can't be written.
    """
    transformers_logging.disable_progress_bar()
    safetensors = check_folder(path)
    raw = read_config(path) if config is None else config
    made = _parse_config(raw)
    attention = _attention(made)
    with in_dtype(path, dtype, near if safetensors else None) as folder:
        model, report = _loaded(path, folder, made, attention, dtype, safetensors=safetensors)
    require_complete(path, model, raw, report)
    if dtype != torch.float32:
        _restore_buffers(model, raw)
    return _ready(model, dtype)


def _loaded(
    path: Path,
    folder: Path,
    config: Any,
    attention: str,
    dtype: torch.dtype,
    *,
    safetensors: bool,
) -> tuple[Any, dict[str, Any]]:
    """Load the model of `path` from `folder`; returns transformers' report, too."""
    try:
        with _quiet():  # transformers would print a table; we say in a line what is wrong
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=safetensors,
                ignore_mismatched_sizes=True,  # `require_complete` refuses them
                output_loading_info=True,
            )
    except (*_LOADING_ERRORS, OSError, SafetensorError, UnpicklingError) as e:
        if out_of_memory(e):
            raise in_words(e) from e
        raise ConfigError(
            f"model {path}: can't be loaded as a causal language model: {_one_line(e)}",
            "check config.json and model.safetensors; encoder models can't be trained here",
        ) from e
    return model, report


def _restore_buffers(model: Any, config: dict[str, Any]) -> None:
    """Replace rounded buffers by those of a float32 model, whose parameters get no memory."""
    from accelerate import init_empty_weights  # noqa: PLC0415 - comes with peft, which this is for

    with init_empty_weights(include_buffers=False):
        exact = _made(_parse_config(config))
    saved = model.state_dict().keys()
    for path, module in exact.named_modules():
        ours = model.get_submodule(path)
        for name, buffer in module.named_buffers(recurse=False):
            if f"{path}.{name}".lstrip(".") in saved:
                buffer = getattr(ours, name)  # noqa: PLW2901 - of the weights' file
                buffer = buffer.float() if buffer.is_floating_point() else buffer  # noqa: PLW2901
            ours._buffers[name] = buffer


def context_tokens(model: torch.nn.Module) -> int | None:
    """Longest sequence that the model has positions for; None = its config does not say."""
    config = transformers_model(model).config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def vocab_size(model: torch.nn.Module) -> int:
    """Number of rows of the input embedding."""
    return int(transformers_model(model).get_input_embeddings().weight.shape[0])


def check_fits(model: torch.nn.Module, tokenizer_vocab: int, sequence_tokens: int) -> None:
    """Refuse a tokenizer or a sequence length that the model has no embeddings for.

    Raises:
        ConfigError: they do not fit; names both numbers.
    """
    if tokenizer_vocab > vocab_size(model):
        raise ConfigError(
            f"the tokenizer has {tokenizer_vocab} ids, the model's vocabulary {vocab_size(model)}",
            "use the model's own tokenizer",
        )
    limit = context_tokens(model)
    if limit is not None and sequence_tokens > limit:
        raise ConfigError(
            f"optimiser.sequence_tokens = {sequence_tokens}, but the model has {limit} positions",
            f"set it to {limit} or less",
        )


def read_config(path: Path) -> dict[str, Any]:
    """Read a folder's config.json.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    try:
        config = json.loads(belonging.read_inside(path / "config.json", path))
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(
            f"model {path}: its config.json can't be read: {e}",
            "name a folder that save_pretrained wrote, with config.json and model.safetensors",
        ) from e
    if not isinstance(config, dict):
        raise ConfigError(f"model {path}: its config.json is not an object", "restore the file")
    return config


def _parse_config(config: dict[str, Any]) -> Any:
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ConfigError("model.config has no model_type", "e.g. gpt2 or llama")
    nested = [value for value in config.values() if isinstance(value, dict)]
    refused = sorted(_REFUSED_KEYS & {key for part in (config, *nested) for key in part})
    if refused:
        raise ConfigError(f"model.config: {refused[0]} is refused", "remove it from config.json")
    rest = {key: value for key, value in config.items() if key != "model_type"}
    try:
        made = AutoConfig.for_model(kind, **rest)
    except _LOADING_ERRORS as e:
        raise ConfigError(
            f"model.config: {kind!r} with these values is no known model: {_one_line(e)}",
            "correct it, or install the transformers version that knows it",
        ) from e
    _switch_dropout_off(made)
    return made


def _attention(config: Any) -> str:
    """Choose torch's scaled dot products if the family's code supports them, else its own code.

    The engines are compared with autograd either way.

    Raises:
        ConfigError: transformers has no causal language model of this family.
    """
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if known is None:
        raise _no_language_model(config)
    return "sdpa" if getattr(known, "_supports_sdpa", False) else "eager"


def _no_language_model(config: Any) -> ConfigError:
    """The error for a family that transformers has no causal language model of."""
    problem = f"model.config: transformers has no causal language model of type {config.model_type}"
    text = config.get_text_config()
    if text is config:
        remedy = "use a model that predicts the next token, e.g. llama, qwen3, gemma2 or gpt2"
        return ConfigError(problem, remedy)
    if MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None) is None:
        problem += f", nor of the language model in it ({text.model_type})"
        return ConfigError(problem, "use a model for text alone, e.g. of the same family")
    return ConfigError(
        f"{problem}; the language model in it ({text.model_type}) is one",
        f"save that alone, and give its folder: {ALONE}",
    )


def _switch_dropout_off(config: Any) -> None:
    """Switch dropout off, in nested configs, too."""
    for key, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            _switch_dropout_off(value)
        elif isinstance(value, float) and key.endswith(("dropout", "pdrop", "dropout_prob")):
            setattr(config, key, 0.0)


def _ready(model: Any, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Prepare a model: no dropout, training mode. Check that it runs and is causal."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = (
                None  # that id may occur in a text, and is then trained like any other
            )
        if isinstance(module, PreTrainedModel):  # it looks at the ids, which vmap can't run
            module.warn_if_padding_and_no_attention_mask = _no_warning
    made: torch.nn.Module = hold(model.float() if dtype == torch.float32 else model, dtype).eval()
    ids = torch.zeros((2, 4), dtype=torch.int64)
    ids[1, -1] = 1
    try:
        with torch.no_grad():
            logits = made(input_ids=ids, use_cache=False).logits
    except (*_LOADING_ERRORS, IndexError) as e:
        if out_of_memory(e):
            raise in_words(e) from e
        raise ConfigError(
            f"model.config: a model of type {model.config.model_type} can be built from it, but "
            f"does not run: {_one_line(e)}",
            "correct the value that this names",
        ) from e
    if not torch.allclose(logits[0, :-1], logits[1, :-1], rtol=1e-3, atol=1e-4):
        raise ConfigError(
            f"model.config: {model.config.model_type} looks at the tokens that it has to predict",
            "use a causal (decoder) model; is_decoder = true makes some encoders into one",
        )
    return made.train()


def _no_warning(*_: object) -> None:
    """Give no warning: records need no attention mask, as they are filled up at the right."""


@contextmanager
def _quiet() -> Iterator[None]:
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
