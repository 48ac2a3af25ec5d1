"""The manifest: the signed document that all members of a swarm have in common.

`swarm_id` commits to the founder's admin key and to the first manifest. So a fingerprint that is
read out over the telephone is enough to check a manifest, a certificate or a token from a stranger.
Only members get the manifest, but it holds no secret.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta, Struct

from xpeer.errors import ConfigError
from xpeer.forms import Form
from xpeer.identity import blake2b
from xpeer.leaves import seen_by
from xpeer.manifest.kinds import Count, Positive
from xpeer.manifest.model import Model
from xpeer.manifest.privacy import Privacy
from xpeer.manifest.round import Round

MAX_NAME_CHARS = 80
KNOWS_SOMETHING = 0.9
"""A model has learnt something if its loss is below this fraction of a guess's."""

LEAST_VOCABULARY = 256
"""Ids of a model whose config leaves their number to a default: hardly any model has fewer."""

LARGE_STATE = 1 << 24
"""Models with at least so many trained parameters go to joiners in bfloat16."""


@dataclass(frozen=True, slots=True)
class StateForm:
    """Form of all parameters of a model on their way to a joiner.

    Attributes:
        codec: of the trained values, which come first.
        num_params: how many they are.
        num_frozen: number of frozen values behind them.
        frozen_codec: of these, which are never rounded: `model.frozen.dtype`.
    """

    codec: str
    num_params: int
    num_frozen: int = 0
    frozen_codec: Literal["float32", "bfloat16"] = "float32"

    @property
    def num_bytes(self) -> int:
        """Of all values."""
        return Form(self.codec, self.num_params).num_bytes + self._frozen_bytes

    @property
    def most_bytes(self) -> int:
        """Of all values, with the trained ones in float32."""
        return Form("float32", self.num_params).num_bytes + self._frozen_bytes

    @property
    def _frozen_bytes(self) -> int:
        return Form(self.frozen_codec, self.num_frozen).num_bytes


@seen_by("members", all_public=True)
class Tokenizer(Struct, frozen=True, forbid_unknown_fields=True):
    """How text becomes tokens."""

    kind: Literal["byte", "huggingface"] = "byte"
    digest: str = ""
    """For huggingface: BLAKE2b-256 (hex) of tokenizer.json. Every node has its own copy."""
    special: dict[str, str] | None = None
    """Special tokens that decide which tokens a text or a chat becomes, by name. None: not compared
    with a node's own."""
    chat_digest: str = ""
    """BLAKE2b-256 (hex) of the chat template; of nothing, if the founder's folder has none. Empty:
    not compared with a node's own."""


@seen_by("members", all_public=True)
class Optimiser(Struct, frozen=True, forbid_unknown_fields=True):
    """AdamW on the local shard. Its moments never leave the node."""

    learning_rate: Positive = 1e-3
    beta1: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Meta(ge=0, lt=1)] = 0.95
    weight_decay: Annotated[float, Meta(ge=0)] = 0.0
    warmup_steps: Annotated[int, Meta(ge=0)] = 10
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay of the learning rate over the steps that are expected until the end of the run."""
    final_rate: Annotated[float, Meta(ge=0, le=1)] = 0.1
    """Fraction of the learning rate that is left at the end."""
    gradient_clip: Annotated[float, Meta(ge=0)] = 1.0
    """Norm of the batch gradient without privacy; 0 = none. With privacy, records are clipped."""
    batch_records: Count = 64
    """Records per step; with privacy, their expected number. A record is one training sequence."""
    sequence_tokens: Annotated[int, Meta(ge=8)] = 128


@seen_by("members", all_public=True)
class PublicText(Struct, frozen=True, forbid_unknown_fields=True):
    """Text that is no secret, for losses that all members compare, and for joiners' checks."""

    digest: str
    """BLAKE2b-256 (hex) of the text in UTF-8."""
    text: str
    """The text itself, so that all members measure on the same text."""
    initial_loss: Positive | None = None
    """Loss of the initial parameters on it, nats per token, as the founder measured it. None: not
    measured."""


@seen_by("members", all_public=True)
class SharedCorpus(Struct, frozen=True, forbid_unknown_fields=True):
    """A corpus of which all members hold a copy. Rendezvous hashing gives each its documents."""

    name: str
    digest: str = ""
    """`document.digest_of_names` of every member's copy. Empty = any copy will do, and members with
    different copies divide them differently."""


@seen_by("members", all_public=True)
class End(Struct, frozen=True, forbid_unknown_fields=True):
    """When a node's training ends: at whichever bound comes first. Then it closes and finishes."""

    steps: Count | None = None
    rounds: Count | None = None
    tokens: Count | None = None
    seconds: Positive | None = None


@seen_by("members", all_public=True)
class Limits(Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds that every member enforces on every other."""

    max_members: Annotated[int, Meta(ge=2, le=4096)] = 256
    max_transfers: Annotated[int, Meta(ge=1, le=64)] = 8
    """Transfers of bulk at the same time per node."""


@seen_by("members", "the founder wrote it, before any training", all_public=True)
class Manifest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that has to be the same at every member."""

    version: Literal[1] = 1
    name: str
    created_unix_s: int
    model: Model
    tokenizer: Tokenizer = Tokenizer()
    optimiser: Optimiser = Optimiser()
    round: Round = Round()
    privacy: Privacy = Privacy()
    public_text: PublicText
    swarm_key_digest: str = ""
    """`swarm_key_digest` of the first swarm key, so that a newcomer can check the key it gets."""
    shared_corpus: SharedCorpus | None = None
    end: End = End()
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        """Check what no single field can."""
        if self.privacy.policy.clips_records and self.privacy.noise_multiplier is None:
            if self.end.steps is None:
                raise ValueError(
                    "privacy.noise_multiplier is unset and so is end.steps: "
                    "sigma can't be calibrated; set one of them"
                )
        if not (self.name.isprintable() and 0 < len(self.name.strip()) <= MAX_NAME_CHARS):
            raise ValueError(f"name {self.name!r}: use 1 to {MAX_NAME_CHARS} printable characters")
        self.model.check()
        self.round.check()
        self.privacy.check(shared_corpus=self.shared_corpus is not None)
        if self.public_text.digest != blake2b(self.public_text.text.encode()).hex():
            raise ValueError("public_text.digest does not match public_text.text")

    @property
    def state_form(self) -> StateForm:
        """How joiners are sent the parameters.

        A large model's are in bfloat16, unless exchanges are in float32, too.
        """
        count = self.model.num_params
        large = count >= LARGE_STATE and self.round.payload_codec != "float32"
        codec = "bfloat16" if large else "float32"
        kept = self.model.frozen
        if kept is None:
            return StateForm(codec, count)
        return StateForm(codec, count, kept.num_values, kept.dtype)

    @property
    def start_loss(self) -> float:
        """Public loss of the parameters that the swarm started from, nats per token.

        Infinite where the founder did not measure it, and where it is no better than guessing:
        training on other text may make such a model worse on the public one, and is right.
        """
        loss = self.public_text.initial_loss
        if loss is None:
            return math.inf
        guessing = math.log(self.model.vocabulary or LEAST_VOCABULARY)
        return loss if loss < KNOWS_SOMETHING * guessing else math.inf

    def require_privacy(self, asked: str, max_epsilon: float = 0.0) -> None:
        """Refuse a manifest whose privacy is not what the node's operator wants.

        Args:
            asked: the only mode that is accepted; "" = any.
            max_epsilon: the largest privacy.epsilon that is accepted; 0 = any, and also no privacy.

        Raises:
            ConfigError: the manifest says otherwise. No node can deviate from it.
        """
        charges = self.privacy.policy.charges
        if max_epsilon and (not charges or self.privacy.epsilon > max_epsilon):
            raise ConfigError(
                f"privacy.max_epsilon = {max_epsilon:g}, but the manifest of {self.name!r} says "
                f"{self.privacy.in_short()}",
                "its manifest decides, for all members and for ever: join or found another swarm, "
                + ("or raise" if charges else "or unset")
                + " privacy.max_epsilon",
            )
        mode = self.privacy.mode
        if asked and asked != mode:
            raise ConfigError(
                f"data.privacy = {asked}, but the manifest of {self.name!r} says "
                f"privacy.mode = {mode}",
                "its manifest decides, for all members and for ever: join or found another swarm, "
                f"or set data.privacy (--privacy) to {mode}",
            )
