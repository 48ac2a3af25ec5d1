"""Causal language models of Hugging Face: built, measured, and seen as one flat vector.

Knows no privacy, no network and no files but model folders. Everything is offline.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from xpeer.errors import ConfigError, LocalError

Model = torch.nn.Module
"""A `transformers.PreTrainedModel` with a causal head."""

IGNORED = -100


def build(config: dict[str, Any], seed: int | None = None) -> Model:
    """A randomly initialised model in float32.

    Args:
        config: Hugging Face configuration as JSON, `model_type` included.
        seed: of the initial parameters; None = from torch's global generator.

    Raises:
        ConfigError: transformers does not accept it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415 - takes seconds

    fields = dict(config)
    model_type = fields.pop("model_type", "")
    try:
        parsed = AutoConfig.for_model(model_type, **fields)
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(parsed, attn_implementation="eager")
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as e:
        raise ConfigError(
            f"model.config is not a causal language model: {type(e).__name__}: {e}",
            'use a Hugging Face config.json, e.g. {"model_type": "llama", ...}',
        ) from e
    return _prepared(model)


def from_folder(folder: Path) -> Model:
    """A model saved by `save_pretrained`, in float32.

    Raises:
        ConfigError: missing, or no causal language model.
    """
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - takes seconds

    if not (folder / "config.json").is_file():
        raise ConfigError(f"--model: {folder} holds no config.json", "name a Hugging Face folder")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32, local_files_only=True, attn_implementation="eager"
        )
    except (OSError, ValueError, KeyError, RuntimeError) as e:
        raise ConfigError(
            f"--model: {folder} is not a causal language model: {e}",
            "it must load with AutoModelForCausalLM.from_pretrained",
        ) from e
    return _prepared(model)


def _prepared(model: Any) -> Model:
    model.config.use_cache = False
    prepared: Model = model.float().eval()  # no dropout: records must not differ in luck
    return prepared


def config_of(model: Model) -> dict[str, Any]:
    """Its Hugging Face configuration as JSON, enough for `build`."""
    config: Any = model.config
    fields: dict[str, Any] = config.to_diff_dict()
    for local in ("_name_or_path", "transformers_version", "architectures", "dtype", "use_cache"):
        fields.pop(local, None)
    return {"model_type": config.model_type, **fields}


class FlatParameters:
    """A model's trainable parameters as one vector, tied ones once, in the order of their names'
    appearance. Built on the bare model; wrappers that add hooks leave it valid.
    """

    def __init__(self, model: Model) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        sizes = torch.tensor([p.numel() for p in self._parameters])
        self._ends = sizes.cumsum(0)
        self._starts = self._ends - sizes
        self.num_params = int(sizes.sum())

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        """In flat order."""
        return iter(self._parameters)

    @torch.no_grad()
    def read(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """All of them: (num_params,) float32, CPU."""
        flat = torch.empty(self.num_params) if out is None else out
        for parameter, start, end in self._ranges():
            flat[start:end].copy_(parameter.reshape(-1))
        return flat

    @torch.no_grad()
    def write(self, flat: torch.Tensor) -> None:
        """Replace all of them.

        Raises:
            ValueError: wrong number of values.
        """
        if flat.shape != (self.num_params,):
            raise ValueError(f"{tuple(flat.shape)} values for {self.num_params} parameters")
        for parameter, start, end in self._ranges():
            parameter.copy_(flat[start:end].view_as(parameter))

    @torch.no_grad()
    def gather(self, indices: torch.Tensor) -> torch.Tensor:
        """Values at sorted flat positions: (n,) int64 -> (n,) float32, CPU."""
        parts = [
            parameter.reshape(-1)[inner.to(parameter.device)].float().cpu()
            for parameter, inner, _ in self._parts(indices)
        ]
        return torch.cat(parts) if parts else torch.empty(0)

    @torch.no_grad()
    def add_(self, indices: torch.Tensor, values: torch.Tensor) -> None:
        """Add (n,) float32 values at sorted flat positions."""
        for parameter, inner, where in self._parts(indices):
            flat = parameter.view(-1)
            update = values[where].to(parameter.device, parameter.dtype)
            flat.index_add_(0, inner.to(parameter.device), update)

    def _ranges(self) -> Iterable[tuple[torch.nn.Parameter, int, int]]:
        return zip(self._parameters, self._starts.tolist(), self._ends.tolist(), strict=True)

    def _parts(
        self, indices: torch.Tensor
    ) -> Iterable[tuple[torch.nn.Parameter, torch.Tensor, slice]]:
        """Per parameter that is touched: positions within it, and where they are in `indices`."""
        first = torch.searchsorted(indices, self._starts).tolist()
        last = torch.searchsorted(indices, self._ends).tolist()
        for parameter, start, a, b in zip(
            self._parameters, self._starts.tolist(), first, last, strict=True
        ):
            if b > a:
                yield parameter, indices[a:b] - start, slice(a, b)


def digest(flat: torch.Tensor) -> str:
    """BLAKE2b-256 (hex) of (P,) float32 values in little endian."""
    data = flat.detach().contiguous().cpu().float().numpy().astype("<f4", copy=False)
    return hashlib.blake2b(memoryview(data), digest_size=32).hexdigest()


def record_losses(
    model: Model, input_ids: torch.Tensor, pad_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token loss of every record.

    Args:
        model: causal language model.
        input_ids: (B, T) int64.
        pad_id: tokens with this id are not predicted.

    Returns:
        Sum of negative log-likelihoods in nats, (B,) float32, and predicted tokens, (B,).
    """
    batch, length = input_ids.shape
    # GPT-2 broadcasts positions over the batch, which hides them from per-record gradients.
    positions = torch.arange(length, device=input_ids.device).expand(batch, length)
    logits = model(input_ids=input_ids, position_ids=positions).logits[:, :-1].float()
    targets = input_ids[:, 1:]
    kept = targets != pad_id
    losses = functional.cross_entropy(
        logits.transpose(1, 2), targets.where(kept, IGNORED), reduction="none", ignore_index=IGNORED
    )
    return losses.sum(1), kept.sum(1)


@torch.no_grad()
def evaluate(model: Model, records: torch.Tensor, pad_id: int, micro_batch: int = 32) -> float:
    """Mean loss per token (nats) over (n, T) int64 records; NaN if there are none."""
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64)
    tokens = 0
    for batch in torch.split(records, micro_batch):
        losses, counts = record_losses(model, batch.to(device), pad_id)
        total += losses.sum().double().cpu()
        tokens += int(counts.sum())
    return float(total / tokens) if tokens else float("nan")


def choose_device(name: str) -> torch.device:
    """The device for a setting of training.device.

    Raises:
        ConfigError: it was asked for and is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((kind for kind, there in available.items() if there), "cpu")
    elif not available.get(name, True):
        raise ConfigError(f"training.device: {name!r} is not available here", "use auto or cpu")
    return torch.device(name)


@torch.no_grad()
def generate(
    model: Model, prompt: list[int], num_tokens: int, temperature: float, seed: int
) -> list[int]:
    """Continue a prompt; a plain loop, for a few words."""
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    config: Any = model.config
    tokens = list(prompt)
    for _ in range(num_tokens):
        window = torch.tensor([tokens[-config.max_position_embeddings :]], device=device)
        logits = model(input_ids=window).logits[0, -1].float().cpu()
        probabilities = (logits / temperature).softmax(0)
        tokens.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return tokens[len(prompt) :]


def save_folder(model: Model, folder: Path) -> None:
    """Write a folder that `from_folder` and AutoModelForCausalLM.from_pretrained load."""
    saved: Any = model
    saved.save_pretrained(str(folder))


def export_hf(model: Model, folder: Path, extra: Iterable[tuple[str, bytes]] = ()) -> None:
    """Export atomically.

    Args:
        model: to be written.
        folder: must not exist, or be empty.
        extra: further files (name, content), e.g. of the tokenizer.

    Raises:
        LocalError: the folder holds something, or can't be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LocalError(f"--hf: {folder} is not empty", "choose a new folder")
    staging = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        save_folder(model, staging)
        for name, content in extra:
            (staging / name).write_bytes(content)
        staging.chmod(0o755)
        os.replace(staging, folder)  # noqa: PTH105 - replaces an empty folder, which rename may not
    except OSError as e:
        raise LocalError(f"--hf: {folder} can't be written: {e}", "check disk and rights") from e
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
