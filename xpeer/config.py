"""Settings of one node: read once, here, from flags > XPEER_ variables > config.toml > defaults.

An unknown key or variable is an error that names the nearest valid one. What must be the same at
every peer is in the manifest instead.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
import msgspec.structs
from msgspec import Meta, Struct, field

from xpeer import belonging
from xpeer.errors import ConfigError
from xpeer.leaves import stays
from xpeer.paths import checked, checked_text

ENV_PREFIX = "XPEER_"
NOT_SETTINGS = frozenset({"XPEER_HOME"})
"""Variables that the command line reads itself."""
_SERVICE = re.compile(
    r"XPEER(_\w+)?(_SERVICE_HOST|_SERVICE_PORT(_\w+)?|_PORT_\d+_(TCP|UDP|SCTP)_(ADDR|PORT|PROTO))"
)
_LINK = re.compile(r"XPEER(_\w+)?_PORT(_\d+_(TCP|UDP|SCTP))?")
"""Variables of this form belong to another program only if their value is an address."""
DEFAULT_HOME = Path("~/.xpeer")
MAX_NUMBER = 1_000_000_000
"""Largest value of any setting. In seconds it is 31 years, and timers can't take much more."""
SOCKET = "xpeer.sock"
OPTIONS = {
    "network.listen": "--listen",
    "network.announce": "--announce",
    "network.bootstrap": "--bootstrap",
    "network.name": "--name",
    "data.shard": "--shard",
    "data.corpus": "--corpus",
    "data.privacy": "--privacy",
    "data.tokenizer": "--tokenizer",
    "data.base_model": "--base-model",
    "training.min_peers": "--min-peers",
    "daemon.log_format": "--log-format",
}
"""Options of the command line that give a setting."""
OLD_LOGS = 3
TOKENS = "tokens"
"""Name of the folder of the shard's tokens in `Home.cache`."""
SOCKET_PATH_MAX = 100
"""Linux's sun_path holds 107 bytes."""


Place = Annotated[str, Meta(extra={"path": True})]
"""A path. A blank one is refused, since it would mean the current folder."""


@stays("settings of this node")
class Network(Struct, frozen=True, forbid_unknown_fields=True):
    """How this node is reached and whom it asks first."""

    listen: list[str] = field(default_factory=lambda: ["/ip4/0.0.0.0/tcp/4001"])
    """Multiaddresses, TCP only; port 0 = any free port."""
    announce: list[str] = []
    """Addresses that others get, if they differ from `listen` (NAT, port forwarding)."""
    bootstrap: list[str] = []
    """Seeds: .../p2p/PEERID."""
    nat_port_map: bool = False
    """Ask the router by UPnP for a port (multicasts on the local network)."""
    direct_listen: str = ""
    """Multiaddress for direct TCP streams, a faster way for bulk; empty = none."""
    zone: Annotated[str, Meta(max_length=32, pattern="^[A-Za-z0-9._-]*\\Z")] = ""
    """Members that declare the same zone have fast links and meet more often; published."""
    name: Annotated[str, Meta(max_length=32, pattern="^[A-Za-z0-9._-]*\\Z")] = ""
    """Name of this node for the other members' operators; published. Empty = its PeerID."""
    donate_mbit_s: Annotated[float, Meta(ge=0)] = 0.0
    """Bound of what all joiners together are sent of this node's parameters; 0 = none, else at
    least 1."""
    price_per_gb: Annotated[float, Meta(ge=0)] = 0.09
    """Egress price in `currency` per 10^9 bytes sent."""
    currency: str = "USD"


@stays("settings of this node")
class Data(Struct, frozen=True, forbid_unknown_fields=True):
    """The text this node trains on. It never leaves the node."""

    shard: list[Place] = []
    """Files, folders or globs: .txt, .md, .jsonl, .parquet, .csv."""
    corpus: list[Place] = []
    """The local copy of the manifest's shared corpus; `shard` and `corpus` exclude one another."""
    text_field: str = "text"
    """The field of .jsonl, .parquet and .csv rows with the text; "messages": chats;
    "prompt+completion": two fields, of which the second is predicted."""
    validation_share: Annotated[float, Meta(gt=0, lt=0.5)] = 0.05
    split: Literal["document", "file"] = "document"
    """What is held out whole."""
    privacy: Literal["", "record", "off"] = ""
    """The node starts only if the manifest has this privacy mode; empty = with any."""
    tokenizer: Place = ""
    """Folder of the Hugging Face tokenizer, if the manifest asks for one."""
    base_model: Place = ""
    """Folder of the Hugging Face model whose adapters the swarm trains, if the manifest has
    model.lora; empty = the founder's own copy in the home."""


@stays("settings of this node")
class Training(Struct, frozen=True, forbid_unknown_fields=True):
    """The trainer process."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: Annotated[int, Meta(ge=0)] = 0
    """CPU threads; 0 = all cores."""
    speed: Annotated[float, Meta(ge=0, le=1e9)] = 0.0
    """Declared tokens per second, published; it weights a shared corpus and fedavg. 0 = measured if
    the swarm trains without privacy, else the others' median is assumed."""
    throttle: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Fraction of the time in which the trainer computes; 0.5 = half speed."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the passes through the model; parameters, norms, sums and noise stay float32.
    auto: bfloat16 where the device is fast at it."""
    micro_batch: Annotated[int, Meta(ge=0)] = 0
    """Records per forward pass; 0 = chosen by the engine."""
    checkpoint_activations: Literal["auto", "on", "off"] = "auto"
    """Compute layers again in the backward pass instead of keeping what they computed: less memory,
    a third more time. auto: once a pass of one record does not fit into memory."""
    pack: Literal["auto", "off"] = "auto"
    """Several short records in a sequence, without privacy. auto: where each has the loss that it
    has alone."""
    check_fit: Literal["refuse", "warn", "skip"] = "refuse"
    """What a start does where memory or disk can't hold this node. refuse: it ends. warn: the log
    says so. skip: nothing is compared."""
    compile: Literal["off", "on"] = "off"
    """Compile the model's layers, without privacy. Takes a minute at a start."""
    compile_codec: bool = True
    """Compile the codec's kernels if there is a C++ compiler. That is several times faster for
    fragments of a million parameters or more, with the same bytes."""
    min_peers: Annotated[int, Meta(ge=0)] = 0
    """Wait for this many live partners before training."""
    validation_records: Annotated[int, Meta(ge=1)] = 32


@stays("settings of this node")
class Privacy(Struct, frozen=True, forbid_unknown_fields=True):
    """What a node decides about its privacy; what all share is in the manifest."""

    generator: Literal["fast", "cryptographic"] = "fast"
    """Generator of the noise on CUDA. fast: the device's Philox under a fresh key of 64 bits for
    every tensor. cryptographic: AES-256 from the CPU, as always on a CPU."""
    max_epsilon: Annotated[float, Meta(ge=0)] = 0.0
    """The node starts only if the manifest's privacy.epsilon is at most this; 0 = no bound."""
    keep_back: Annotated[float, Meta(ge=0, le=0.9)] = 0.0
    """Fraction of the manifest's privacy.epsilon that the swarm's run may not spend: it is left for
    `xpeer finetune`."""
    register: Place = ""
    """Folder of the machine's register of charged documents. The charges of all homes that use the
    same register add up. Empty = `privacy_register`."""


@stays("settings of this node")
class Checkpoint(Struct, frozen=True, forbid_unknown_fields=True):
    """Saved state."""

    every_s: Annotated[float, Meta(gt=0)] = 600.0
    keep: Annotated[int, Meta(ge=1)] = 2


@stays("settings of this node")
class Daemon(Struct, frozen=True, forbid_unknown_fields=True):
    """The long-lived process."""

    socket: Place = ""
    """Control socket; empty = HOME/xpeer.sock."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    stop_timeout_s: Annotated[float, Meta(gt=0)] = 30.0
    """A trainer that has to save and end is killed after this long without progress."""
    exit_on_budget: bool = False
    """Exit 6 when the privacy budget is spent, instead of mixing and serving on."""
    exit_when_finished: bool = False
    """Exit 0 after the closing consolidation, instead of serving on."""


@stays("settings of this node")
class NodeConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """config.toml, one section per part."""

    network: Network = Network()
    data: Data = Data()
    training: Training = Training()
    privacy: Privacy = Privacy()
    checkpoint: Checkpoint = Checkpoint()
    daemon: Daemon = Daemon()


class Home:
    """Where a node keeps its state; one daemon at a time."""

    def __init__(self, path: Path) -> None:
        self.path = Path(checked("home", str(path))).expanduser().absolute()
        self.identity_key = self.path / "identity.key"
        self.admin_key = self.path / "admin.key"
        self.swarm_key = self.path / "swarm.key"
        self.credential = self.path / "credential"
        self.seeds = self.path / "seeds.json"
        self.invites = self.path / "invites.jsonl"
        self.manifest = self.path / "manifest.json"
        self.config = self.path / "config.toml"
        self.state_db = self.path / "state.sqlite"
        self.ledger_db = self.path / "ledger.sqlite"
        self.checkpoints = self.path / "checkpoints"
        self.own = self.path / "own"
        self.initial_model = self.path / "initial"
        self.joining = self.path / "joining"
        self.cache = self.path / "cache"
        self.log = self.path / "daemon.log"
        self.losses = self.path / "losses.csv"
        self.lock = self.path / "lock"

    def parts(self) -> list[Path]:
        """All files and folders that a node may put into its home, without contents of folders."""
        databases = (self.state_db, self.ledger_db)
        beside = [f"{each.name}{end}" for each in databases for end in ("-wal", "-shm", "-journal")]
        beside += [f"{self.log.name}.{n}" for n in range(1, OLD_LOGS + 1)]
        beside.append(f"{self.losses.name}.1")
        whole = [path for path in vars(self).values() if path != self.path]
        return [*whole, *(self.path / name for name in (*beside, SOCKET))]

    @property
    def tokens(self) -> Path:
        """The shard as tokens, in the cache."""
        return self.cache / TOKENS

    def socket(self, config: NodeConfig) -> Path:
        """The control socket's path.

        Raises:
            ConfigError: it is longer than the kernel allows.
        """
        path = Path(config.daemon.socket or self.path / SOCKET).expanduser().absolute()
        if len(os.fsencode(path)) > SOCKET_PATH_MAX:
            raise ConfigError(
                f"daemon.socket: {path} is longer than {SOCKET_PATH_MAX} bytes",
                "set daemon.socket to a shorter path, e.g. /run/xpeer/xpeer.sock",
            )
        return path


def privacy_register(config: NodeConfig) -> Path:
    """The folder of the machine's register: the system's for root, else the user's."""
    if config.privacy.register:
        path = Path(config.privacy.register).expanduser()
        if not path.is_absolute():
            raise ConfigError(
                f"privacy.register: {config.privacy.register} is a relative path",
                "give an absolute one: all homes and commands have to find the same folder",
            )
        return path
    if os.geteuid() == 0:
        return Path("/var/lib/xpeer-privacy")
    state = os.environ.get("XDG_STATE_HOME", "")
    if not state.startswith("/"):  # the XDG standard says to ignore relative ones
        state = checked("the default of privacy.register", "~/.local/state")
    return Path(state).expanduser() / "xpeer-privacy"


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


def settings() -> Iterator[tuple[str, str, Any]]:
    """Every setting as (section, key, default), for checks and documentation."""
    for section, section_type in get_type_hints(NodeConfig).items():
        for info in msgspec.structs.fields(section_type):
            made = info.default_factory
            default = info.default if made is msgspec.NODEFAULT else made()
            yield section, info.name, default


def _is_path(kind: Any) -> bool:
    """Whether a setting's type is `Place`, or a list of them."""
    kinds = (kind, *get_args(kind))
    return any(
        isinstance(each, Meta) and bool((each.extra or {}).get("path"))
        for inner in kinds
        for each in getattr(inner, "__metadata__", ())
    )


PATHS = frozenset(
    f"{section}.{key}"
    for section, section_type in get_type_hints(NodeConfig).items()
    for key, kind in get_type_hints(section_type, include_extras=True).items()
    if _is_path(kind)
)
"""Settings that name files or folders."""


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
    checked(name, raw)
    parts = [part.strip() for part in raw.split(",")] if "," in raw else [raw]
    if "" in parts:
        raise ConfigError(
            f"{name} = {raw!r} has an empty part", "is a variable unset? Correct or unset it"
        )
    for first in range(len(parts)):
        for last in range(first + 2, len(parts) + 1):
            joined = ",".join(parts[first:last])
            if Path(joined).exists():
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
