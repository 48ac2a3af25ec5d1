"""Where a node's settings come from: flags > XPEER_ variables > config.toml > defaults.

They are read once, by `load`. An unknown key or variable is an error that names the nearest valid
one. Which settings there are stands in `config`.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from xpeer import belonging
from xpeer.config import MAX_NUMBER, PATHS, NodeConfig, settings
from xpeer.errors import ConfigError
from xpeer.paths import checked, checked_list, checked_text

ENV_PREFIX: Final = "XPEER_"
NOT_SETTINGS: Final = frozenset({"XPEER_HOME"})
"""Variables that the command line reads itself."""
_SERVICE: Final = re.compile(
    r"XPEER(_\w+)?(_SERVICE_HOST|_SERVICE_PORT(_\w+)?|_PORT_\d+_(TCP|UDP|SCTP)_(ADDR|PORT|PROTO))"
)
_LINK: Final = re.compile(r"XPEER(_\w+)?_PORT(_\d+_(TCP|UDP|SCTP))?")
"""Variables of this form belong to another program only if their value is an address."""
OPTIONS: Final = {
    "network.listen": "--listen",
    "network.announce": "--announce",
    "network.bootstrap": "--bootstrap",
    "network.name": "--name",
    "data.shard": "--shard",
    "data.corpus": "--corpus",
    "data.text_field": "--text-field",
    "data.privacy": "--privacy",
    "data.tokenizer": "--tokenizer",
    "data.base_model": "--base-model",
    "training.min_peers": "--min-peers",
    "daemon.log_format": "--log-format",
}
"""Options of the command line that give a setting."""


def load(
    path: Path, environ: Mapping[str, str], overrides: Mapping[str, Any] | None = None
) -> NodeConfig:
    """Read a node's settings.

    Args:
        path: config.toml; a missing file means defaults.
        environ: usually `os.environ`; XPEER_SECTION_KEY=value, lists separated by commas.
        overrides: flags, as {"section.key": value}; None values are ignored.

    Raises:
        ConfigError: names the key, the value seen, and the nearest valid name or the bound.
    """
    tree = _read_toml(path)
    ignored = NOT_SETTINGS.union(foreign(environ))
    for name, raw in sorted(environ.items()):
        if name.startswith(ENV_PREFIX) and name not in ignored:
            section, key = _key_of_variable(name)
            tree.setdefault(section, {})[key] = _parse_variable(name, section, key, raw)
    for dotted, value in (overrides or {}).items():
        if value is not None:
            section, key = dotted.split(".")
            tree.setdefault(section, {})[key] = value
    _refuse_unknown(tree, path)
    try:
        config = msgspec.convert(tree, NodeConfig)
    except msgspec.ValidationError as e:
        problem, _, where = str(e).partition(" - at `$.")
        where = where.rstrip("`")
        seen = _lookup(tree, where)
        raise ConfigError(
            f"{where}: {problem} (value: {seen!r})",
            f"correct {_origin(where, path, environ, overrides or {})}",
        ) from e
    _refuse_odd(config)
    if 0 < config.network.donate_mbit_s < 1:
        raise ConfigError(
            f"network.donate_mbit_s = {config.network.donate_mbit_s:g}: at less than 1, joiners "
            "give up before a piece has come",
            "set it to 1 or more, or to 0 for no bound",
        )
    if config.data.shard and config.data.corpus:
        raise ConfigError(
            "data.shard and data.corpus are both set", "keep one: a private shard or the corpus"
        )
    return config


def _origin(
    where: str, path: Path, environ: Mapping[str, str], overrides: Mapping[str, Any]
) -> str:
    """The option, variable or file that a setting came from, for messages."""
    setting = where.partition("[")[0]
    variable = f"{ENV_PREFIX}{setting.replace('.', '_')}".upper()
    if overrides.get(setting) is not None:
        return OPTIONS.get(setting, setting)
    return variable if variable in environ else f"{where} in {path}"


def foreign(environ: Mapping[str, str]) -> list[str]:
    """Variables with our prefix that Kubernetes or Docker made for a service named xpeer-something.

    A misspelt setting is not among them: if the name alone does not tell, the value does.
    """
    names = [name for name, value in environ.items() if _of_a_service(name, value)]
    linked = tuple(f"{name.removesuffix('NAME')}ENV_" for name in names if name.endswith("_NAME"))
    names += [name for name in environ if linked and name.startswith(linked)]
    return sorted(set(names) - {f"{ENV_PREFIX}{s}_{k}".upper() for s, k, _ in settings()})


def note_of_foreign(environ: Mapping[str, str]) -> str:
    """A note for the operator on variables that are ignored (see `foreign`); empty if none are."""
    names = foreign(environ)
    if not names:
        return ""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more} ignored: of a service in Kubernetes or Docker, no setting of xpeer"


def _of_a_service(name: str, value: str) -> bool:
    if _SERVICE.fullmatch(name):
        return True
    if _LINK.fullmatch(name):
        return re.match(r"(tcp|udp|sctp)://", value) is not None
    return re.fullmatch(r"XPEER(_\w+)?_NAME", name) is not None and value.count("/") >= 2


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(belonging.read(path).decode())
    except FileNotFoundError:
        return {}
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"config {path} is not valid TOML: {e}", "correct that line") from e
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"config {path} can't be read: {e}", "check its owner and mode") from e


def _key_of_variable(name: str) -> tuple[str, str]:
    known = {f"{ENV_PREFIX}{s}_{k}".upper(): (s, k) for s, k, _ in settings()}
    try:
        return known[name]
    except KeyError:
        raise ConfigError(
            f"environment variable {name} is unknown",
            _nearest(name, [*known, *sorted(NOT_SETTINGS)]),
        ) from None


def _parse_variable(name: str, section: str, key: str, raw: str) -> Any:
    default = next(d for s, k, d in settings() if (s, k) == (section, key))
    if isinstance(default, bool):
        if raw.lower() in {"1", "true", "yes"}:
            return True
        if raw.lower() in {"0", "false", "no"}:
            return False
        return raw
    if isinstance(default, int | float):
        try:
            return int(raw) if isinstance(default, int) else float(raw)
        except ValueError:
            return raw
    if isinstance(default, str):
        return checked(name, raw) if f"{section}.{key}" in PATHS else raw
    if not raw and f"{section}.{key}" not in PATHS:
        return []
    return _parse_list(name, raw)


def _parse_list(name: str, raw: str) -> list[str]:
    checked_list(name, raw)
    parts = [part.strip() for part in raw.split(",")] if "," in raw else [raw]
    if "" in parts:
        raise ConfigError(
            f"{name} = {raw!r} has an empty part", "is a variable unset? Correct or unset it"
        )
    for first in range(len(parts)):
        for last in range(first + 2, len(parts) + 1):
            joined = ",".join(parts[first:last])
            if os.path.exists(joined):  # noqa: PTH110 - a list may be longer than any path
                raise ConfigError(
                    f"{name} = {raw!r}: {joined} exists, but a comma separates two paths here",
                    "write it into config.toml, or give it by its option",
                )
    return parts


def _refuse_odd(config: NodeConfig) -> None:
    """Refuse blank paths and parts of lists, the whole machine as text, and huge numbers."""
    for section, key, _ in settings():
        name, value = f"{section}.{key}", getattr(getattr(config, section), key)
        if isinstance(value, int | float) and not value <= MAX_NUMBER:
            raise ConfigError(f"{name}: {value} is too large", f"correct it: at most {MAX_NUMBER}")
        for part in value if isinstance(value, list) else [value] if value else []:
            if name in ("data.shard", "data.corpus"):
                checked_text(name, part)
            elif name in PATHS or (isinstance(part, str) and not part.strip()):
                checked(name, part)


def _refuse_unknown(tree: dict[str, Any], path: Path) -> None:
    valid: dict[str, list[str]] = {}
    for section, key, _ in settings():
        valid.setdefault(section, []).append(key)
    for section, body in tree.items():
        if section not in valid:
            raise ConfigError(
                f"config {path}: unknown section or key {section!r}", _nearest(section, list(valid))
            )
        if not isinstance(body, dict):
            raise ConfigError(
                f"config {path}: {section} = {body!r} must be a section",
                f"write [{section}] and its keys below",
            )
        for key in body:
            if key not in valid[section]:
                raise ConfigError(
                    f"config {path}: unknown key {section}.{key}", _nearest(key, valid[section])
                )


def _nearest(name: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.4)
    return f"did you mean {close[0]}?" if close else f"valid: {', '.join(valid)}"


def _lookup(tree: dict[str, Any], dotted: str) -> Any:
    value: Any = tree
    for part in dotted.replace("[", ".").replace("]", "").split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
    return value
