"""The founder's decisions on the rest: the public text, and every other field of the manifest."""

from __future__ import annotations

import contextlib
import difflib
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from xpeer import belonging
from xpeer.errors import ConfigError, LocalError
from xpeer.founding_model import InitialModel
from xpeer.identity import blake2b
from xpeer.manifest import MAX_NAME_CHARS, Manifest, PublicText, SharedCorpus, Tokenizer
from xpeer.manifest.model import Model
from xpeer.policies import PrivacyMode, privacy_policy
from xpeer.tokenizer_files import writing_of
from xpeer.training.documents import name_documents
from xpeer.training.formats.rows import holds_text

PUBLIC_TEXT_BYTES = 200_000
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


def draft_manifest(
    name: str,
    source: InitialModel,
    *,
    tokenizer: Path | None,
    public_text: Path | None,
    changes: Iterable[str],
    corpus: Sequence[str] = (),
    text_field: str = "text",
    privacy: PrivacyMode = "record",
    device: str = "auto",
) -> Manifest:
    """Make a manifest from the arguments, `section.field=value` changes and defaults.

    Args:
        name: of the swarm.
        source: the initial model.
        tokenizer: its folder; None = bytes.
        public_text: a file; None = the Python manual's topics.
        changes: values of `--set`.
        corpus: files of a corpus of which all members hold a copy, and each trains a part.
        text_field: `data.text_field`, for the corpus.
        privacy: the privacy mode.
        device: `training.device`: where the model is measured.

    Raises:
        ConfigError: a field is unknown or out of bounds, or the model does not fit the tokenizer
            or the length of a sequence.
    """
    _require_name(name)
    text = _public_text(public_text)
    ids = _tokenizer(tokenizer)
    parts: dict[str, Any] = {
        "model": source.section(),
        "tokenizer": _named(ids, tokenizer),
        "public_text": PublicText(blake2b(text.encode()).hex(), text),
    }
    if corpus:
        digest = name_documents(corpus, text_field, "--corpus", ids.chat).digest()
        parts["shared_corpus"] = SharedCorpus(name, digest)
    manifest = _decided(name, parts, changes, privacy)
    source.check(ids.vocab_size, manifest.optimiser.sequence_tokens)
    length = manifest.optimiser.sequence_tokens
    model = source.without_frozen(manifest.model, ids.vocab_size, length)
    manifest = msgspec.structs.replace(manifest, model=model)
    _require_startable(manifest, ids)
    loss = source.public_loss(manifest, ids, device)
    public = msgspec.structs.replace(manifest.public_text, initial_loss=loss)
    return msgspec.structs.replace(manifest, public_text=public)


def foresee_manifest(
    name: str, model: Model, *, changes: Iterable[str], privacy: PrivacyMode, corpus: bool
) -> Manifest:
    """Make a manifest of what is known before anything is loaded. Nobody signs it.

    Args:
        name: of the swarm.
        model: as far as it is known.
        changes: values of `--set`.
        privacy: the privacy mode.
        corpus: whether all members hold a copy of a corpus.

    Raises:
        ConfigError: a field is unknown or out of bounds.
    """
    _require_name(name)
    parts: dict[str, Any] = {"model": model, "public_text": PublicText(blake2b(b"").hex(), "")}
    if corpus:
        parts["shared_corpus"] = SharedCorpus(name, "")
    return _decided(name, parts, changes, privacy)


def _require_name(name: str) -> None:
    if not (name.isprintable() and 0 < len(name.strip()) <= MAX_NAME_CHARS):
        raise ConfigError(
            f"--swarm: {name!r} is no name", f"use 1 to {MAX_NAME_CHARS} printable characters"
        )


def _decided(
    name: str, parts: dict[str, Any], changes: Iterable[str], privacy: PrivacyMode
) -> Manifest:
    """The manifest of some sections, `--set` and defaults."""
    tree: dict[str, Any] = {
        "name": name,
        "created_unix_s": int(time.time()),
        **msgspec.to_builtins(parts),
        "privacy": {"mode": privacy},
    }
    for change in changes:
        _apply(tree, change)
    end = tree.setdefault("end", {})
    if "steps" not in end and _needs_steps(tree["privacy"], end):
        end["steps"] = 1000
    try:
        # Encode and decode, so that a value that JSON can't hold (infinity) fails here.
        return msgspec.json.decode(
            msgspec.json.encode(msgspec.convert(tree, Manifest)), type=Manifest
        )
    except msgspec.ValidationError as e:
        problem, _, where = str(e).partition(" - at `$.")
        field = where.rstrip("`")
        raise ConfigError(
            f"manifest{f' {field}' if field else ''}: {problem}", f"correct {given_by(field)}"
        ) from e


def given_by(field: str) -> str:
    """The option of `xpeer init` that decides a field of the manifest."""
    for part, option in OPTIONS.items():
        if field == part or field.startswith((f"{part}.", f"{part}[")):
            return option
    return f"--set {field}" if field else "it with --set"


def _require_startable(manifest: Manifest, tokenizer: Any) -> None:
    """Refuse a manifest that nodes would refuse at their start. Quick checks only; see `trial`."""
    from xpeer.mixing.cut import Cut  # noqa: PLC0415
    from xpeer.training.document import document_of  # noqa: PLC0415 - torch takes seconds
    from xpeer.training.records import cut  # noqa: PLC0415

    length = manifest.optimiser.sequence_tokens
    try:
        Cut(manifest.model.num_params, manifest.round.fragments)
    except LocalError as e:
        raise ConfigError(f"manifest {e.problem}", e.remedy) from e
    try:
        cut([document_of(manifest.public_text.text, "public text")], tokenizer, length)
    except ConfigError as e:
        raise ConfigError(f"--public-text: {e.problem}", "give a longer text") from e


def _named(tokenizer: Any, folder: Path | None) -> Tokenizer:
    kind, digest, *_ = tokenizer.name.split("/")
    if kind != "huggingface" or folder is None:
        return Tokenizer()
    writing = writing_of(folder)
    return Tokenizer("huggingface", digest, writing.in_use, writing.chat_digest)


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
        why = e.strerror if isinstance(e, OSError) else e
        raise ConfigError(f"--public-text: {path} can't be read: {why}", "give a text file") from e
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
