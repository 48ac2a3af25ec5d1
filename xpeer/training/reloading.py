"""Loads an export again, as its users will, and compares it with the trained model.

Plain transformers or peft load it from the folder that was written. Three things have to agree: the
weights bit by bit (after rounding to the type they are written in), the logits, and the ids that
the tokenizer makes from a text.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from xpeer.errors import ConfigError, LocalError
from xpeer.shortage import in_words, out_of_memory
from xpeer.training import adapters
from xpeer.training.held import hold
from xpeer.training.kept import write_json
from xpeer.training.losses import transformers_model
from xpeer.training.tokenizer import Tokenizer

_PIECE: Final = 1 << 22
"""Values that are compared at a time."""
_TOKENS: Final = 48
_RANDOM: Final = 2
_TEXT_CHARS: Final = 2000
_TOLERANCE: Final = 1e-3
"""Allowed difference of logits that the same weights give, relative to their spread."""
_ROUNDED: Final = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 8e-2}
"""Difference of logits, relative to their spread, beyond which rounding the weights has taken more
from them than noise: updates that were smaller than the type's steps."""
_PLAIN: Final = "PreTrainedTokenizerFast"


def sample_ids(
    model: torch.nn.Module, tokenizer: Tokenizer | None, text: str
) -> list[torch.Tensor]:
    """Make batches to compare logits on: random ids, and the beginning of a public text.

    Returns:
        Batches of (records, tokens) int64.
    """
    config = transformers_model(model).config.get_text_config()
    rows = int(transformers_model(model).get_input_embeddings().weight.shape[0])
    limit = getattr(config, "max_position_embeddings", None) or _TOKENS
    length = min(_TOKENS, limit)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, rows, (_RANDOM, length), generator=generator)]
    ids = tokenizer.encode(text[:_TEXT_CHARS])[:length] if tokenizer is not None else []
    return [*batches, torch.tensor([ids])] if ids else batches


@torch.no_grad()
def logits_of(model: Any, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Compute logits of each batch, (records, tokens, vocabulary) float32, CPU; keeps the mode."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        return [
            model(input_ids=ids.to(device), use_cache=False).logits.float().cpu() for ids in batches
        ]
    finally:
        model.train(training)


def load_model(folder: Path, dtype: torch.dtype) -> Any:
    """Load an export with transformers, in the type that it was written in: then its weights stay
    in the pages of their files.

    Raises:
        LocalError: it does not load, or weights are missing or left over.
    """
    with _quiet():
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, output_loading_info=True
            )
        except Exception as e:  # whatever transformers raises at a folder that we wrote
            if out_of_memory(e):
                raise in_words(e) from e
            raise _differs(f"transformers does not load it: {_one_line(e)}") from e
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in report[what]):
            raise _differs(f"{len(names)} {what.replace('_', ' ')}, e.g. {names[0]}")
    return model


def computing_as(trained: torch.nn.Module, loaded: Any, dtype: torch.dtype) -> Any:
    """Have an export compute in float32, as the trained model does, whatever its weights are.

    They stay in their type (`held`), and tables that the config decides are taken from the trained
    model, since transformers would have rounded them.

    Args:
        trained: a model of transformers.
        loaded: by `load_model`; changed.
        dtype: type that the weights were written in.
    """
    if dtype == torch.float32:
        return loaded
    for path, module in trained.named_modules():
        ours = {name: None if b is None else b.cpu() for name, b in module._buffers.items()}
        loaded.get_submodule(path)._buffers.update(ours)
    return hold(loaded, dtype)


def load_adapted(base: Any, folder: Path) -> Any:
    """Load adapters with peft on a base model, which is changed.

    Raises:
        LocalError: it does not load.
    """
    with _quiet():
        try:
            return adapters.attach(base, folder)
        except ConfigError as e:
            raise _differs(f"peft does not load it: {e.problem}") from e


@contextmanager
def with_weights_of(loaded: Any, model: torch.nn.Module) -> Iterator[None]:
    """Have a model compute with the weights of its export, which are in memory once, for a while.

    So both have to give the same logits, whatever the weights were rounded to.

    Args:
        loaded: by `computing_as`.
        model: that was exported.
    """
    before = [(m, m._parameters, m._buffers, m.__class__) for m in model.modules()]
    try:
        for path, module in model.named_modules():
            theirs = loaded.get_submodule(path)
            module._parameters, module._buffers = theirs._parameters, theirs._buffers
            module.__class__ = theirs.__class__
        yield
    finally:
        for module, parameters, buffers, kind in before:
            module._parameters, module._buffers = parameters, buffers
            module.__class__ = kind


@contextmanager
def adding(added: Mapping[int, adapters.Product], model: torch.nn.Module) -> Iterator[None]:
    """Have a model compute with merged weights, float32, for a while: each is made when it is used.

    Args:
        added: what is added to each matrix, by the id of its parameter.
        model: without adapters.
    """
    handles = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if (product := added.get(id(parameter))) is not None:
                begin, end = _added_in(name, parameter, product)
                handles.append(module.register_forward_pre_hook(begin))
                handles.append(module.register_forward_hook(end, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _added_in(name: str, parameter: torch.nn.Parameter, product: adapters.Product) -> Any:
    def begin(module: torch.nn.Module, _: Any) -> None:
        merged = torch.nn.Parameter(product.added_to(parameter.detach()), requires_grad=False)
        module._parameters[name] = merged

    def end(module: torch.nn.Module, *_: Any) -> None:
        module._parameters[name] = parameter

    return begin, end


def require_equal(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """Refuse an export whose logits are not the trained model's.

    Args:
        ours: the trained model's logits for each batch.
        theirs: the export's.

    Returns:
        The largest difference.

    Raises:
        LocalError: the logits differ by more than rounding, or are not finite.
    """
    if not all(bool(torch.isfinite(each).all()) for each in ours):
        raise LocalError(
            "the trained parameters give logits that are not finite: there is nothing to export",
            "export an older checkpoint, and train on with a smaller optimiser.learning_rate",
        )
    for one, other in zip(ours, theirs, strict=True):
        if one.shape != other.shape:
            raise _differs(f"logits of {tuple(other.shape)}, trained {tuple(one.shape)}")
        difference, spread = _difference(one, other)
        if not difference <= _TOLERANCE * spread:
            raise _differs(f"its logits differ by {difference:.3g}, their spread is {spread:.3g}")
    return max(_difference(*pair)[0] for pair in zip(ours, theirs, strict=True))


def taken_by_rounding(
    ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], dtype: torch.dtype
) -> tuple[float, list[str]]:
    """How much the logits of rounded weights differ, and a line for the operator if that is much.

    Args:
        ours: the trained model's logits for each batch.
        theirs: the export's.
        dtype: type that the weights were written in.
    """
    pairs = [_difference(*pair) for pair in zip(ours, theirs, strict=True)]
    difference, spread = max(pairs, key=lambda pair: pair[0] / pair[1])
    name, notes = str(dtype).removeprefix("torch."), []
    if difference > _ROUNDED[dtype] * spread:
        notes.append(
            f"rounding to {name} changes the logits by up to {difference:.2g} (their spread is "
            f"{spread:.2g}): weights were trained by less than the steps of that type; --dtype "
            "float32 keeps all that was trained"
        )
    return max(pair[0] for pair in pairs), notes


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """The largest difference, and the spread that it is compared with."""
    return float((ours - theirs).abs().max()), max(float(ours.std()), 1e-6)


def require_weights(trained: Mapping[str, torch.Tensor], loaded: Any, dtype: torch.dtype) -> None:
    """Refuse weights that are not, bit by bit, the trained ones rounded to a type.

    Args:
        trained: by their names in the model.
        loaded: by `load_model`.
        dtype: type that the weights were written in.

    Raises:
        LocalError: a weight differs; names the first one.
    """
    theirs = dict(loaded.named_parameters(remove_duplicate=False))
    for name, ours in trained.items():
        if name in theirs and not _is(theirs[name], ours, dtype):
            raise _differs(f"{name} is not what was trained")
    if lacking := sorted(theirs.keys() - trained.keys()):
        raise _differs(f"{lacking[0]} is not what was trained")


def _is(loaded: torch.Tensor, trained: torch.Tensor, dtype: torch.dtype) -> bool:
    if loaded.shape != trained.shape:
        return False
    parts = (torch.split(each.detach().reshape(-1), _PIECE) for each in (trained, loaded))
    return all(
        torch.equal(ours.cpu().to(dtype).float(), theirs.cpu().float())
        for ours, theirs in zip(*parts, strict=True)
    )


def require_tokenizer(folder: Path, tokenizer: Tokenizer, text: str) -> list[str]:
    """Refuse a tokenizer that makes other ids from a text than the model was trained on.

    Some classes of transformers do not read tokenizer.json as it is. Then tokenizer_config.json is
    changed to name the plain class, which does.

    Returns:
        Lines for the operator.

    Raises:
        LocalError: the plain class makes other ids, too.
    """
    ids = tokenizer.encode(text[:_TEXT_CHARS])
    loaded = _ids(folder, text[:_TEXT_CHARS])
    if isinstance(loaded, str):
        return [f"transformers can't load the tokenizer's files: {loaded}"]
    if loaded == ids:
        return []
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    said = config.get("tokenizer_class")
    write_json(file, config | {"tokenizer_class": _PLAIN})
    if _ids(folder, text[:_TEXT_CHARS]) != ids:
        raise _differs("its tokenizer makes other ids of the public text than were trained on")
    return [f"tokenizer_class is {_PLAIN} now: {said} makes other ids than tokenizer.json does"]


def _ids(folder: Path, text: str) -> list[int] | str:
    """The ids that AutoTokenizer makes; or why it can't."""
    with _quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            split: Any = {"add_special_tokens": False, "split_special_tokens": True}
            return list(tokenizer(text, **split)["input_ids"])
        except Exception as e:  # noqa: BLE001 - whatever its class raises
            return _one_line(e)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress bars, advice and warnings: the comparison says what matters."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def _differs(problem: str) -> LocalError:
    return LocalError(
        f"the export is not what was trained: {problem}",
        "nothing was exported; please report it with the model's config.json",
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
