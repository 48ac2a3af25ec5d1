"""Low-rank adapters, made with peft and trained in place of a model's own weights.

LoRA (Hu et al. 2021, arXiv:2106.09685): the weights W of each chosen layer stay as they are, and
B A x * alpha / rank is added to the layer's output; with rsLoRA it is alpha / sqrt(rank)
(Kalajdzievski 2023, arXiv:2312.03732). At the start A (rank, in) is random, and B (out, rank) is
zero. Only A and B are trained, exchanged, saved and exported; W is the same at every member. If the
manifest says so, A keeps its initial values, too (FFA-LoRA, Sun et al. 2024, arXiv:2403.12313), and
is exported only.

The initial A is drawn here and not by peft, so that it depends only on the manifest's seed.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from xpeer.errors import ConfigError
from xpeer.leaves import seen_by
from xpeer.manifest.model import BaseDtype, Lora, Model
from xpeer.mixing.factors import FactorPair
from xpeer.needs import installing
from xpeer.shortage import in_words, out_of_memory
from xpeer.training.flat import digest
from xpeer.training.losses import transformers_model

BASE_FILE: Final = "base_model.json"
"""File in an export that says which weights the adapters belong to."""
ADAPTER_CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
_ADAPTER: Final = "default"
_A: Final = f".lora_A.{_ADAPTER}.weight"
_B: Final = f".lora_B.{_ADAPTER}.weight"


@seen_by("anybody", "the manifest's", all_public=True)
class NamedBase(msgspec.Struct, frozen=True):
    """The base model that exported adapters belong to."""

    blake2b_256: str
    """Hash of its weights; empty = not known."""
    name: str = ""
    """Name of the founder's folder."""
    dtype: BaseDtype = "float32"
    """Type of the values that the adapters were trained with."""
    block: Literal[0, 64] = 0
    """Values that were quantised with one scale; 0 = none were."""
    of: str = ""
    """What was hashed, in words."""


def adapt(model: torch.nn.Module, lora: Lora) -> torch.nn.Module:
    """Freeze a model and put fresh adapters into it.

    Args:
        model: of transformers, on the CPU; it is changed.
        lora: of the manifest.

    Returns:
        peft's wrapper around it; only adapters are trainable, or only their B.

    Raises:
        ConfigError: peft is missing, or the model has no such layers.
    """
    peft = _peft()
    targets: Any = list(lora.targets) or "all-linear"
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        use_rslora=lora.rank_stabilised,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    training = model.training
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            # it warns of transposed weights, tied ones and older names; `_draw` checks the result
            warnings.simplefilter("ignore")
            adapted: torch.nn.Module = peft.get_peft_model(model, config)
    except (ValueError, TypeError) as e:
        raise ConfigError(
            f"model.lora.targets: {' '.join(str(e).split())[:300]}",
            "name linear layers of the model, or none for all of them",
        ) from e
    _draw(adapted, lora.seed)
    if lora.train == "B":
        for name, factor in factors(adapted):
            factor.requires_grad_(name.endswith(_B))
    return adapted.train(training)


def attach(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """Add the adapters that `write` wrote to a model, to use it, not to train it.

    Raises:
        ConfigError: peft is missing, or they don't fit the model.
        ShortOfMemoryError: memory ran out.
    """
    peft = _peft()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attached: torch.nn.Module = peft.PeftModel.from_pretrained(model, str(folder))
    except (ValueError, TypeError, KeyError, RuntimeError, OSError, SafetensorError) as e:
        if out_of_memory(e):
            raise in_words(e) from e
        raise ConfigError(
            f"the adapters in {folder} can't be used with this model: "
            f"{' '.join(str(e).split())[:300]}",
            "name the model that they are for with --base-model",
        ) from e
    return attached


def is_adapted(model: torch.nn.Module) -> bool:
    """Whether the model has adapters."""
    return hasattr(model, "peft_config")


def factor_pairs(adapted: torch.nn.Module) -> list[FactorPair]:
    """List the layers of which both factors are trained, and where these lie in the flat vector.

    Args:
        adapted: made by `adapt`, whatever was frozen since.
    """
    at, places = 0, {}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            places[name] = at, parameter.shape
            at += parameter.numel()
    pairs = []
    for name, (a_at, shape) in places.items():
        other = name.replace(_A, _B)
        if other != name and other in places:
            b_at, (outputs, rank) = places[other]
            pairs.append(FactorPair(a_at, b_at, rank, inputs=shape[1], outputs=outputs))
    return pairs


def fixed_digest(adapted: torch.nn.Module, lora: Lora) -> str:
    """BLAKE2b-256 (hex) of all A, if they keep their initial values; else empty."""
    if lora.train == "both":
        return ""
    fixed = [factor.detach().flatten() for name, factor in factors(adapted) if name.endswith(_A)]
    return digest(torch.cat(fixed))


def factors(adapted: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """List all A and B with their names, trained or not, in the order of the model's parameters."""
    return [(n, p) for n, p in adapted.named_parameters() if n.endswith((_A, _B))]


def untie(adapted: torch.nn.Module) -> bool:
    """Copy weights that a layer with an adapter shares with another layer.

    Otherwise merging the adapter would change both layers.

    Returns:
        Whether there were any. If so, the model's config says from now on that nothing is tied.
    """
    named = list(adapted.named_parameters(remove_duplicate=False))
    shared = Counter(id(parameter) for _, parameter in named)
    untied = False
    for module in adapted.modules():
        base: Any = getattr(module, "base_layer", None)
        if base is not None and shared[id(base.weight)] > 1:
            base.weight = torch.nn.Parameter(base.weight.detach().clone(), requires_grad=False)
            untied = True
    if untied:
        inner: Any = transformers_model(adapted)
        inner.config.tie_word_embeddings = False
        inner.config.get_text_config().tie_word_embeddings = False
    return untied


@dataclass(frozen=True)
class Product:
    """What an adapter adds to a matrix: B A alpha / rank."""

    a: torch.Tensor  # (rank, in)
    b: torch.Tensor  # (out, rank)
    scale: float
    transposed: bool
    """Whether the matrix is (in, out)."""

    @torch.no_grad()
    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """The sum, float32, of the matrix's shape."""
        made = (self.b @ self.a).mul_(self.scale)
        return (made.T if self.transposed else made).add_(weight)


def products(adapted: torch.nn.Module) -> dict[int, Product]:
    """What is added to each matrix, by the id of its parameter; call `untie` before."""
    found = {}
    for module in adapted.modules():
        layer: Any = module
        if hasattr(layer, "base_layer") and _ADAPTER in layer.lora_A:
            a, b = (each[_ADAPTER].weight.detach() for each in (layer.lora_A, layer.lora_B))
            made = Product(a, b, float(layer.scaling[_ADAPTER]), bool(layer.fan_in_fan_out))
            found[id(layer.base_layer.weight)] = made
    return found


def merged(adapted: torch.nn.Module) -> torch.nn.Module:
    """Return a model with weights W + B A alpha / rank, and no adapters; `adapted` is used up."""
    inner: Any = adapted
    whole: torch.nn.Module = inner.merge_and_unload()
    return whole


def removed(adapted: torch.nn.Module) -> torch.nn.Module:
    """Return the model as it was before `adapt` or `attach`; `adapted` is used up."""
    inner: Any = adapted
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = inner.unload()
    if hasattr(model, "peft_config"):
        del model.peft_config
    whole: torch.nn.Module = model.requires_grad_(True)
    return whole


def write(adapted: torch.nn.Module, model: Model, folder: Path) -> None:
    """Write the files for `peft.PeftModel.from_pretrained(base, folder)`, and name the base.

    Args:
        adapted: made by `adapt`.
        model: of the manifest, with adapters.
        folder: exists.

    Raises:
        OSError: a file can't be written.
    """
    peft, inner = _peft(), _inner(adapted)
    own = {name: factor.detach().cpu().clone() for name, factor in factors(adapted)}
    tensors = peft.get_peft_model_state_dict(inner, state_dict=own, save_embedding_layers=False)
    weights = folder / WEIGHTS
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o600)
    config = inner.peft_config[_ADAPTER]
    config.inference_mode = True
    config.base_model_name_or_path = model.source.partition("@")[0] or None
    config.save_pretrained(str(folder))
    named = NamedBase(
        blake2b_256=model.lora.base_digest if model.lora else "",
        name=model.source,
        dtype=model.base_dtype,
        block=model.base_block,
        of="the base model's parameters in the order of named_parameters(), tied ones once, "
        f"as {model.hashed_dtype}, little endian",
    )
    text = json.dumps(msgspec.to_builtins(named), indent=2) + "\n"
    (folder / BASE_FILE).write_text(text, encoding="utf-8")


def _draw(adapted: torch.nn.Module, seed: int) -> None:
    """Draw A as torch draws a linear layer's weights (uniform within 1 / sqrt(in)); set B to zero.

    Raises:
        ConfigError: parameters other than A and B would be trained.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if not parameter.requires_grad:
                continue
            if name.endswith(_A):
                bound = parameter.shape[1] ** -0.5
                parameter.uniform_(-bound, bound, generator=generator)
            elif name.endswith(_B):
                parameter.zero_()
            else:
                raise ConfigError(
                    f"model.lora.targets: {name} is no adapter of a linear layer",
                    "name linear layers of the model, or none for all of them",
                )


def _inner(adapted: torch.nn.Module) -> Any:
    return adapted


def _peft() -> Any:
    try:
        import peft  # noqa: PLC0415 - an extra, and slow
    except ImportError as e:
        raise ConfigError(
            f"this swarm trains adapters (model.lora), and peft is not installed: {e}",
            installing("lora"),
        ) from e
    return peft
