"""Frozen parameters: no text reaches them, so they keep their initial values.

They get no noise, no exchange and no decay. The manifest lists them; `reach` determined them when
the swarm was founded. While a model trains, an embedding has only the rows that text reaches, and
other frozen parameters are marked as not trained. So everything that is made from "the trainable
parameters" (the flat vector, noise, moments) leaves them out. Their values are part of checkpoints
and donations. A joiner checks that they have the manifest's digest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch

from xpeer.errors import ConfigError, LocalError
from xpeer.manifest.model import Frozen
from xpeer.training.flat import digest_of_all
from xpeer.training.held import DTYPES
from xpeer.training.losses import choose_losses
from xpeer.training.reach import Rows, out_of_reach

_BEFORE: Final = "rows_before"
_BEHIND: Final = "rows_behind"
_TRIED: Final = 2
_PIECE: Final = 1 << 14
"""Values that are looked at at a time."""


def find(model: torch.nn.Module, num_tokens: int, num_ids: int) -> Frozen | None:
    """Determine the parameters that no text reaches; None = text reaches all of them.

    The result is checked: with these parameters set to NaN, losses must stay the same.

    Args:
        model: as it will be trained, on the CPU; unchanged afterwards.
        num_tokens: length of every record.
        num_ids: number of ids of the tokenizer.

    Raises:
        LocalError: the check failed.
    """
    rows = out_of_reach(model, num_tokens, num_ids)
    if not rows:
        return None
    frozen = Frozen(parameters=rows, num_values=_count(model, rows), digest="")
    expected = _tried(model, num_tokens, num_ids)
    freeze(model, frozen)
    try:
        kept = values(model, frozen)
        write(model, frozen, torch.full_like(kept, torch.nan))
        same = torch.equal(_tried(model, num_tokens, num_ids), expected)
        write(model, frozen, kept)
    finally:
        thaw(model, frozen)
    if not same:
        raise LocalError(
            f"text reaches some of {', '.join(rows)}, which it was shown not to reach",
            "please report this with the model's config.json",
        )
    return Frozen(
        parameters=rows,
        num_values=frozen.num_values,
        digest=digest_of_all([kept]),
        dtype="bfloat16" if _are_bfloat16(kept) else "float32",
    )


def freeze(model: torch.nn.Module, frozen: Frozen | None) -> None:
    """Cut the frozen parameters out of a model.

    Args:
        model: a whole one; changed.
        frozen: of the manifest; None = nothing is done.

    Raises:
        ConfigError: `frozen` belongs to another model.
    """
    for name, (first, end), module, last in _places(model, frozen):
        parameter = getattr(module, last)
        if first == end:
            parameter.requires_grad_(False)
            continue
        if not isinstance(module, torch.nn.Embedding) or not 0 <= first < end <= len(parameter):
            raise _of_another(name)
        whole = parameter.detach()
        # plain attributes: engines refuse layers with buffers, and these are not computed with
        setattr(module, _BEFORE, whole[:first].clone())
        setattr(module, _BEHIND, whole[end:].clone())
        _resize(module, whole[first:end].clone(), -first)
    count = sum(part.numel() for part in _parts(model, frozen))
    if frozen is not None and count != frozen.num_values:
        raise ConfigError(
            f"model.frozen.num_values is {frozen.num_values}, this model has {count}",
            "use the transformers version that the founder used",
        )


def thaw(model: torch.nn.Module, frozen: Frozen | None) -> None:
    """Undo `freeze`: put the frozen values back, and make all parameters trainable."""
    for _name, (first, end), module, last in _places(model, frozen):
        if first == end:
            getattr(module, last).requires_grad_(True)
            continue
        before, behind = getattr(module, _BEFORE), getattr(module, _BEHIND)
        own = getattr(module, last).detach()
        whole = torch.cat([before.to(own.device), own, behind.to(own.device)])
        delattr(module, _BEFORE)
        delattr(module, _BEHIND)
        _resize(module, whole, first)


@torch.no_grad()
def values(model: torch.nn.Module, frozen: Frozen | None) -> torch.Tensor:
    """Copy the values that `freeze` cut out, in order of names: (num_values,) of the manifest's
    type, CPU.
    """
    dtype = torch.float32 if frozen is None else DTYPES[frozen.dtype]
    parts = [part.detach().reshape(-1).to("cpu", dtype) for part in _parts(model, frozen)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=dtype)


@torch.no_grad()
def write(model: torch.nn.Module, frozen: Frozen | None, flat: torch.Tensor) -> None:
    """Replace the frozen values by (num_values,)."""
    parts = list(_parts(model, frozen))
    for part, new in zip(parts, torch.split(flat, [part.numel() for part in parts]), strict=True):
        part.copy_(new.view_as(part))


def fits(model: torch.nn.Module, frozen: Frozen | None) -> bool:
    """Whether the frozen values of a model have the manifest's digest."""
    return frozen is None or digest_of_all(list(_parts(model, frozen))) == frozen.digest


def restore(model: torch.nn.Module, frozen: Frozen | None, flat: torch.Tensor) -> None:
    """Replace the frozen values by those of a checkpoint or of a donor.

    Raises:
        LocalError: they do not have the manifest's digest; nothing is changed.
    """
    count = 0 if frozen is None else frozen.num_values
    if flat.numel() != count or (frozen is not None and digest_of_all([flat]) != frozen.digest):
        raise LocalError(
            f"{flat.numel()} frozen values are not the {count} that the manifest means",
            "restore the checkpoint that belongs to this home",
        )
    write(model, frozen, flat)


def _are_bfloat16(values: torch.Tensor) -> bool:
    """Whether each value is a number of bfloat16."""
    pieces = torch.split(values, _PIECE)
    return all(torch.equal(piece.bfloat16().float(), piece) for piece in pieces)


def _count(model: torch.nn.Module, rows: Mapping[str, Rows]) -> int:
    """Count the values outside of these rows."""
    known = dict(model.named_parameters())
    return sum(
        known[name].numel() - (end - first) * known[name][0].numel()
        for name, (first, end) in rows.items()
    )


def _parts(model: torch.nn.Module, frozen: Frozen | None) -> Iterator[torch.Tensor]:
    for _name, (first, end), module, last in _places(model, frozen):
        if first == end:
            yield getattr(module, last)
        else:
            yield getattr(module, _BEFORE)
            yield getattr(module, _BEHIND)


def _places(
    model: torch.nn.Module, frozen: Frozen | None
) -> Iterator[tuple[str, tuple[int, int], Any, str]]:
    """Yield for each parameter its name, the trained rows, its module and its name there."""
    for name, (first, end) in sorted(frozen.parameters.items()) if frozen is not None else ():
        path, _, last = name.rpartition(".")
        try:
            module = model.get_submodule(path)
        except AttributeError as e:
            raise _of_another(name) from e
        if last not in module._parameters:
            raise _of_another(name)
        yield name, (first, end), module, last


def _resize(module: Any, weight: torch.Tensor, shift: int) -> None:
    """Replace the table of an embedding, and move lookups by `shift` rows (OPT adds an offset)."""
    module.weight = torch.nn.Parameter(weight)
    module.num_embeddings = len(weight)
    if shift:
        module.offset += shift
    if module.padding_idx is not None and module.padding_idx >= len(weight):
        module.padding_idx = None  # a row that is not reached


@torch.no_grad()
def _tried(model: torch.nn.Module, num_tokens: int, num_ids: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    records = torch.randint(0, num_ids, (_TRIED, num_tokens), generator=generator)
    training = model.training
    model.eval()
    try:
        losses, _ = choose_losses(model)  # never all logits, and one record at a time
        return torch.cat([losses(model, record[None])[0] for record in records])
    finally:
        model.train(training)


def _of_another(name: str) -> ConfigError:
    return ConfigError(
        f"the manifest's model.frozen names {name}, which this model does not have so",
        "use the transformers version that the founder used",
    )
