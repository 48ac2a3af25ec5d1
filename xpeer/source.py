"""Checks that a path is a model's folder before anything is loaded; else says what it is instead.

It reads only names and the first bytes of files, and needs no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from xpeer import belonging
from xpeer.errors import ConfigError
from xpeer.folders import REMEDIES, missing
from xpeer.manifest.model import vocabulary_of
from xpeer.paths import require, status_of

_SNAPSHOT: Final = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{7,40})/?$")
_LFS: Final = b"version https://git-lfs.github.com/spec/"
_FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16"})
_PICKLED: Final = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_WEIGHTS: Final = ("model.safetensors", "model.safetensors.index.json", *_PICKLED)
_MAX_HEADER: Final = 100_000_000
"""The bound that safetensors itself has, in bytes."""
_ELSEWHERE: Final = {
    "tf_model.h5": "TensorFlow's",
    "flax_model.msgpack": "Flax's",
    "consolidated.safetensors": "the maker's own form",
    "consolidated.00.pth": "the maker's own form",
}
BYTES: Final = "bytes"
"""Value of --tokenizer for bytes."""
_BYTE_VOCABULARY_MAX: Final = 512
"""A model without a tokenizer and with at most this many ids is one for bytes: 256 ids and a few
special ones."""
_GET: Final = REMEDIES["model"]
_OPEN: Final = "check owner and mode of it, and of the folders that it is in"


@contextmanager
def _readable(path: Path, option: str) -> Iterator[None]:
    """Translate errors of the file system into words for the operator.

    Raises:
        ConfigError: the folder, or something in it, can't be read.
    """
    try:
        yield
    except OSError as e:
        what = f": its {Path(e.filename).name}" if _is_below(e.filename, path) else ""
        raise ConfigError(f"{option} {path}{what} can't be read: {e.strerror}", _OPEN) from e


def _is_below(file: object, folder: Path) -> bool:
    return isinstance(file, str) and Path(file) != folder and Path(file).is_relative_to(folder)


def check_folder(path: Path, option: str = "model", *, may_lack_weights: bool = False) -> bool:
    """Refuse a path that is not the folder of a whole model.

    Args:
        path: as given.
        option: the option's name, for errors.
        may_lack_weights: True = a folder that holds no weights at all will do.

    Returns:
        True iff the weights are safetensors. Else they are a pickle, which is read without running
        code in it (`weights_only`).

    Raises:
        ConfigError: says what the path is instead, and what to do.
    """
    _require_folder(path, option)
    with _readable(path, option):
        names = {entry.name for entry in path.iterdir()}
        return _check_folder(path, option, names, may_lack_weights=may_lack_weights)


def has_weights(folder: Path, option: str) -> bool:
    """Whether a checked folder holds weights that xpeer can read.

    Raises:
        ConfigError: the folder can't be read; names the option.
    """
    with _readable(folder, option):
        return any((folder / name).exists() for name in _WEIGHTS)


def _check_folder(path: Path, option: str, names: set[str], *, may_lack_weights: bool) -> bool:
    _require_config(path, option, names)
    _require_inside(path, option)
    refuse_pointer(path / "config.json", option)
    index = "model.safetensors.index.json"
    if index in names:
        parts = _parts(path / index, option)
        lacking = sorted(set(parts) - names)
        if lacking:
            raise ConfigError(
                f"{option} {path}: {len(lacking)} of {len(parts)} parts of its weights are "
                f"missing, e.g. {lacking[0]}",
                "download or copy the folder again",
            )
        for part in parts:
            _check_safetensors(path / part, option)
        return True
    if "model.safetensors" in names:
        _check_safetensors(path / "model.safetensors", option)
        return True
    if names.intersection(_PICKLED):
        for name in sorted(n for n in names if n.endswith(".bin")):
            refuse_pointer(path / name, option)
        return False
    others = _other_weights(path, option, names)
    if others is None and may_lack_weights:
        return False
    raise others or ConfigError(
        f"{option} {path}: there are no weights in it, only {', '.join(sorted(names)[:4])}",
        "download model.safetensors, too; or to begin with random weights, give its config.json "
        "as --model-config",
    )


def refuse_pointer(file: Path, option: str) -> None:
    """Refuse a pointer of git-lfs, which a clone may have in place of a large file.

    Raises:
        ConfigError: the file is a pointer, or can't be read.
    """
    try:
        with file.open("rb") as opened:
            start = opened.read(len(_LFS))
    except OSError as e:
        remedy = _OPEN if isinstance(e, PermissionError) else _GET
        raise ConfigError(
            f"{option} {file.parent}: its {file.name} can't be read: {e.strerror}", remedy
        ) from e
    if start == _LFS:
        raise ConfigError(
            f"{option} {file.parent}: {file.name} is a pointer of git-lfs, not the file itself",
            "run `git lfs pull` in that folder, or download it again",
        )


def name_of(folder: Path) -> str:
    """A model's name: the last part of its folder, or its name in a cache of the hub."""
    whole = folder.expanduser().resolve()
    snapshot = _SNAPSHOT.search(whole.as_posix())
    if snapshot is not None:
        return f"{snapshot[1]}/{snapshot[2]}@{snapshot[3][:12]}"
    return "".join(c for c in whole.name if c.isprintable())[:80]


def tokenizer_of(
    given: str | None, folder: Path | None, config: dict[str, Any] | None
) -> Path | None:
    """The folder of the founder's tokenizer; None = bytes.

    Args:
        given: value of `--tokenizer`; None = the option is not given.
        folder: of the model, or of the config.json that it is made from; None = a preset.
        config: of that model; None = a preset.

    Raises:
        ConfigError: there is no tokenizer that can be read, and the vocabulary is not one of bytes.
    """
    if given == BYTES or (given is None and (folder is None or config is None)):
        return None
    if given is not None:
        named = Path(given).expanduser()
        with _readable(named, "--tokenizer"):
            named = named.parent if named.name == "tokenizer.json" and named.is_file() else named
            _require_tokenizer(named, "--tokenizer")
        return named
    if folder is None or config is None or has_tokenizer(folder, "--model"):
        return folder
    with _readable(folder, "--model"):
        if _other_tokenizer(folder):
            _require_tokenizer(folder, "--model")
    vocabulary = vocabulary_of(config)
    if vocabulary is not None and vocabulary <= _BYTE_VOCABULARY_MAX:
        return None
    raise ConfigError(
        f"--tokenizer is not given, {folder} holds no tokenizer.json, and a vocabulary of "
        f"{vocabulary or 'unknown size'} is not one of bytes",
        f"give the model's own tokenizer: --tokenizer FOLDER; or, if bytes are meant, "
        f"--tokenizer {BYTES}",
    )


def has_tokenizer(folder: Path, option: str) -> bool:
    """Whether the folder holds a tokenizer in a form that xpeer can read.

    Raises:
        ConfigError: the folder can't be read; names the option.
    """
    with _readable(folder, option):
        return (folder / "tokenizer.json").exists()


def _require_tokenizer(folder: Path, option: str) -> None:
    require(option, folder, "folder")
    if not folder.exists():
        raise missing(folder, option, "tokenizer")
    if has_tokenizer(folder, option):
        _require_inside(folder, option)
        refuse_pointer(folder / "tokenizer.json", option)
        return
    other = _other_tokenizer(folder)
    raise ConfigError(
        f"{option} {folder}: there is no tokenizer.json in it"
        + (f", only {other}" if other else ""),
        "convert it: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER), of transformers"
        if other
        else "name the folder that holds the model's tokenizer.json",
    )


def _other_tokenizer(folder: Path) -> str:
    """Name of a tokenizer's file in a form that xpeer can't read; empty = there is none."""
    names = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
    return next((name for name in names if (folder / name).exists()), "")


def config_in(folder: Path | None, file: Path | None) -> dict[str, Any] | None:
    """Read a model's config from its folder or its file, unchecked; None = neither is given."""
    path = folder / "config.json" if folder is not None else file
    return None if path is None else _read(path, folder)


def _require_folder(path: Path, option: str) -> None:
    if status_of(option, path) is None:
        raise missing(path, option, "model")
    refuse_file(path, option)
    require(option, path, "folder")


def refuse_file(path: Path, option: str) -> None:
    """Refuse a file in place of a model's folder, and say what to give instead.

    Raises:
        ConfigError: it is a file, or anything but a folder.
    """
    if path.is_dir() or not path.exists():
        return
    if path.suffix.lower() == ".gguf":
        raise _gguf(path, option)
    if path.suffix.lower() in (".safetensors", ".bin", ".pt", ".pth", ".json"):
        raise ConfigError(
            f"{option} {path} is one file, and a model is a folder: its config.json belongs to it",
            f"give the folder: {option} {path.parent}",
        )
    raise ConfigError(f"{option} {path} is no folder", _GET)


def _require_config(path: Path, option: str, names: set[str]) -> None:
    if "config.json" in names:
        return
    if not names:
        raise ConfigError(f"{option} {path}: the folder is empty", _GET)
    if "adapter_config.json" in names:
        base = _read(path / "adapter_config.json", path).get("base_model_name_or_path")
        raise ConfigError(
            f"{option} {path} holds adapters of peft, not a model"
            + (f"; their base is {base}" if isinstance(base, str) and base.isprintable() else ""),
            "go on with them: give their base, and this folder as --lora-from; or train new ones "
            "with --lora-rank; or merge them into their base (peft: merge_and_unload)",
        )
    if any(name.lower().endswith(".gguf") for name in names):
        raise _gguf(path, option)
    inside = sorted(entry.parent.name for entry in path.glob("*/config.json"))
    raise ConfigError(
        f"{option} {path}: there is no config.json in it"
        + (f", but in {inside[0]} below it" if inside else ""),
        f"give {path / inside[0]}" if inside else _GET,
    )


def _other_weights(path: Path, option: str, names: set[str]) -> ConfigError | None:
    """The error for weights in a form that can't be read; None = there are no weights."""
    if any(name.lower().endswith(".gguf") for name in names):
        return _gguf(path, option)
    for name, whose in _ELSEWHERE.items():
        if name in names:
            return ConfigError(
                f"{option} {path}: its only weights are {name}, {whose}",
                "get the model as safetensors, or convert it with transformers",
            )
    others = sorted(name for name in names if name.endswith(".safetensors"))
    if others:
        return ConfigError(
            f"{option} {path}: its weights are {others[0]}, and no model.safetensors or index "
            "names them",
            "rename a single file to model.safetensors, or restore model.safetensors.index.json",
        )
    return None


def _gguf(path: Path, option: str) -> ConfigError:
    return ConfigError(
        f"{option} {path}: GGUF is llama.cpp's form of a model, mostly quantised; it can't be "
        "trained",
        "get the original model: a folder with config.json and model.safetensors",
    )


def main_dtype(folder: Path) -> str:
    """Type of most of a checked folder's weights, as safetensors names it, e.g. BF16.

    Empty if the weights are no safetensors.
    """
    sizes: dict[str, int] = {}
    for tensors in entries(folder).values():
        for tensor in tensors.values():
            begin, end = tensor["data_offsets"]
            kind = str(tensor["dtype"])
            sizes[kind] = sizes.get(kind, 0) + int(end) - int(begin)
    return max(sizes, key=sizes.__getitem__, default="")


def entries(folder: Path) -> dict[Path, dict[str, Any]]:
    """Read the headers of a checked folder's weights: each tensor's type, shape and place, by name.

    Empty if the weights are no safetensors.
    """
    index = folder / "model.safetensors.index.json"
    names = _parts(index, "model") if index.exists() else ["model.safetensors"]
    return {file: _header(file) for name in names if (file := folder / name).exists()}


def _parts(index: Path, option: str) -> list[str]:
    refuse_pointer(index, option)
    weights = _read(index, index.parent).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise ConfigError(f"{option} {index.parent}: {index.name} is damaged", "download it again")
    return sorted({str(name) for name in weights.values()})


def _check_safetensors(file: Path, option: str) -> None:
    """Refuse a file that is damaged or quantised. Only its header is read."""
    refuse_pointer(file, option)
    try:
        tensors = _header(file)
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError,
    ) as e:  # fmt: skip
        raise ConfigError(
            f"{option} {file.parent}: {file.name} is damaged: {e}", "download or copy it again"
        ) from e
    for name, tensor in tensors.items():
        if name.endswith("weight") and str(tensor.get("dtype")) not in _FLOATS:
            raise ConfigError(
                f"{option} {file.parent}: {name} is of type {tensor.get('dtype')}: quantised "
                "weights can't be trained",
                "get the original model, in float32, float16 or bfloat16",
            )


def _header(file: Path) -> dict[str, Any]:
    """Read the entry of each tensor of a safetensors file, by its name.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, OverflowError: the file is damaged.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > min(_MAX_HEADER, size):
            raise ValueError("its header is longer than the file")
        header: dict[str, Any] = json.loads(opened.read(length))
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    end = 8 + length + max((int(t["data_offsets"][1]) for t in tensors.values()), default=0)
    if size != end:
        raise ValueError(f"it has {size} bytes, and {end} belong to it")
    return tensors


def _require_inside(folder: Path, option: str) -> None:
    try:
        belonging.require_inside(folder)
    except ConfigError as e:
        raise ConfigError(f"{option} {folder}: {e.problem}", e.remedy) from e


def _read(file: Path, folder: Path | None = None) -> dict[str, Any]:
    """Read a JSON object; empty if the file holds none.

    Args:
        file: to be read.
        folder: the file has to be in it; None = a person named the file, so it may be anywhere.
    """
    try:
        content = json.loads(
            belonging.read(file) if folder is None else belonging.read_inside(file, folder)
        )
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
