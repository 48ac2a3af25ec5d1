"""The manifest's section on the model: what is trained, what is frozen, what adapters there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from msgspec import Meta, Struct

from xpeer.leaves import seen_by
from xpeer.manifest.kinds import Count, Positive

BaseDtype = Literal["float32", "bfloat16", "int8", "nf4"]
"""What the frozen weights of a model with adapters are held in."""
QUANTISED: Final = ("int8", "nf4")
"""Types that every node makes itself of weights in bfloat16. int8: 255 evenly spaced values between
minus and plus the largest one of a block. nf4: 16 values between them (arXiv:2305.14314)."""
BASE_BLOCK: Final = 64
"""Values of a block that `xpeer init` chooses."""

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
    """BLAKE2b-256 (hex) of the frozen weights, flat, as values of `model.base_dtype` (of bfloat16,
    if they are quantised), little endian. Every node has its own copy of them."""
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
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What checkpoints and joiners get them in. bfloat16: each of them is a number of that type, so
    that nothing is rounded."""


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
    """With adapters: the type in which every node holds the frozen weights. Their hash
    (`lora.base_digest`) is of values of this type; for int8 and nf4, of the values in bfloat16 that
    these are made of."""
    base_block: Literal[0, 64] = 0
    """Values that are quantised with one scale. 0 = nothing is quantised."""

    @property
    def vocabulary(self) -> int | None:
        """Number of the language model's ids; None = its config leaves it to a default."""
        return vocabulary_of(self.config)

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
        if (self.base_dtype in QUANTISED) != (self.base_block > 0):
            raise ValueError(
                f"model.base_dtype = {self.base_dtype} with model.base_block = {self.base_block}: "
                "set both or neither, as xpeer init does"
            )

    @property
    def hashed_dtype(self) -> Literal["float32", "bfloat16"]:
        """Type of the values that `lora.base_digest` is of."""
        return "float32" if self.base_dtype == "float32" else "bfloat16"

    @property
    def state_values(self) -> int:
        """Number of values that a joiner receives: trained ones, then frozen ones."""
        return self.num_params + (self.frozen.num_values if self.frozen else 0)


def vocabulary_of(config: Mapping[str, Any]) -> int | None:
    """Number of ids in a config.json; None = it does not say.

    A model of several parts (text and images) has the language model's settings in `text_config`.
    """
    nested = config.get("text_config")
    inner = nested.get("vocab_size") if isinstance(nested, Mapping) else None
    found = config.get("vocab_size") if inner is None else inner
    return found if isinstance(found, int) and found > 0 else None
