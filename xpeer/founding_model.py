"""The founder's decisions: the initial model, the public text, and every field of the manifest."""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from xpeer import belonging
from xpeer.errors import ConfigError, LocalError
from xpeer.identity import blake2b
from xpeer.manifest import (
    MAX_NAME_CHARS,
    BaseDtype,
    Lora,
    LoraTrain,
    Manifest,
    Model,
    PublicText,
    Tokenizer,
)
from xpeer.policies import PrivacyMode, privacy_policy
from xpeer.source import main_dtype, name_of
from xpeer.training.documents import corpus_digest, load_documents
from xpeer.training.formats.rows import holds_text

PUBLIC_TEXT_BYTES = 200_000
INITIAL_RECORDS = 8
"""Records of the public text on which the initial parameters' loss is measured: a few, since that
takes as long as a step of a large model."""
MEASURED = frozenset({"model", "tokenizer", "public_text"})
"""Sections that are computed from files. Nobody writes them by hand."""
OPTIONS = {
    "name": "--swarm",
    "model.lora.rank": "--lora-rank",
    "model.lora.alpha": "--lora-alpha",
    "model.lora.targets": "--lora-target",
    "model.lora.train": "--lora-train",
    "model.base_dtype": "--base-dtype",
    "model.lora.rank_stabilised": "--lora-rank-stabilised",
    "model": "--model, --model-config or --preset",
    "tokenizer": "--tokenizer",
    "public_text": "--public-text",
    "privacy.mode": "--privacy",
    "shared_corpus": "--corpus",
}
"""Options that decide fields of the manifest. --set decides all other fields."""
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
        )

    def write(self, folder: Path) -> None:
        """Write the parameters as a Hugging Face folder, in the type that nodes hold them in.

        Adapters to start from are in a folder below.
        """
        from transformers.utils.logging import disable_progress_bar  # noqa: PLC0415

        from xpeer.training import adapters, given_adapters  # noqa: PLC0415 - torch takes seconds
        from xpeer.training.export import export_hf  # noqa: PLC0415
        from xpeer.training.kept import Source  # noqa: PLC0415

        disable_progress_bar()
        folders = [] if self.origin.folder is None else [self.origin.folder]
        source = Source(self.config, self.origin.generation, folders, self.base_dtype)
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

    def public_loss(self, manifest: Manifest, tokenizer: Any) -> float | None:
        """Measure the loss on a few records of the public text; None if it is not finite."""
        from xpeer.training.documents import document_of  # noqa: PLC0415 - torch takes seconds
        from xpeer.training.losses import evaluate  # noqa: PLC0415
        from xpeer.training.measuring import spread  # noqa: PLC0415
        from xpeer.training.records import cut  # noqa: PLC0415

        document = document_of(manifest.public_text.text, "public text")
        records = cut([document], tokenizer, manifest.optimiser.sequence_tokens)
        loss = evaluate(self.module, spread(records, INITIAL_RECORDS))
        return loss if math.isfinite(loss) and loss > 0 else None


@dataclass(frozen=True)
class LoraOptions:
    """The founder's options for adapters; see `manifest.Lora`."""

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
) -> InitialModel:
    """Load or draw the initial parameters. At most one source may be given; default: preset small.

    Args:
        folder: a Hugging Face model's folder.
        config_file: a model's config.json, for random weights.
        preset: a key of `PRESETS`, for random weights.
        lora: train adapters of that model; None = train all of it.

    Raises:
        ConfigError: there is more than one source, it can't be read, or it has no layers to adapt.
    """
    from xpeer.training import flat, kept, losses, model  # noqa: PLC0415 - torch takes seconds
    from xpeer.training.held import DTYPES, hold  # noqa: PLC0415
    from xpeer.training.rebuild import require_same  # noqa: PLC0415

    if sum(source is not None for source in (folder, config_file, preset)) > 1:
        raise ConfigError("--model, --model-config and --preset exclude one another", "keep one")
    origin = Origin()
    held = _base_dtype(folder, lora)
    if folder is not None:
        module = model.from_folder(folder, dtype=DTYPES[held])
        config = model.read_config(folder)
        origin = Origin(folder, kept.read_generation(folder))
    else:
        config = PRESETS[preset or "small"] if config_file is None else read_json(config_file)
        module = hold(model.build(config, seed=secrets.randbits(63)), DTYPES[held])
    config = kept.config_for_manifest(config, losses.transformers_model(module))
    require_same(module, model.skeleton(config))
    digest = flat.digest_of(module, DTYPES[held])
    if lora is None:
        return InitialModel(module, config, flat.num_params(module), digest, origin=origin)
    base = InitialModel(module, config, 0, "", origin=origin, base_dtype=held)
    return _with_adapters(base, lora, digest)


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


def _base_dtype(folder: Path | None, lora: LoraOptions | None) -> BaseDtype:
    """The type that every node holds the frozen weights in."""
    from xpeer.training import given_adapters  # noqa: PLC0415 - torch takes seconds

    if lora is None:
        return "float32"
    if lora.base_dtype is not None:
        return lora.base_dtype
    if lora.folder is not None and (named := given_adapters.base_dtype(lora.folder)):
        return named
    return "bfloat16" if folder and main_dtype(folder) in ("BF16", "F16") else "float32"


def draft_manifest(
    name: str,
    source: InitialModel,
    *,
    tokenizer: Path | None,
    public_text: Path | None,
    changes: Iterable[str],
    corpus: Sequence[str] = (),
    privacy: PrivacyMode = "record",
) -> Manifest:
    """Make a manifest from the arguments, `section.field=value` changes and defaults.

    Args:
        name: of the swarm.
        source: the initial model.
        tokenizer: its folder; None = bytes.
        public_text: a file; None = the Python manual's topics.
        changes: values of `--set`.
        corpus: files of a corpus of which all members hold a copy, and each trains a part.
        privacy: the privacy mode.

    Raises:
        ConfigError: a field is unknown or out of bounds, or the model does not fit the tokenizer
            or the length of a sequence.
    """
    if not (name.isprintable() and 0 < len(name.strip()) <= MAX_NAME_CHARS):
        raise ConfigError(
            f"--swarm: {name!r} is no name", f"use 1 to {MAX_NAME_CHARS} printable characters"
        )
    text = _public_text(public_text)
    ids = _tokenizer(tokenizer)
    tree: dict[str, Any] = {
        "name": name,
        "created_unix_s": int(time.time()),
        "model": msgspec.to_builtins(source.section()),
        "tokenizer": msgspec.to_builtins(_named(ids)),
        "public_text": msgspec.to_builtins(PublicText(blake2b(text.encode()).hex(), text)),
        "privacy": {"mode": privacy},
    }
    if corpus:
        digest = corpus_digest(load_documents(corpus, setting="--corpus"))
        tree["shared_corpus"] = {"name": name, "digest": digest}
    for change in changes:
        _apply(tree, change)
    end = tree.setdefault("end", {})
    if "steps" not in end and _needs_steps(tree["privacy"], end):
        end["steps"] = 1000
    try:
        # Encode and decode, so that a value that JSON can't hold (infinity) fails here.
        manifest = msgspec.json.decode(
            msgspec.json.encode(msgspec.convert(tree, Manifest)), type=Manifest
        )
    except msgspec.ValidationError as e:
        problem, _, where = str(e).partition(" - at `$.")
        field = where.rstrip("`")
        raise ConfigError(
            f"manifest{f' {field}' if field else ''}: {problem}", f"correct {given_by(field)}"
        ) from e
    source.check(ids.vocab_size, manifest.optimiser.sequence_tokens)
    length = manifest.optimiser.sequence_tokens
    model = source.without_frozen(manifest.model, ids.vocab_size, length)
    manifest = msgspec.structs.replace(manifest, model=model)
    _require_startable(manifest, ids)
    loss = source.public_loss(manifest, ids)
    public = msgspec.structs.replace(manifest.public_text, initial_loss=loss)
    return msgspec.structs.replace(manifest, public_text=public)


def given_by(field: str) -> str:
    """The option of `xpeer init` that decides a field of the manifest."""
    for part, option in OPTIONS.items():
        if field == part or field.startswith((f"{part}.", f"{part}[")):
            return option
    return f"--set {field}" if field else "it with --set"


def _require_startable(manifest: Manifest, tokenizer: Any) -> None:
    """Refuse a manifest that nodes would refuse at their start. Quick checks only; see `trial`."""
    from xpeer.mixing.fragments import Fragments  # noqa: PLC0415
    from xpeer.training.documents import document_of  # noqa: PLC0415 - torch takes seconds
    from xpeer.training.records import cut  # noqa: PLC0415

    length = manifest.optimiser.sequence_tokens
    try:
        Fragments(manifest.model.num_params, manifest.round.fragments)
    except LocalError as e:
        raise ConfigError(f"manifest {e.problem}", e.remedy) from e
    try:
        cut([document_of(manifest.public_text.text, "public text")], tokenizer, length)
    except ConfigError as e:
        raise ConfigError(f"--public-text: {e.problem}", "give a longer text") from e


def _named(tokenizer: Any) -> Tokenizer:
    kind, _, digest = tokenizer.name.partition("/")
    return Tokenizer("huggingface", digest) if kind == "huggingface" else Tokenizer()


def _needs_steps(privacy: dict[str, Any], end: dict[str, Any]) -> bool:
    """Whether a run without end.steps would have no noise, or no end."""
    if not privacy_policy(privacy["mode"]).charges:
        return all(value is None for value in end.values())
    return privacy.get("noise_multiplier") is None


def _apply(tree: dict[str, Any], change: str) -> None:
    path, equals, raw = change.partition("=")
    section, dot, field = path.partition(".")
    if not equals or not dot:
        raise ConfigError(f"--set: {change!r} is not section.field=value", "e.g. end.steps=2000")
    if section in MEASURED or path == "privacy.mode":
        raise ConfigError(
            f"--set: {path} is not set by hand",
            "use --privacy, --model, --model-config, --preset, --lora-rank, --tokenizer or "
            "--public-text",
        )
    known = {
        f"{part.name}.{inner.name}"
        for part in msgspec.structs.fields(Manifest)
        if part.name not in MEASURED
        for inner in _fields_of(part.type)
    }
    if path not in known:
        close = difflib.get_close_matches(path, sorted(known), n=1)
        raise ConfigError(
            f"--set: the manifest has no field {path}",
            f"did you mean {close[0]}?" if close else f"fields: {', '.join(sorted(known))}",
        )
    try:
        value = json.loads(raw, parse_constant=_refuse_constant)
    except ValueError:
        value = raw
    body = tree.setdefault(section, {})
    body[field] = value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _fields_of(kind: Any) -> tuple[msgspec.structs.FieldInfo, ...]:
    candidates = [kind, *getattr(kind, "__args__", ())]
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, msgspec.Struct):
            return msgspec.structs.fields(candidate)
    return ()


def _public_text(path: Path | None) -> str:
    if path is None:
        from pydoc_data import topics  # noqa: PLC0415 - half a megabyte, wanted here only

        return _cut("\n".join(text for _, text in sorted(topics.topics.items())).encode())
    try:
        with path.open("rb") as file:
            text = _cut(file.read(PUBLIC_TEXT_BYTES))
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"--public-text: {path} can't be read: {e}", "give a text file") from e
    if not holds_text(text):
        raise ConfigError(f"--public-text: {path} holds no text", "give a text file")
    return text


def _cut(data: bytes) -> str:
    """The beginning of the data as text, without a last character that the cut broke."""
    whole = data[:PUBLIC_TEXT_BYTES]
    for end in range(len(whole), max(len(whole) - 4, -1), -1):
        with contextlib.suppress(UnicodeDecodeError):
            return whole[:end].decode()
    return whole.decode()


def _tokenizer(folder: Path | None) -> Any:
    """Load the tokenizer in the way in which nodes will load it."""
    from xpeer.training.tokenizer import load_tokenizer  # noqa: PLC0415 - tokenizers is slow

    if folder is None:
        return load_tokenizer(Tokenizer())
    file = folder / "tokenizer.json"
    try:
        spec = Tokenizer("huggingface", blake2b(belonging.read_inside(file, folder)).hex())
    except OSError as e:
        raise ConfigError(f"--tokenizer: {file} can't be read: {e}", "name its folder") from e
    try:
        return load_tokenizer(spec, str(folder))
    except ConfigError as e:
        raise ConfigError(e.problem.replace("data.tokenizer", "--tokenizer"), e.remedy) from e


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
