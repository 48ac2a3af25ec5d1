"""The manifest: the signed document that all members of a swarm have in common.

`swarm_id` commits to the founder's admin key and to the first manifest. So a fingerprint that is
read out over the telephone is enough to check a manifest, a certificate or a token from a stranger.
Only members get the manifest, but it holds no secret.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from xpeer.errors import ConfigError, NotAuthorisedError
from xpeer.forms import Codec, Form
from xpeer.identity import Domain, Identity, blake2b, verify_with
from xpeer.leaves import seen_by
from xpeer.policies import RULES, PrivacyMode, PrivacyPolicy, RuleName, RulePolicy, privacy_policy

MAX_MANIFEST_BYTES = 1 << 20
MAX_NAME_CHARS = 80
DELTA_MIN, DELTA_MAX = 1e-10, 1e-4
KNOWS_SOMETHING = 0.9
"""A model has learnt something if its loss is below this fraction of a guess's."""
"""Bounds of privacy.delta. Below, the accountant's doubles are too coarse. Above, epsilon means too
little."""

LARGE_STATE = 1 << 24
"""Models with at least so many trained parameters go to joiners in bfloat16."""


@dataclass(frozen=True, slots=True)
class StateForm:
    """Form of all parameters of a model on their way to a joiner.

    Attributes:
        codec: of the trained values, which come first.
        num_params: how many they are.
        num_frozen: number of frozen values behind them, in float32: these are never rounded.
    """

    codec: str
    num_params: int
    num_frozen: int = 0

    @property
    def num_bytes(self) -> int:
        """Of all values."""
        return Form(self.codec, self.num_params).num_bytes + 4 * self.num_frozen


Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]
BaseDtype = Literal["float32", "bfloat16"]
"""What the frozen weights of a model with adapters are held in."""


LoraTrain = Literal["both", "B"]
"""Which factors of an adapter are trained."""


@seen_by("members", all_public=True)
class Lora(Struct, frozen=True, forbid_unknown_fields=True):
    """Adapters of low rank, trained in place of the model's weights (arXiv:2106.09685)."""

    rank: Annotated[int, Meta(ge=1, le=1024)]
    alpha: Positive
    """The output of an adapter is multiplied by alpha / rank; see `rank_stabilised`."""
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    """Random seed of the initial adapters."""
    base_digest: str
    """BLAKE2b-256 (hex) of the frozen weights, flat, as values of `model.base_dtype`, little
    endian. Every node has its own copy of them."""
    targets: list[str] = []
    """Ends of the names of the layers with adapters; empty = all linear ones but the output."""
    train: LoraTrain = "both"
    """B: only B is trained and exchanged, so that averaging is exact. A keeps the values that
    `seed` gives it at every member."""
    fixed_digest: str = ""
    """BLAKE2b-256 (hex) of all A, flat float32 little endian, if only B is trained; else empty."""
    rank_stabilised: bool = False
    """True: the output is multiplied by alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732)."""
    given: bool = False
    """True: the initial values do not follow from `seed`. The founder has them, and joiners get
    theirs from a member."""


@seen_by("members", all_public=True)
class Frozen(Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters that no text of this length can reach.

    Such are positions beyond a record and parts that are never called. They keep their initial
    values: no noise, no exchange, no decay.
    """

    parameters: dict[str, tuple[int, int]]
    """By name: the first trained row, and the row after the last trained one; [0, 0] = no row is
    trained."""
    num_values: Count
    """Number of all frozen values."""
    digest: str
    """BLAKE2b-256 (hex) of the frozen values in the order of names, flat float32 little endian."""


@seen_by("members", all_public=True)
class Model(Struct, frozen=True, forbid_unknown_fields=True):
    """The model that is trained."""

    config: dict[str, Any]
    """Hugging Face config as JSON, `model_type` included."""
    num_params: Count
    """Number of parameters that are trained and exchanged, without the frozen ones."""
    initial_digest: str
    """BLAKE2b-256 (hex) of these parameters' initial values, flat float32 little endian."""
    lora: Lora | None = None
    """None = all weights are trained, not adapters."""
    source: Annotated[str, Meta(max_length=200)] = ""
    """Name of the model in the founder's folder, so that joiners know which model they need."""
    generation: dict[str, Any] = {}
    """generation_config.json of the model that training starts from, for exports."""
    frozen: Frozen | None = None
    """None = all parameters are trained, even those that no text reaches."""
    base_dtype: BaseDtype = "float32"
    """With adapters: what every node holds the frozen weights in, and what their hash
    (`lora.base_digest`) is of."""

    def check(self) -> None:
        """Check what no single field can.

        Raises:
            ValueError: names field and remedy.
        """
        if self.lora is None and self.base_dtype != "float32":
            raise ValueError(
                f"model.base_dtype = {self.base_dtype}: trained weights are float32: set "
                "model.lora, or leave it out"
            )

    @property
    def state_values(self) -> int:
        """Number of values that a joiner receives: trained ones, then frozen ones."""
        return self.num_params + (self.frozen.num_values if self.frozen else 0)


@seen_by("members", all_public=True)
class Tokenizer(Struct, frozen=True, forbid_unknown_fields=True):
    """How text becomes tokens."""

    kind: Literal["byte", "huggingface"] = "byte"
    digest: str = ""
    """For huggingface: BLAKE2b-256 (hex) of tokenizer.json. Every node has its own copy."""


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


REMOVED: Final = (
    (
        "round", "codec", ("int8-modulo", "int4-modulo", "int2-modulo"),
        "modulo codecs were removed", "int8",
    ),
    ("privacy", "mode", ("update",), "mode update was removed", "record"),
)  # fmt: skip
"""Values that manifests up to 2026-11-29 could have: section, field, values, why they are gone, and
the value to use now."""


@seen_by("members", all_public=True)
class Round(Struct, frozen=True, forbid_unknown_fields=True):
    """How often members exchange, and what."""

    window_steps: Count = 5
    """H: a window ends after this many local steps ..."""
    window_s: Positive | None = None
    """... or after this many seconds, whichever comes first. None = by steps alone."""
    slot_s: Positive = 1.0
    """Length of a slot of the shared clock. Groups are drawn anew in every slot; groups of more
    than two begin to meet only in every n-th slot."""
    fragments: Annotated[int, Meta(ge=1, le=1024)] = 5
    """F: the parameters are exchanged in this many parts, F parts a window; 1 = all at once."""
    codec: Codec = "int8"
    """Form of the values in a payload. int4 and int2 round stochastically."""
    rule: RuleName = "gossip"
    """How an exchange changes the parameters: see `xpeer/mixing/rules`."""
    combiner: Literal["mean", "trimmed-mean"] = "mean"
    """How the values of a group become one: see `xpeer/mixing/combine.py`."""
    trim: Annotated[int, Meta(ge=1, le=31)] = 1
    """For trimmed-mean: this many of the largest and of the smallest values of each parameter are
    left out. As many hostile members of a group can't move the result out of the range of the
    honest members' values."""
    group: Annotated[int, Meta(ge=0, le=8)] = 2
    """k: members that meet in a slot; 0 = all."""
    outer_rate: Positive | None = None
    """Constant of the outer optimiser: alpha of diloco and noloco, eta of gasloc. None = value of
    the paper, here and below."""
    outer_momentum: Annotated[float, Meta(ge=0, lt=1)] | None = None
    """Constant of the outer optimiser: mu of diloco and noloco, gamma of gasloc."""
    consensus_rate: Positive | None = None
    """Constant of the outer optimiser: gamma of noloco, alpha of gasloc."""
    masks: bool = False
    """True iff groups of exactly `group` members exchange fixed-point values under masks, which
    cancel in the group's sum. A member learns the sum of the others and no single value. The values
    replace those of `codec`. This is no differential privacy."""
    mask_bits: Literal[16, 32] = 16
    """Bits per parameter. With 16, the sum of k members may be at most 32768 steps away from k
    times one's own value."""
    mask_step: Annotated[float, Meta(ge=1e-9, le=1.0)] = 2.0**-14
    """Distance of two neighbouring masked values, in parameters' units."""
    deadline_s: Positive = 30.0
    """Longest duration of an exchange, from its agreement on."""
    closing_windows: Annotated[int, Meta(ge=0)] | None = None
    """Windows of mixing without training at the end; None = 2*ceil(log2 N)."""

    def check(self) -> None:
        """Check what no single field can.

        Raises:
            ValueError: names fields and remedy.
        """
        if self.group == 1:
            raise ValueError("round.group = 1 meets nobody: use 2 to 8, or 0 for all")
        self._check_combiner()
        if not self.policy.fits(self.group, self.fragments):
            raise ValueError(self.policy.misfit)
        if self.masks:
            self._check_masks()
        outer = (self.outer_rate, self.outer_momentum, self.consensus_rate)
        if outer != (None, None, None) and self.policy.outer is None:
            raise ValueError(
                f"round.rule = {self.rule} has no outer optimiser: leave round.outer_rate, "
                "round.outer_momentum and round.consensus_rate unset"
            )

    def _check_combiner(self) -> None:
        if self.combiner != "trimmed-mean" and self.trim != 1:
            raise ValueError(
                f"round.trim means nothing for round.combiner = {self.combiner}: unset it, or set "
                "round.combiner = trimmed-mean"
            )
        if self.combiner == "mean":
            return
        if self.masks:
            raise ValueError(
                f"round.combiner = {self.combiner} compares the values of single members, which "
                "round.masks = true hides: set one of them back"
            )
        if not self.policy.uses_slots:
            raise ValueError(
                f"round.rule = {self.rule} meets in pairs, of which round.combiner = "
                f"{self.combiner} leaves nothing: set round.rule = gossip"
            )
        if self.policy.weighting != "equal":
            raise ValueError(
                f"round.rule = {self.rule} weights members by what they declare, and "
                f"round.combiner = {self.combiner} counts all alike: set round.rule = gossip"
            )
        if 0 < self.group < self.least_group:
            raise ValueError(
                f"round.combiner = {self.combiner} with round.trim = {self.trim} leaves nothing of "
                f"round.group = {self.group}: set round.group to {self.least_group} or more (8 at "
                "most), or to 0 for all"
            )

    @property
    def least_group(self) -> int:
        """Least number of members, ourselves included, with which a group merges."""
        if self.masks:
            return self.group
        return 2 * self.trim + 1 if self.combiner == "trimmed-mean" else 2

    def _check_masks(self) -> None:
        if not self.policy.needs_only_sum:
            raise ValueError(
                f"round.masks = true shows nothing but a group's plain sum, and round.rule = "
                f"{self.rule} asks for more: set round.rule = gossip, or round.masks = false"
            )
        if self.group < 3:
            raise ValueError(
                f"round.masks = true hides nothing with round.group = {self.group}: "
                "set round.group = 3 to 8, or round.masks = false"
            )

    @property
    def policy(self) -> RulePolicy:
        """Policy of `rule`."""
        return RULES[self.rule]

    @property
    def payload_codec(self) -> str:
        """Name of the codec of an exchange's payload."""
        return f"masked{self.mask_bits}" if self.masks else self.codec


@seen_by("members", all_public=True)
class Privacy(Struct, frozen=True, forbid_unknown_fields=True):
    """The privacy that every member's shard has at least."""

    mode: PrivacyMode = "record"
    """record: DP-SGD that protects each training sequence or document (`unit`). off: no protection.
    """
    epsilon: Positive = 8.0
    delta: Annotated[float, Meta(gt=0, lt=1)] | None = None
    """None = min(1e-5, n^-1.1) for a shard of n records."""
    clip_norm: Positive = 1.0
    """C: L2 norm that each record's gradient is clipped to."""
    noise_multiplier: Positive | None = None
    """sigma; None = each node calibrates it so that `end.steps` steps spend exactly epsilon."""
    unit: Literal["record", "document"] = "record"
    """The unit that epsilon protects. document: whole documents are sampled, about
    `optimiser.batch_records` of them a step, and n counts documents."""
    document_records: Count = 1
    """A step uses at most this many records of a sampled document. Each is clipped to C divided by
    their number."""
    clipping: Literal["fixed", "adaptive"] = "fixed"
    """adaptive: C starts at clip_norm and follows a quantile of the norms. Its private estimate
    costs no further epsilon."""
    clip_quantile: Annotated[float, Meta(gt=0, lt=1)] = 0.5
    """Fraction of the units whose norm should be within C."""
    clip_rate: Annotated[float, Meta(gt=0, le=2)] = 0.2
    """How fast the logarithm of C follows the quantile."""
    clip_count_noise: Positive | None = None
    """sigma_b: standard deviation of the noise that is added to the count of units within C. None =
    a 20th of the batch, or twice sigma if that is more."""

    @property
    def policy(self) -> PrivacyPolicy:
        """Policy of `mode`."""
        return privacy_policy(self.mode)

    def in_short(self) -> str:
        """Mode and target, e.g. "record, epsilon 8"."""
        if not self.policy.charges:
            return self.mode
        unit = ", per document" if self.unit == "document" else ""
        return f"{self.mode}, epsilon {self.epsilon:g}{unit}"

    def check(self, *, shared_corpus: bool) -> None:
        """Check what no single field can.

        Raises:
            ValueError: names fields and remedy.
        """
        if self.delta is not None and not DELTA_MIN <= self.delta <= DELTA_MAX:
            raise ValueError(
                f"privacy.delta = {self.delta:g}: it is the probability with which privacy.epsilon "
                f"does not hold: set it to {DELTA_MIN:g} to {DELTA_MAX:g}, or leave it out"
            )
        if not self.policy.clips_records and (self.unit, self.clipping) != ("record", "fixed"):
            raise ValueError(
                f"privacy.unit and privacy.clipping mean nothing for privacy.mode = {self.mode}: "
                "unset them"
            )
        if self.unit == "document" and shared_corpus:
            raise ValueError(
                "privacy.unit = document: pieces of one document of a shared corpus go to several "
                "members: use privacy.unit = record, or private shards"
            )
        if self.unit == "record" and self.document_records != 1:
            raise ValueError(
                "privacy.document_records means nothing for privacy.unit = record: unset it, or "
                "set privacy.unit = document"
            )
        for field in msgspec.structs.fields(Privacy):
            name, alters = field.name, field.name in ("clip_quantile", "clip_rate")
            if self.clipping == "fixed" and alters and getattr(self, name) != field.default:
                raise ValueError(
                    f"privacy.{name} means nothing for privacy.clipping = fixed: unset it, or set "
                    "privacy.clipping = adaptive"
                )
        sigma, count = self.noise_multiplier, self.clip_count_noise
        if self.clipping == "fixed" and count is not None:
            raise ValueError(
                "privacy.clip_count_noise means nothing for privacy.clipping = fixed: unset it, or "
                "set privacy.clipping = adaptive"
            )
        if sigma is not None and count is not None and 2 * count <= sigma:
            raise ValueError(
                f"privacy.clip_count_noise = {count:g}: the count alone would cost more than a "
                f"step with privacy.noise_multiplier = {sigma:g}: set it above {sigma / 2:g}"
            )


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
    """`documents.corpus_digest` that every member's copy must have. Empty = any copy will do, and
    members with different copies divide them differently."""


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
        return StateForm(codec, count, self.model.state_values - count)

    @property
    def start_loss(self) -> float:
        """Public loss of the parameters that the swarm started from, nats per token.

        Infinite where the founder did not measure it, and where it is no better than guessing:
        training on other text may make such a model worse on the public one, and is right.
        """
        loss, tokens = self.public_text.initial_loss, self.model.config.get("vocab_size")
        if loss is None:
            return math.inf
        guessing = math.log(tokens) if isinstance(tokens, int) and tokens > 1 else math.inf
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


def swarm_key_digest(key: bytes) -> str:
    """Digest of a swarm key. It may be public, since nobody can guess 32 random bytes."""
    return blake2b(Domain.SWARM_KEY, key).hex()


@seen_by("members", all_public=True)
class SignedManifest(Struct, frozen=True, forbid_unknown_fields=True):
    """A manifest as it travels and lies on disk. Make with `sign`, read with `open`."""

    body: str
    """The manifest as JSON. The signature is over these bytes, so nobody ever re-encodes them."""
    admin: bytes
    """Ed25519 public key of the founder's admin key."""
    signature: bytes

    @classmethod
    def sign(cls, manifest: Manifest, admin: Identity) -> SignedManifest:
        """Found a swarm: sign its first manifest."""
        body = msgspec.json.encode(manifest, order="sorted").decode()
        signature = admin.sign(Domain.MANIFEST, body.encode())
        return cls(body=body, admin=admin.verify_key, signature=signature)

    @property
    def genesis(self) -> Genesis:
        """Admin key and hash of this manifest, to which the swarm's fingerprint commits."""
        return Genesis(admin=self.admin, manifest_hash=blake2b(self.body.encode()))

    def open(self, swarm_id: str | None = None) -> Manifest:
        """Verify the signature, the fingerprint if given, and every field.

        Raises:
            NotAuthorisedError: it was altered, or is of another swarm.
            ConfigError: it is signed, but this version can't read it.
        """
        if not verify_with(self.admin, Domain.MANIFEST, self.body.encode(), self.signature):
            raise NotAuthorisedError(
                "the manifest's signature is wrong: it was altered", "fetch it from a member again"
            )
        if swarm_id is not None and self.genesis.swarm_id != swarm_id:
            raise NotAuthorisedError(
                f"the manifest is of swarm {self.genesis.swarm_id[:16]}, not {swarm_id[:16]}",
                "use the token of the swarm that you want to join",
            )
        try:
            return msgspec.json.decode(self.body, type=Manifest)
        except (msgspec.MsgspecError, ValueError, RecursionError) as e:
            raise _unreadable(self.body, e) from e

    def to_bytes(self) -> bytes:
        """As JSON, for the disk and for joiners."""
        return msgspec.json.encode(self)

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "manifest") -> SignedManifest:
        """Read what `to_bytes` wrote. `open` checks the signature."""
        if len(data) > MAX_MANIFEST_BYTES:
            raise ConfigError(
                f"{source} has {len(data)} bytes, at most {MAX_MANIFEST_BYTES}",
                "fetch it from a member again",
            )
        try:
            return msgspec.json.decode(data, type=cls)
        except (msgspec.MsgspecError, ValueError, RecursionError) as e:
            raise ConfigError(f"{source} is malformed: {e}", "fetch it from a member again") from e

    @classmethod
    def load(cls, path: Path) -> SignedManifest:
        """Read a manifest's file."""
        try:
            return cls.from_bytes(path.read_bytes(), f"manifest {path}")
        except OSError as e:
            raise ConfigError(
                f"manifest {path} can't be read: {e.strerror}", "run `xpeer init` first"
            ) from e


def _unreadable(body: str, error: Exception) -> ConfigError:
    """The error for a signed manifest that has a removed value, or is of another version."""
    for section, field, gone, what, instead in REMOVED:
        try:
            value = msgspec.json.decode(body)[section][field]
        except (msgspec.MsgspecError, ValueError, LookupError, TypeError, RecursionError):
            continue
        if value in gone:
            return ConfigError(
                f"manifest: {section}.{field} = {value}: {what}",
                "run this swarm with xpeer 0.1.0 as of 2026-11-29 or earlier, or found another one "
                f"with {section}.{field} = {instead}",
            )
    return ConfigError(f"manifest: {error}", "all members need the same xpeer version")


@seen_by("anybody", all_public=True)
class Genesis(Struct, frozen=True, forbid_unknown_fields=True):
    """The two things a swarm's fingerprint commits to."""

    admin: bytes
    manifest_hash: bytes

    @property
    def swarm_id(self) -> str:
        """64 hex digits: the swarm's fingerprint."""
        return blake2b(Domain.SWARM_ID, self.admin, self.manifest_hash).hex()
