"""Builds the model as all members have it before the first step, or as a checkpoint has it."""

from __future__ import annotations

from pathlib import Path

import torch

from xpeer.config import Data, Home
from xpeer.errors import ConfigError, LocalError
from xpeer.folders import folder_named
from xpeer.manifest import Manifest
from xpeer.manifest.model import Lora
from xpeer.training import given_adapters
from xpeer.training.adapters import adapt, fixed_digest
from xpeer.training.checkpoint import Bundle, load_latest
from xpeer.training.flat import digest_of, write_flat
from xpeer.training.frozen import fits, freeze, restore, thaw
from xpeer.training.held import DTYPES
from xpeer.training.model import build, from_folder, read_config, skeleton
from xpeer.training.quantised import quantise


def model_of(
    manifest: Manifest,
    home: Home,
    base_model: str = "",
    *,
    fresh: bool = False,
    quantised: bool = True,
) -> torch.nn.Module:
    """Build the manifest's model, on the CPU, without frozen parameters (`training.frozen`).

    Args:
        manifest: of the swarm.
        home: of the node; a founder's holds the initial model.
        base_model: `data.base_model`: folder of the base model, if adapters are trained; empty = in
            the home.
        fresh: whether the parameters get the swarm's initial values; otherwise they have any, and
            the caller replaces them. Adapters always have their initial values if these are
            drawn, and their base model always has the manifest's weights.
        quantised: False = a base that is trained on in 8 or 4 bits is as it was before that.

    Raises:
        ConfigError: weights are missing, or are not the manifest's.
    """
    lora = manifest.model.lora
    if lora is not None:
        named = folder_named("data.base_model", base_model, "model") if base_model else None
        return _adapted(manifest, lora, named, home, fresh=fresh, quantised=quantised)
    kept = manifest.model.frozen
    model = from_folder(home.initial_model) if fresh else build(manifest.model.config)
    freeze(model, kept)
    if not fresh:
        return model
    if digest_of(model) != manifest.model.initial_digest or not fits(model, kept):
        raise ConfigError(
            f"the model in {home.initial_model} is not the one the swarm starts from",
            "restore the folder, or fetch the parameters from a member",
        )
    return model


def saved_model(home: Home, *, own: bool = False) -> tuple[Bundle, list[str]]:
    """Read the newest checkpoint of the swarm's model, or the own model.

    Args:
        home: of the node.
        own: the model that `xpeer finetune` made.

    Returns:
        The checkpoint, and warnings of damaged ones.

    Raises:
        LocalError: there is none.
    """
    folder = home.own if own else home.checkpoints
    bundle, warnings = load_latest(folder)
    if bundle is not None:
        return bundle, warnings
    if own:
        raise LocalError(f"there is no own model in {folder}", "make one: `xpeer finetune`")
    raise LocalError(
        f"there is no checkpoint in {folder}",
        "train first: `xpeer start`, or have a running daemon save: `xpeer checkpoint save`",
    )


def trained_model(
    manifest: Manifest, home: Home, base_model: str, bundle: Bundle, *, quantised: bool = True
) -> torch.nn.Module:
    """Build a checkpoint's whole model, on the CPU, averaged with the last partners' parameters.

    Args:
        manifest: of the swarm.
        home: of the node.
        base_model: `data.base_model`.
        bundle: the checkpoint; its values are forgotten.
        quantised: False = to merge adapters into the weights that were quantised for training.

    Raises:
        ConfigError: see `model_of`.
        LocalError: the checkpoint belongs to another model.
    """
    model, kept = model_of(manifest, home, base_model, quantised=quantised), manifest.model.frozen
    write_flat(model, bundle.consolidated())
    bundle.forget()
    restore(model, kept, bundle.frozen)
    thaw(model, kept)
    return model


def source_folders(home: Home, data: Data) -> list[Path]:
    """List folders with files of the model that training started from, the best first."""
    named = [Path(name).expanduser() for name in (data.base_model, data.tokenizer) if name]
    known = [named[0]] if data.base_model else []
    return [path for path in dict.fromkeys([*known, home.initial_model, *named]) if path.is_dir()]


def _adapted(
    manifest: Manifest,
    lora: Lora,
    named: Path | None,
    home: Home,
    *,
    fresh: bool,
    quantised: bool,
) -> torch.nn.Module:
    folder = named or home.initial_model
    if named is None and not folder.exists():
        raise ConfigError(
            "data.base_model is not set: this swarm trains adapters (model.lora) of a model that "
            "every member has a copy of",
            "set it to the Hugging Face folder of that model",
        )
    model = base_of(folder, manifest, home.cache)
    seen = digest_of(model, DTYPES[manifest.model.base_dtype])
    if seen != lora.base_digest:
        raise _other_base(
            folder,
            f"its weights' BLAKE2b-256 is {seen[:16]}…, the manifest's {lora.base_digest[:16]}…",
        )
    if quantised:
        model = quantise(model, manifest.model.base_dtype, manifest.model.base_block)
    model = adapt(model, lora)
    if lora.given and fresh:
        kept = home.initial_model / given_adapters.FOLDER
        given_adapters.read(kept, "the adapters in").write_to(model)
    freeze(model, manifest.model.frozen)
    if lora.given and not fresh:
        return model
    same = digest_of(model) == manifest.model.initial_digest
    if not same or fixed_digest(model, lora) != lora.fixed_digest:
        raise ConfigError(
            "the adapters made here are not those that the swarm starts from",
            f"restore {home.initial_model}, or fetch the parameters from a member"
            if lora.given
            else "use the versions of torch, transformers and peft that the founder used",
        )
    return model


def base_of(folder: Path, manifest: Manifest, near: Path) -> torch.nn.Module:
    """Load a base model: the folder's weights, and the manifest's config, whatever the folder says.

    Args:
        folder: of the model.
        manifest: of the swarm.
        near: see `model.from_folder`.

    Raises:
        ConfigError: the folder holds no model, or weights of other names or shapes.
        LocalError: `near` can't be written.
    """
    config = manifest.model.config
    here, wanted = (
        {name: tuple(p.shape) for name, p in skeleton(of).named_parameters()}
        for of in (read_config(folder), config)
    )
    for name in [*wanted, *here]:
        if here.get(name) != wanted.get(name):
            said = [str(found.get(name, "missing")) for found in (here, wanted)]
            raise _other_base(folder, f"{name} is {said[0]} in it, and {said[1]} in the manifest's")
    dtype = DTYPES[manifest.model.base_dtype]
    return from_folder(folder, dtype=dtype, config=config, near=near)


def _other_base(folder: Path, difference: str) -> ConfigError:
    return ConfigError(
        f"the model in {folder} is not the one that the swarm's adapters are for: {difference}",
        "set data.base_model to a copy of the founder's model",
    )
