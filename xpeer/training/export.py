"""Exports a trained model as a folder for transformers or peft, and generates text with it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from xpeer.accounts.model_card import PrivacyCard, files
from xpeer.errors import ConfigError, LocalError
from xpeer.files import sync
from xpeer.manifest.model import Model
from xpeer.shortage import in_words, out_of_memory
from xpeer.training import adapters, reloading
from xpeer.training.kept import CONFIG, Source, write_json
from xpeer.training.losses import autocast, transformers_model
from xpeer.training.tensor_file import Pending, spill
from xpeer.training.tokenizer import Tokenizer


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        difference: largest difference between the trained model's logits and the export's.
        dtype: name of the type that the weights were written in.
        notes: lines for the operator.
    """

    difference: float
    dtype: str
    notes: list[str] = field(default_factory=list)


def export_hf(
    model: torch.nn.Module,
    tokenizer: Tokenizer | None,
    folder: Path,
    card: PrivacyCard | None = None,
    *,
    source: Source | None = None,
    text: str = "",
) -> Exported:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer` load.

    The export is loaded again and compared with the model. Only then the folder appears, whole.

    Args:
        model: a transformers model, or a wrapper around one. If it has adapters, they are added to
            the weights that are written, and taken out of the model.
        tokenizer: None = the model alone.
        folder: must not exist, or be empty.
        card: its privacy, for the files beside it; None = write none.
        source: what to keep of the model that training started from; None = nothing.
        text: public, for the comparison.

    Raises:
        ConfigError: the folder is not empty.
        LocalError: it can't be written, or what was written is not what was trained.
    """
    source = source or Source()
    dtype = source.torch_dtype
    with _staged(folder) as staging:
        batches = reloading.sample_ids(model, tokenizer, text)
        expected = reloading.logits_of(model, batches)
        untied = False
        added: dict[int, adapters.Product] = {}
        if adapters.is_adapted(model):
            untied = adapters.untie(model)
            added = adapters.products(model)
            model = adapters.removed(model)
        inner: Any = transformers_model(model)
        config = source.config_json(inner, untied=untied)
        state = _written(inner, dtype, added, staging)
        inner.save_pretrained(staging, state_dict=dict(state))
        write_json(staging / CONFIG, config)
        source.write_generation(staging)
        notes = _add(staging, tokenizer, card, source, text)
        loaded = reloading.load_model(staging, dtype)
        trained = state if added else inner.state_dict()
        reloading.require_weights(trained, loaded, dtype)
        loaded = reloading.computing_as(inner, loaded, dtype)
        found = reloading.logits_of(loaded, batches)
        if dtype == torch.float32:
            difference = reloading.require_equal(expected, found)
        else:  # what rounding takes is no fault, and must not hide one
            if added:
                with reloading.adding(added, inner):
                    reloading.require_equal(expected, reloading.logits_of(inner, batches))
            with reloading.with_weights_of(loaded, inner):
                reloading.require_equal(reloading.logits_of(inner, batches), found)
            difference, lost = reloading.taken_by_rounding(expected, found, dtype)
            notes = [*notes, *lost]
    return Exported(difference, str(dtype).removeprefix("torch."), notes)


def export_adapters(
    adapted: torch.nn.Module,
    section: Model,
    tokenizer: Tokenizer | None,
    folder: Path,
    card: PrivacyCard | None = None,
    *,
    source: Source | None = None,
    text: str = "",
) -> Exported:
    """Write a folder that `peft.PeftModel.from_pretrained(base, folder)` loads.

    It holds the adapters, their config, and the hash of the base model that they belong to. The
    adapters are loaded again, into the same base model, and compared. Only then the folder appears,
    whole.

    Args:
        adapted: made by `adapters.adapt`; it can't be used any more.
        section: of the manifest, with adapters.
        tokenizer: None = adapters alone.
        folder: must not exist, or be empty.
        card: their privacy, for the files beside them; None = write none.
        source: what to keep of that model, except its config; None = nothing.
        text: public, for the comparison.

    Raises:
        ConfigError: the folder is not empty, or peft is missing.
        LocalError: it can't be written, or what was written is not what was trained.
    """
    with _staged(folder) as staging:
        batches = reloading.sample_ids(adapted, tokenizer, text)
        expected = reloading.logits_of(adapted, batches)
        adapters.write(adapted, section, staging)
        notes = _add(staging, tokenizer, card, source or Source(), text)
        loaded = reloading.load_adapted(adapters.removed(adapted), staging)
        difference = reloading.require_equal(expected, reloading.logits_of(loaded, batches))
    return Exported(difference, "float32", notes)


def _add(
    folder: Path, tokenizer: Tokenizer | None, card: PrivacyCard | None, source: Source, text: str
) -> list[str]:
    notes = []
    if tokenizer is not None:
        tokenizer.save_hf(folder)
        notes = reloading.require_tokenizer(folder, tokenizer, text)
    for name, content in files(card).items() if card is not None else ():
        (folder / name).write_bytes(content)
    source.copy_files(folder, carded=card is not None)
    return notes


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """Make a new folder beside this one, and rename it to this one at the end of the block."""
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"export folder {folder} is not empty", "name a new folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as e:
        raise _unwritable(folder, e) from e
    try:
        yield staging
        for path in (*staging.rglob("*"), staging):
            sync(path)
        staging.replace(folder)
        sync(folder.parent)
    except (OSError, SafetensorError, RuntimeError) as e:
        if out_of_memory(e):
            raise in_words(e) from e
        raise _unwritable(folder, e) from e
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    num_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
) -> str:
    """Continue a prompt; for demonstrations, not for speed.

    Args:
        model: in any mode; the mode is restored.
        tokenizer: of the model.
        prompt: may be empty if the tokenizer has a begin-of-text id.
        num_tokens: most tokens to add; an end of text ends it sooner.
        temperature: of the sampling; 0 = always choose the most likely token.
        seed: of the sampling.
        chat: write the prompt as a user's message, by the tokenizer's chat template. The answer
            ends at its first special token.

    Returns:
        The continuation without the prompt.

    Raises:
        ConfigError: the prompt has no tokens, or can't be written as a chat.
    """
    if chat:
        (asked,) = tokenizer.encode_marked([tokenizer.chat.asking(prompt)])
        ids = (asked // 2).tolist()
    else:
        start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        ids = start + tokenizer.encode(prompt)
    if not ids:
        raise ConfigError("the prompt is empty", "give at least a word")
    known = len(ids)
    device = next(model.parameters()).device
    config = transformers_model(model).config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or 1024
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        for _ in range(num_tokens):
            window = torch.tensor([ids[-limit:]], device=device)
            with autocast(device):
                logits = model(input_ids=window, use_cache=False).logits[0, -1].float().cpu()
            if temperature > 0:
                odds = torch.softmax(logits / temperature, 0)
                chosen = int(torch.multinomial(odds, 1, generator=generator))
            else:
                chosen = int(logits.argmax())
            if chosen == tokenizer.eos_id or (chat and _is_special(tokenizer, chosen)):
                break
            ids.append(chosen)
    finally:
        model.train(was_training)
    return tokenizer.decode(ids[known:])


def _is_special(tokenizer: Tokenizer, token: int) -> bool:
    return not tokenizer.decode([token]) and bool(tokenizer.spell([token]))


def _written(
    model: torch.nn.Module,
    dtype: torch.dtype,
    added: Mapping[int, adapters.Product],
    folder: Path,
) -> dict[str, torch.Tensor]:
    """The state, with floats in a type and with what adapters add.

    A tensor that has to be made for that lies in the pages of a file: no two are in memory at once.
    Each has memory of its own. In training all parameters are views of one vector, which
    safetensors would consider to be tied. Parameters that are really tied stay tied.
    """
    kept: dict[int, torch.Tensor] = {}
    made: dict[str, Pending] = {}
    state = model.state_dict(keep_vars=True)
    for value in state.values():
        kind = dtype if value.is_floating_point() else value.dtype
        product = added.get(id(value))
        alone = value.untyped_storage().nbytes() == value.nbytes and value.is_contiguous()
        if product is None and alone and value.dtype == kind and value.device.type == "cpu":
            kept[id(value)] = value.detach()
        else:
            make = partial(_made, value.detach(), product)
            made[str(id(value))] = Pending(kind, tuple(value.shape), make)
    kept |= {int(key): value for key, value in spill(made, folder).items()}
    return {name: kept[id(value)] for name, value in state.items()}


def _made(value: torch.Tensor, product: adapters.Product | None) -> torch.Tensor:
    return value if product is None else product.added_to(value)


def _unwritable(folder: Path, error: BaseException) -> LocalError:
    return LocalError(
        f"export folder {folder} can't be written: {error}", "check free space and rights"
    )
