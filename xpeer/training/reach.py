"""Determines which parameters no text can reach, whatever it says, by following one text.

A record of random ids goes through the model once. Everything that is computed from its ids is
marked as text, and so is everything computed from that. Out of reach of every text of this length
are

- parameters that nothing reads;
- rows of an embedding that are never looked up, if its places do not depend on text (positions);
- rows of an input embedding beyond the tokenizer's ids.

If the text decides what is computed at all (experts that are skipped), one text proves nothing
about others, and everything counts as reached.

The result depends on the model, the length and the tokenizer, never on a shard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from xpeer.training.losses import inputs_of, token_losses

Rows = tuple[int, int]
"""The first row that text reaches, and the row after the last one; (0, 0) = none."""

_LOOKED_AT: Final = frozenset(
    {"tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__"}
)
"""Methods through which Python reads values of a tensor."""

_COPIES: Final = frozenset(
    {"view", "_unsafe_view", "reshape", "slice", "clone", "_to_copy", "alias", "expand", "detach"}
)
"""Operations whose result holds only values of their argument."""


class _TextDecidesError(Exception):
    """The text decides what is computed."""


@torch.no_grad()
def out_of_reach(model: torch.nn.Module, num_tokens: int, num_ids: int) -> dict[str, Rows]:
    """List trainable parameters that no record reaches, wholly or in part.

    Args:
        model: on the CPU, in any mode; unchanged afterwards.
        num_tokens: length of every record.
        num_ids: number of ids of the tokenizer.

    Returns:
        The rows that are reached, by name: some rows of an embedding, none of other parameters. A
        parameter that is not named is reached as a whole.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    records = torch.randint(0, num_ids, (1, num_tokens), generator=generator)
    losses = token_losses(model)  # never all logits
    training = model.training
    model.eval()
    ids, targets = inputs_of(records)
    watch = _Watch(ids, targets, list(model.parameters()))
    try:
        with _Glances(watch), watch:
            losses(ids, targets, None)
    except _TextDecidesError:
        return {}
    finally:
        model.train(training)
    embeddings = {
        id(module.weight): module
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
    }
    reached: dict[str, Rows] = {}
    for name, parameter in trained.items():
        if id(parameter) in watch.read:
            continue
        lookups = watch.lookups.get(id(parameter), [])
        if not lookups:
            reached[name] = (0, 0)
        elif id(parameter) in embeddings:
            rows = _reached(lookups, num_ids, embeddings[id(parameter)])
            if rows != (0, len(parameter)):
                reached[name] = rows
    return reached


def _reached(lookups: Sequence[Any], num_ids: int, module: Any) -> Rows:
    """The rows that are looked up, as one range that `frozen` can cut out of the module."""
    first, end = len(module.weight), 0
    for places in lookups:
        low, high = (0, num_ids) if places is None else (int(places.min()), int(places.max()) + 1)
        first, end = min(first, low), max(end, high)
    if getattr(module, "offset", None) != first or module.padding_idx is not None:
        first = 0  # `frozen` can only change an offset that the module has
    return first, min(end, len(module.weight))


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the text through every operation.

    Attributes:
        read: ids of the parameters that were used as a whole so far.
        lookups: places at which a parameter was looked up so far, by its id: (n,) int64 each, or
            None for the ids of the text.
    """

    def __init__(
        self, ids: torch.Tensor, targets: torch.Tensor, parameters: Sequence[torch.Tensor]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read: set[int] = set()
        self.lookups: dict[int, list[torch.Tensor | None]] = {}
        self._names = {_storage(p): id(p) for p in parameters}
        self._text: Any = WeakIdKeyDictionary()  # tensors computed from text
        self._text[ids] = self._text[targets] = True
        self._ids: Any = WeakIdKeyDictionary()  # tensors that hold the text's ids, unchanged
        self._ids[ids] = True
        self._written: dict[int, Any] = {}  # storages that text was written to, kept alive

    def is_text(self, value: object) -> bool:
        """Whether a value depends on the text."""
        return isinstance(value, torch.Tensor) and (
            value in self._text or _storage(value) in self._written
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        self._note(func, args, leaves)
        text = any(self.is_text(x) for x in leaves)
        if text and _reveals(func, leaves, self.is_text):
            raise _TextDecidesError(str(func))
        out = func(*args, **(kwargs or {}))
        if text:
            self._mark(func, args, kwargs or {}, out)
        if _keeps_ids(func, args) and args[0] in self._ids:
            self._ids[out] = True
        return out

    def _note(self, func: Any, args: Any, leaves: Sequence[torch.Tensor]) -> None:
        """Note which parameters an operation reads, and at which places."""
        places = None
        if func is torch.ops.aten.embedding.default:
            weight, indices = args[:2]
            known = self._names.get(_storage(weight))
            if known is not None and weight.shape[0] > 0:
                whole = weight.numel() * weight.element_size() == weight.untyped_storage().nbytes()
                if whole and not self.is_text(indices):
                    places = weight
                    self.lookups.setdefault(known, []).append(indices.detach().clone().flatten())
                elif whole and indices in self._ids:
                    places = weight
                    self.lookups.setdefault(known, []).append(None)
        for tensor in leaves:
            if tensor is not places and (known := self._names.get(_storage(tensor))) is not None:
                self.read.add(known)

    def _mark(self, func: Any, args: Any, kwargs: Mapping[str, Any], out: Any) -> None:
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._text[tensor] = True
        arguments = func._schema.arguments
        pairs = [*zip(arguments, args, strict=False)]
        pairs += [(a, kwargs[a.name]) for a in arguments if a.name in kwargs]
        for argument, value in pairs:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(value):
                    if isinstance(tensor, torch.Tensor):
                        self._written[_storage(tensor)] = tensor.untyped_storage()


class _Glances(TorchFunctionMode):
    """Notices when Python looks at values that depend on the text."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in _LOOKED_AT and self._watch.is_text(args[0]):
            raise _TextDecidesError(func.__name__)
        return func(*args, **(kwargs or {}))


def _reveals(func: Any, leaves: Sequence[torch.Tensor], is_text: Any) -> bool:
    """Whether the text decides the shape of an operation's result, or Python reads its values."""
    if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
        return any(is_text(x) and x.dtype in (torch.bool, torch.uint8) for x in leaves)
    tags = func.tags
    return torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags


def _keeps_ids(func: Any, args: Any) -> bool:
    """Whether the result holds only ids from the argument (or 0, in place of filling)."""
    if func is torch.ops.aten.clamp.default:
        return tuple(args[1:]) in ((0,), (0, None))
    return func._schema.name.removeprefix("aten::") in _COPIES


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
