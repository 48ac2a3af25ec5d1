"""Loads a trained model for use: from a home's newest checkpoint, or from an export's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import torch

from xpeer import belonging
from xpeer.config import Home
from xpeer.errors import ConfigError
from xpeer.manifest.signed import SignedManifest
from xpeer.training import adapters
from xpeer.training.converted import temporary
from xpeer.training.flat import digest_of
from xpeer.training.held import DTYPES
from xpeer.training.initial import saved_model, trained_model
from xpeer.training.losses import choose_losses
from xpeer.training.model import context_tokens, from_folder
from xpeer.training.quantised import quantise
from xpeer.training.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer

LONGEST_RECORD: Final = 2048
"""Tokens of an evaluated sequence, if the model takes more or does not say."""
BATCH_RECORDS: Final = 8
"""Sequences of a forward pass."""


@dataclass(frozen=True)
class Trained:
    """A trained model, its tokenizer, and where they come from."""

    model: torch.nn.Module
    tokenizer: Tokenizer
    source: str
    warnings: list[str]


def from_home(
    home: Home, base_model: str = "", tokenizer: str = "", *, own: bool = False
) -> Trained:
    """Load a node's newest checkpoint, averaged with its last partners as an export is.

    Args:
        home: of the node; its daemon may be running.
        base_model: `data.base_model`.
        tokenizer: `data.tokenizer`.
        own: load the model that `xpeer finetune` made instead.

    Raises:
        LocalError: there is no checkpoint, or a file that belongs to it is missing.
    """
    signed = SignedManifest.load(home.manifest)
    manifest = signed.open()
    bundle, warnings = saved_model(home, own=own)
    model = trained_model(manifest, home, base_model, bundle)
    made = load_tokenizer(manifest.tokenizer, tokenizer, base_model=base_model)
    source = f"{'own ' if own else ''}step {bundle.step} of {home.path}"
    return Trained(model.eval(), made, source, warnings)


def from_export(
    folder: Path, base_model: Path | None = None, tokenizer: Path | None = None
) -> Trained:
    """Load what `xpeer checkpoint export` wrote, or any causal model of transformers.

    Args:
        folder: of a model, or of adapters.
        base_model: folder of the model that the adapters belong to.
        tokenizer: folder of the tokenizer; None = `folder`.

    Raises:
        ConfigError: the folder holds no such model, or adapters without their base.
        LocalError: the base model is of another type, and can't be converted on a disk.
    """
    made = _tokenizer_of(folder, tokenizer)
    if not (folder / adapters.ADAPTER_CONFIG).exists():
        return Trained(from_folder(folder).eval(), made, str(folder), [])
    if base_model is None:
        raise ConfigError(
            f"--model {folder} holds adapters, and --base-model is not set",
            "name the folder of the model that they are for, or export with --merged",
        )
    belonging.require_inside(folder)
    named = _named_base(folder)
    dtype = DTYPES[named.dtype]
    model = from_folder(base_model, dtype=dtype, near=temporary())
    if named.blake2b_256 and (seen := digest_of(model, dtype)) != named.blake2b_256:
        raise ConfigError(
            f"--base-model {base_model}: its weights have BLAKE2b-256 {seen[:16]}…, the "
            f"adapters are for {named.blake2b_256[:16]}…",
            "name a copy of the model that the swarm's founder named",
        )
    adapted = adapters.attach(quantise(model, named.dtype, named.block), folder)
    return Trained(adapted.eval(), made, str(folder), [])


def _tokenizer_of(folder: Path, tokenizer: Path | None) -> Tokenizer:
    if tokenizer is None and not (folder / "tokenizer.json").exists():
        raise ConfigError(
            f"--model {folder} holds no tokenizer.json",
            "name the folder of its tokenizer with --tokenizer",
        )
    return HuggingFaceTokenizer(tokenizer or folder)


def _named_base(folder: Path) -> adapters.NamedBase:
    """The base model that exported adapters name; only our exports name theirs."""
    file = folder / adapters.BASE_FILE
    try:
        return msgspec.json.decode(belonging.read_inside(file, folder), type=adapters.NamedBase)
    except FileNotFoundError:
        return adapters.NamedBase(blake2b_256="")
    except (OSError, msgspec.MsgspecError, ValueError) as e:
        raise ConfigError(f"{file} can't be read: {e}", "export anew") from e


@dataclass(frozen=True)
class Evaluation:
    """The loss of a text."""

    tokens: int
    """Number of predicted tokens: all but the first of each sequence."""
    bytes: int
    """Number of bytes of the whole text as UTF-8."""
    nats: float
    """Loss, summed over the predicted tokens."""

    @property
    def loss_per_token(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def loss_per_byte(self) -> float:
        """Nats per byte; comparable between tokenizers."""
        return self.nats / self.bytes


@torch.no_grad()
def evaluate_text(trained: Trained, text: str) -> Evaluation:
    """Compute the loss of a text, as one whole document.

    The text is cut into sequences as long as the model takes, but no longer than LONGEST_RECORD.
    The last token of one is the first of the next, so that each token but the first is predicted
    once.

    Args:
        trained: the model.
        text: of any length.

    Raises:
        ConfigError: the text has fewer than two tokens.
    """
    tokenizer, model = trained.tokenizer, trained.model
    records = records_of(tokenizer, text, record_tokens(model))
    if not records:
        raise ConfigError("the text has fewer than two tokens", "give a longer one")
    device = next(model.parameters()).device
    losses_of, _ = choose_losses(model)
    nats, tokens = 0.0, 0
    # A group has sequences of one length: without padding, no padding can be counted by mistake.
    for group in _equal(records, BATCH_RECORDS):
        losses, counted = losses_of(model, torch.tensor(group, device=device))
        nats += float(losses.double().sum())
        tokens += int(counted.sum())
    return Evaluation(tokens=tokens, bytes=len(text.encode()), nats=nats)


def record_tokens(model: torch.nn.Module) -> int:
    """Tokens of an evaluated sequence at most."""
    return min(LONGEST_RECORD, context_tokens(model) or LONGEST_RECORD)


def records_of(tokenizer: Tokenizer, text: str, length: int) -> list[list[int]]:
    """Cut a whole document into sequences; the last token of one is the first of the next."""
    ids = [
        *([] if tokenizer.bos_id is None else [tokenizer.bos_id]),
        *tokenizer.encode(text),
        *([] if tokenizer.eos_id is None else [tokenizer.eos_id]),
    ]
    return [ids[at : at + length] for at in range(0, len(ids) - 1, length - 1)]


def _equal(records: list[list[int]], most: int) -> list[list[list[int]]]:
    whole = [record for record in records if len(record) == len(records[0])]
    groups = [whole[at : at + most] for at in range(0, len(whole), most)]
    return groups if len(whole) == len(records) else [*groups, [records[-1]]]
