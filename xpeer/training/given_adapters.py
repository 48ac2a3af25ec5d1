"""Adapters that somebody has trained before, as the start of a swarm: reads them from peft's files.

The founder's home keeps them beside the base model. Others get their values from a member, as they
get those of a model that is trained as a whole.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from xpeer import belonging
from xpeer.errors import ConfigError
from xpeer.folders import REMEDIES
from xpeer.manifest.model import BaseDtype
from xpeer.training.adapters import ADAPTER_CONFIG, BASE_FILE, WEIGHTS, factors
from xpeer.training.held import DTYPES

OPTION: Final = "--lora-from"
"""Names the folder of a founder."""
FOLDER: Final = "adapters"
"""Folder inside a founder's initial model."""
_PREFIX: Final = "base_model.model."
_READ: Final = frozenset({"peft_type", "bias", "r", "lora_alpha", "use_rslora"})
"""Settings of peft that are checked, or taken over, one by one."""
_HARMLESS: Final = _READ | frozenset(
    {
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "lora_dropout", "fan_in_fan_out", "runtime_config"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("eva_config", "loftq_config", "corda_config", "lora_ga_config"),
        *("megatron_core", "qalora_group_size"),
    }
)
"""Settings with which an adapter is W + B A alpha / rank, whatever they say. Which layers have one
is known from the values. The last six only say how other settings are carried out. All that are not
here have to be off: what a later version of peft adds may be anything."""
_FIRST_VALUES: Final = (True, False, "gaussian", "eva", "orthogonal")
"""Ways to draw the first values of A and B that leave W as it is. Others take a part out of W, and
the folder of the adapters does not hold what is left."""


@dataclass(frozen=True)
class GivenAdapters:
    """Adapters as peft wrote them."""

    folder: Path
    rank: int
    alpha: float
    rank_stabilised: bool
    base_digest: str
    """BLAKE2b-256 (hex) of the base model's weights; empty = the folder does not say."""
    base_dtype: BaseDtype
    """Type of the values that they were trained with."""
    values: dict[str, torch.Tensor]
    """A and B of each layer by their names in the file; float32."""

    @property
    def settings(self) -> tuple[int, float, bool, list[str]]:
        """Rank, alpha, whether it is rsLoRA, and the names of the layers."""
        return self.rank, self.alpha, self.rank_stabilised, self.layers

    def require_base(self, digest: str, dtype: BaseDtype) -> None:
        """Refuse another base model than the one that the folder names, if it does.

        Args:
            digest: of the base model's weights.
            dtype: `model.base_dtype`. The adapters may have been trained with another one that is
                made of the same values: bfloat16, int8 and nf4 have one hash.

        Raises:
            ConfigError: the base model has other weights, or they are held in another type.
        """
        if self.base_digest and DTYPES[dtype] != DTYPES[self.base_dtype]:
            raise ConfigError(
                f"--base-dtype {dtype}: the adapters in {self.folder} are for weights held in "
                f"{self.base_dtype}",
                f"leave it out, or set it to {self.base_dtype}",
            )
        if self.base_digest not in ("", digest):
            raise ConfigError(
                f"the adapters in {self.folder} are for weights with BLAKE2b-256 "
                f"{self.base_digest[:16]}…, the model's are {digest[:16]}…",
                "name the model that these adapters are for with --model",
            )

    @property
    def layers(self) -> list[str]:
        """Names of the layers in the base model."""
        ending = ".lora_A.weight"
        names = [name for name in self.values if name.endswith(ending)]
        return [name.removeprefix(_PREFIX).removesuffix(ending) for name in names]

    @torch.no_grad()
    def write_to(self, adapted: torch.nn.Module) -> None:
        """Replace the values of adapters, which have to be in the same layers.

        Raises:
            ConfigError: they are not, or of other shapes.
        """
        known = {name.replace(".default.", "."): p for name, p in factors(adapted)}
        for name in sorted(known.keys() | self.values.keys()):
            ours, theirs = known.get(name), self.values.get(name)
            if ours is None or theirs is None or ours.shape != theirs.shape:
                here, there = (_shape(each) for each in (theirs, ours))
                raise ConfigError(
                    f"{self.folder / WEIGHTS}: {name} is {here}; the model needs {there}",
                    "name the model that these adapters are for with --model",
                )
        for name, parameter in known.items():
            parameter.copy_(self.values[name])


def read(folder: Path, option: str = OPTION) -> GivenAdapters:
    """Read adapters of linear layers that peft, or `xpeer checkpoint export`, wrote.

    Args:
        folder: of the adapters.
        option: what names the folder, for errors.

    Raises:
        ConfigError: there are none, they are damaged, or of a kind that a swarm can't train.
    """
    what = f"{option} {folder}"
    config = _json(folder, ADAPTER_CONFIG, what)
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise _refused(what, "they are not LoRA without biases")
    for key, value in config.items():
        drawn = key == "init_lora_weights" and value in _FIRST_VALUES
        if value and not drawn and key not in _HARMLESS:
            raise _refused(what, f"their {key} is {str(value)[:80]}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not 1 <= rank <= 1024:
        raise _refused(what, f"their r is {rank!r}")
    if not isinstance(alpha, int | float) or not 0 < alpha <= 1e6:
        raise _refused(what, f"their lora_alpha is {alpha!r}")
    named = _named(folder, what)
    made = GivenAdapters(
        folder,
        rank,
        float(alpha),
        rank_stabilised=config.get("use_rslora") is True,
        base_digest=str(named.get("blake2b_256", "")),
        base_dtype=_dtype_in(named),
        values=_values(folder, what),
    )
    if not made.layers:
        raise _refused(what, f"{WEIGHTS} holds no layers")
    return made


def base_dtype(folder: Path) -> BaseDtype | None:
    """Type of the base model's weights that the folder names; None = it names none.

    Raises:
        ConfigError: it can't be read.
    """
    named = _named(folder, f"{OPTION} {folder}")
    return _dtype_in(named) if named.get("blake2b_256") else None


def _named(folder: Path, what: str) -> dict[str, Any]:
    return _json(folder, BASE_FILE, what) if (folder / BASE_FILE).exists() else {}


def _dtype_in(named: dict[str, Any]) -> BaseDtype:
    said = named.get("dtype")
    found: BaseDtype | None = next((dtype for dtype in DTYPES if dtype == said), None)
    return found or "float32"


def _values(folder: Path, what: str) -> dict[str, torch.Tensor]:
    file = folder / WEIGHTS
    try:
        values = load(belonging.read_inside(file, folder))
    except (OSError, SafetensorError, ValueError) as e:
        raise ConfigError(
            f"{what}: its {WEIGHTS} can't be read: {_why(e)}", REMEDIES["adapters"]
        ) from e
    for name, value in values.items():
        if not bool(torch.isfinite(value).all()):
            raise _refused(what, f"{name} holds values that are not finite")
    return {name: value.to(torch.float32) for name, value in values.items()}


def _json(folder: Path, name: str, what: str) -> dict[str, Any]:
    file = folder / name
    try:
        content = json.loads(belonging.read_inside(file, folder))
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(
            f"{what}: its {name} can't be read: {_why(e)}", REMEDIES["adapters"]
        ) from e
    if not isinstance(content, dict):
        raise ConfigError(f"{what}: its {name} is not a JSON object", "restore the file")
    return content


def _why(error: Exception) -> str:
    """What an error says on one line, without a number or a path of the system."""
    said = error.strerror if isinstance(error, OSError) else None
    return " ".join((said or str(error)).split())[:200]


def _refused(what: str, why: str) -> ConfigError:
    return ConfigError(
        f"{what}: these adapters can't be trained in a swarm: {why}",
        "merge them into their base (peft: merge_and_unload, save_pretrained) and start from that "
        "with --model",
    )


def _shape(tensor: torch.Tensor | None) -> str:
    return "missing" if tensor is None else " x ".join(map(str, tensor.shape))
