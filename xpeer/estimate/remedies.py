"""Settings with which a step that does not fit would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from xpeer.estimate.step import FROZEN_BYTES, Step, StepMemory
from xpeer.manifest.model import BaseDtype

_RECORDS: Final = "training.micro_batch = 1"
_AGAIN: Final = "training.checkpoint_activations = on"
_HELD_IN: Final = "xpeer init --base-dtype"
PLAIN: Final[tuple[BaseDtype, ...]] = "float32", "bfloat16"
"""Types whose values can be pages of a file. Codes of others are made in memory, of 16 bits."""
_LATER: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    ("training.precision = bfloat16, on a device that has it", {"precision": "bfloat16"}),
    *((f"{_HELD_IN} {dtype}", {"base_dtype": dtype}) for dtype in list(FROZEN_BYTES)[1:]),
)


@dataclass(frozen=True)
class Remedy:
    """What would help, and what a step would then need."""

    words: str
    memory: StepMemory


def of_founding(step: Step, dtypes: Sequence[BaseDtype] = ()) -> str:
    """What `xpeer init` may decide otherwise, so that less memory is needed.

    Args:
        step: that does not fit.
        dtypes: in which frozen weights may take less, there where they do not fit.
    """
    if step.lora is None:
        return "train adapters (--lora-rank 16)"
    held = FROZEN_BYTES[step.base_dtype]
    smaller = [each for each in dtypes if FROZEN_BYTES[each] < held]
    fewer = "train fewer parameters (a lower --lora-rank, or --lora-target)"
    if not smaller:
        return fewer
    return f"hold what is frozen in fewer bits (--base-dtype {' or '.join(smaller)}), or {fewer}"


def none_helps(step: Step) -> str:
    """The remedy where no setting of a node helps."""
    dtypes = PLAIN if step.device == "cpu" else tuple(FROZEN_BYTES)
    return (
        "no setting helps: found another swarm by `xpeer init`, and choose fewer "
        f"optimiser.sequence_tokens, or {of_founding(step, dtypes)}"
    )


def find(
    step: Step,
    memory: StepMemory,
    most: float,
    rehearse: Callable[[Step], StepMemory],
    *,
    again: bool = True,
    founding: bool = True,
) -> Remedy | None:
    """Find the first settings with which a step fits; None = none of them helps.

    Fewer records and layers that are computed again are tried at once, and fewer records alone only
    if both are enough. Where weights, moments and gradients alone are too large, nothing is
    rehearsed.

    Args:
        step: that does not fit.
        memory: of it.
        most: bytes that there are.
        rehearse: `step.memory_of`, or one that remembers.
        again: whether the model has layers that can be computed again.
        founding: whether what `xpeer init` decides may be changed, too.
    """
    changed = replace(step, micro_batch=1, recompute=step.recompute or again)
    words = [_RECORDS] if step.micro_batch > 1 else []
    words += [_AGAIN] if changed.recompute != step.recompute else []
    if changed != step and memory.least <= most:
        found = rehearse(changed)
        if found.peak <= most:
            alone = replace(step, micro_batch=1)
            if len(words) > 1 and (fewer := rehearse(alone)).peak <= most:
                return Remedy(_RECORDS, fewer)
            return Remedy(", ".join(words), found)
    for said, fields in _LATER if founding else _LATER[:1]:
        tried = replace(changed, **fields)
        if tried == changed or not _is_smaller(changed, tried):
            continue
        if words and words[-1].startswith(_HELD_IN):
            words.pop()  # this one takes its place
        changed = tried
        words.append(said)
        if _least(step, changed, memory) <= most and (found := rehearse(changed)).peak <= most:
            return Remedy(", ".join(words), found)
    return None


def _is_smaller(step: Step, changed: Step) -> bool:
    """Whether frozen weights take no more; there are some only beside adapters."""
    if step.lora is None:
        return changed.base_dtype == step.base_dtype
    return FROZEN_BYTES[changed.base_dtype] <= FROZEN_BYTES[step.base_dtype]


def _least(step: Step, changed: Step, memory: StepMemory) -> float:
    """What the changed step needs at least, from what is known of the step."""
    saved = FROZEN_BYTES[step.base_dtype] - FROZEN_BYTES[changed.base_dtype]
    return memory.least - saved * memory.num_frozen
