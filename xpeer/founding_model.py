"""The founder's decisions on the model: its initial parameters and its adapters."""

from __future__ import annotations

import contextlib
import json
import math
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import msgspec

from xpeer import belonging
from xpeer.errors import ConfigError
from xpeer.manifest import Manifest
from xpeer.manifest.model import BASE_BLOCK, QUANTISED, BaseDtype, Lora, LoraTrain, Model
from xpeer.source import main_dtype, name_of

INITIAL_RECORDS = 8
"""Records of the public text on which the initial parameters' loss is measured: a few, since that
takes as long as a step of a large model."""
BYTE_VOCABULARY = 320
"""The byte tokenizer's 259 ids, rounded up to a multiple of 64."""


def _llama(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": BYTE_VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": 257,
    }


_SIXTEEN_BITS: Final = ("BF16", "F16", "bfloat16", "float16")
"""As safetensors and as configs name them."""
PRESETS = {
    "tiny": _llama(64, 176, 2, 4),
    "small": _llama(192, 512, 4, 6),
}
"""Llama-type models for bytes: about 0.1 and 1.8 million parameters."""


@dataclass(frozen=True)
class Origin:
    """The source of an initial model."""

    folder: Path | None = None
    """The model's folder; None = its parameters were drawn here."""
    generation: dict[str, Any] = field(default_factory=dict)
    """The model's generation_config.json."""

    @property
    def name(self) -> str:
        """The name of the model's folder; empty if there is none."""
        return "" if self.folder is None else name_of(self.folder)


@dataclass(frozen=True)
class InitialModel:
    """The parameters that a swarm starts from."""

    module: Any
    config: dict[str, Any]
    num_params: int
    """Number of trained parameters."""
    digest: str
    """BLAKE2b-256 (hex) of the trained parameters."""
    lora: Lora | None = None
    origin: Origin = Origin()
    base_dtype: BaseDtype = "float32"
    adapters: Any = None
    """`GivenAdapters` to go on with; None = they are drawn."""
    warnings: list[str] = field(default_factory=list)
    """For the founder; `public_loss` adds to them."""

    @contextlib.contextmanager
    def adapted(self) -> Iterator[Any]:
        """The model with its adapters within the block; the model itself if it has none."""
        from xpeer.training import adapters  # noqa: PLC0415 - torch takes seconds

        if self.lora is None:
            yield self.module
            return
        module = adapters.adapt(self.module, self.lora)
        try:
            if self.adapters is not None:
                self.adapters.write_to(module)
            yield module
        finally:
            adapters.removed(module)

    def section(self) -> Model:
        """The manifest's section, before anything is frozen."""
        return Model(
            self.config,
            self.num_params,
            self.digest,
            self.lora,
            self.origin.name,
            self.origin.generation,
            base_dtype=self.base_dtype,
            base_block=BASE_BLOCK if self.base_dtype in QUANTISED else 0,
        )

    def write(self, folder: Path) -> None:
        """Write the parameters as a Hugging Face folder, in the type that nodes hold them in, or
        quantise them from.

        Adapters to start from are in a folder below.
        """
        from transformers.utils.logging import disable_progress_bar  # noqa: PLC0415

        from xpeer.training import adapters, given_adapters  # noqa: PLC0415 - torch takes seconds
        from xpeer.training.export import export_hf  # noqa: PLC0415
        from xpeer.training.kept import Source  # noqa: PLC0415

        disable_progress_bar()
        folders = [] if self.origin.folder is None else [self.origin.folder]
        source = Source(self.config, self.origin.generation, folders, self.section().hashed_dtype)
        export_hf(self.module, None, folder, source=source)
        if self.adapters is not None and self.lora is not None:
            (below := folder / given_adapters.FOLDER).mkdir()
            with self.adapted() as module:
                adapters.write(module, self.section(), below)

    def without_frozen(self, section: Model, tokenizer_vocab: int, sequence_tokens: int) -> Model:
        """The manifest's section, after freezing the parameters that no text reaches."""
        from xpeer.training import flat, frozen  # noqa: PLC0415 - torch takes seconds

        with self.adapted() as module:
            untouched = frozen.find(module, sequence_tokens, tokenizer_vocab)
            if untouched is None:
                return section
            frozen.freeze(module, untouched)
            found = flat.num_params(module), flat.digest_of(module)
            frozen.thaw(module, untouched)
        return msgspec.structs.replace(
            section, num_params=found[0], initial_digest=found[1], frozen=untouched
        )

    def check(self, tokenizer_vocab: int, sequence_tokens: int) -> None:
        """Refuse a tokenizer or a length for which the model lacks embeddings.

        Raises:
            ConfigError: names both numbers.
        """
        from xpeer.training.model import check_fits  # noqa: PLC0415 - torch takes seconds

        check_fits(self.module, tokenizer_vocab, sequence_tokens)

    def public_loss(self, manifest: Manifest, tokenizer: Any, device: str) -> float | None:
        """Measure the loss on a few records of the public text; None if it is not finite.

        Adapters to go on with are in the model, as nodes start from them. If it is worse with them
        than without, that is a warning. One record at a time, and in float32: it is the founder's
        number, whatever the device.

        Args:
            manifest: has the text.
            tokenizer: of the swarm.
            device: `training.device`; on a GPU that takes seconds, and on a CPU minutes for a large
                model.
        """
        from xpeer.privacy.steps import FULL  # noqa: PLC0415 - torch takes seconds
        from xpeer.training import losses, placed  # noqa: PLC0415
        from xpeer.training.document import document_of  # noqa: PLC0415
        from xpeer.training.measuring import spread  # noqa: PLC0415
        from xpeer.training.records import cut  # noqa: PLC0415

        document = document_of(manifest.public_text.text, "public text")
        records = cut([document], tokenizer, manifest.optimiser.sequence_tokens)
        some, where = spread(records, INITIAL_RECORDS), losses.choose_device(device)[0]

        def loss_of(module: Any) -> float:
            chosen, _ = losses.choose_losses(module)

            def measure() -> float:
                return losses.evaluate(
                    module, some, micro_batch=1, precision=FULL, losses_of_records=chosen
                )

            return placed.on_best(module, where, measure)

        loss = base = loss_of(self.module)
        if self.adapters is not None:
            with self.adapted() as module:
                loss = loss_of(module)
            if not loss <= base:
                self.warnings.append(
                    f"on the public text the model has a loss of {loss:.4g} with the adapters of "
                    f"--lora-from, and {base:.4g} without: are they for this model (--model)?"
                )
        return loss if math.isfinite(loss) and loss > 0 else None


@dataclass(frozen=True)
class LoraOptions:
    """The founder's options for adapters; see `manifest.model.Lora`."""

    rank: int = 0
    """0 = that of the adapters in `folder`."""
    alpha: float | None = None
    """None = twice the rank."""
    targets: tuple[str, ...] = ()
    """See `training.targets.find`."""
    train: LoraTrain = "both"
    base_dtype: BaseDtype | None = None
    """None = bfloat16 if most of the source's weights have 16 bits, else float32."""
    rank_stabilised: bool = False
    folder: Path | None = None
    """Adapters to start from, which decide rank, alpha and targets; None = new ones are drawn."""


def initial_model(
    folder: Path | None,
    config_file: Path | None,
    preset: str | None,
    lora: LoraOptions | None = None,
    near: Path | None = None,
) -> InitialModel:
    """Load or draw the initial parameters. At most one source may be given; default: preset small.

    Args:
        folder: a Hugging Face model's folder.
        config_file: a model's config.json, for random weights.
        preset: a key of `PRESETS`, for random weights.
        lora: train adapters of that model; None = train all of it.
        near: folder on a disk where the frozen weights of a folder are converted, if they have
            another type; None = in memory.

    Raises:
        ConfigError: there is more than one source, it can't be read, or it has no layers to adapt.
        LocalError: `near` can't be written.
    """
    from xpeer.training import flat, kept, losses, model  # noqa: PLC0415 - torch takes seconds
    from xpeer.training.held import DTYPES, hold  # noqa: PLC0415
    from xpeer.training.rebuild import require_same  # noqa: PLC0415

    config = _config_of(folder, config_file, preset)
    origin = Origin()
    held = base_dtype(folder, lora)
    if folder is not None:
        # weights that are trained have to be memory
        module = model.from_folder(folder, dtype=DTYPES[held], near=near if lora else None)
        origin = Origin(folder, kept.read_generation(folder))
    else:
        module = hold(model.build(config, seed=secrets.randbits(63)), DTYPES[held])
    config = kept.config_for_manifest(config, losses.transformers_model(module))
    require_same(module, model.skeleton(config))
    digest = flat.digest_of(module, DTYPES[held])
    if lora is None:
        return InitialModel(module, config, flat.num_params(module), digest, origin=origin)
    base = InitialModel(module, config, 0, "", origin=origin, base_dtype=held)
    return _with_adapters(base, lora, digest)


def foreseen(
    folder: Path | None, config_file: Path | None, preset: str | None, lora: LoraOptions | None
) -> Model:
    """The manifest's section as far as shapes decide it. It loads no weights, and hashes nothing.

    Args:
        folder: as of `initial_model`, and so the others.
        config_file: a model's config.json.
        preset: a key of `PRESETS`.
        lora: train adapters.

    Raises:
        ConfigError: as of `initial_model`.
    """
    from xpeer.training import adapters, flat, model  # noqa: PLC0415 - torch takes seconds

    config = _config_of(folder, config_file, preset)
    module = model.skeleton(config)
    if lora is None:
        return Model(config, flat.num_params(module), "")
    made, held = expected_adapters(config, lora), base_dtype(folder, lora)
    return Model(
        config,
        flat.num_params(adapters.adapt(module, made)),
        "",
        made,
        base_dtype=held,
        base_block=BASE_BLOCK if held in QUANTISED else 0,
    )


def expected_adapters(config: dict[str, Any], options: LoraOptions) -> Lora:
    """The adapters, as far as they decide how much is needed.

    Args:
        config: of the model.
        options: of the founder.

    Raises:
        ConfigError: the model has no layers to adapt, or the given adapters can't be read.
    """
    from xpeer.training import given_adapters, targets  # noqa: PLC0415 - torch takes seconds
    from xpeer.training.model import skeleton  # noqa: PLC0415

    rank, wanted = options.rank, list(options.targets)
    if options.folder is not None:
        rank, _, _, wanted = given_adapters.read(options.folder).settings
    layers = targets.find(skeleton(config), wanted)
    return Lora(rank, 2.0 * rank, 0, "", layers, options.train)


def _config_of(folder: Path | None, config_file: Path | None, preset: str | None) -> dict[str, Any]:
    """The model's config, from at most one of three sources."""
    from xpeer.training.model import read_config  # noqa: PLC0415 - torch takes seconds

    if sum(source is not None for source in (folder, config_file, preset)) > 1:
        raise ConfigError("--model, --model-config and --preset exclude one another", "keep one")
    if folder is not None:
        return read_config(folder)
    return PRESETS[preset or "small"] if config_file is None else read_json(config_file)


def _with_adapters(base: InitialModel, options: LoraOptions, base_digest: str) -> InitialModel:
    """Decide everything about the adapters of a model."""
    from xpeer.training import adapters, flat, given_adapters, targets  # noqa: PLC0415

    rank, alpha, stabilised = options.rank, options.alpha, options.rank_stabilised
    given, wanted = None, list(options.targets)
    if options.folder is not None:
        given = given_adapters.read(options.folder)
        given.require_base(base_digest, base.base_dtype)
        rank, alpha, stabilised, wanted = given.settings
    made = Lora(
        rank,
        2.0 * rank if alpha is None else alpha,
        secrets.randbits(63),
        base_digest,
        targets.find(base.module, wanted),
        options.train,
        rank_stabilised=stabilised,
        given=given is not None,
    )
    source = replace(base, lora=made, adapters=given)
    with source.adapted() as module:
        made = msgspec.structs.replace(made, fixed_digest=adapters.fixed_digest(module, made))
        trained = flat.num_params(module), flat.digest_of(module)
    return replace(source, lora=made, num_params=trained[0], digest=trained[1])


def base_dtype(folder: Path | None, lora: LoraOptions | None, declared: str = "") -> BaseDtype:
    """The type that every node holds the frozen weights in.

    Args:
        folder: of the model; None = there are no weights.
        lora: the adapters; None = nothing is frozen.
        declared: type that a config names for weights that are not there.
    """
    from xpeer.training import given_adapters  # noqa: PLC0415 - torch takes seconds
    from xpeer.training.model import read_config  # noqa: PLC0415

    if lora is None:
        return "float32"
    if lora.base_dtype is not None:
        return lora.base_dtype
    if lora.folder is not None and (named := given_adapters.base_dtype(lora.folder)):
        return named
    if folder is not None:  # a pickle's types are known only once it is loaded
        declared = main_dtype(folder) or declared_dtype(read_config(folder))
    return "bfloat16" if declared in _SIXTEEN_BITS else "float32"


def declared_dtype(config: Mapping[str, Any]) -> str:
    """The type that a config names, for weights that are not there, or not read yet; "" = none."""
    named = config.get("dtype") or config.get("torch_dtype")
    return named if isinstance(named, str) else ""


def read_json(path: Path) -> dict[str, Any]:
    """Read a model's config, for --model-config.

    Raises:
        ConfigError: it can't be read, or is no object.
    """
    try:
        value = json.loads(belonging.read(path))
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"--model-config: {path} can't be read: {e}", "give a JSON file") from e
    if not isinstance(value, dict):
        raise ConfigError(f"--model-config: {path} is not a JSON object", "give a config.json")
    return value
