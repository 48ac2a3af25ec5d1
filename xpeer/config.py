"""Settings of one node: type, bound and default of each. And its home: where it keeps its state.

Knows nothing of the places that settings come from: that is `config_sources`'s business. What must
be the same at every peer is in the manifest instead.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec.structs
from msgspec import NODEFAULT, Meta, Struct, field

from xpeer.errors import ConfigError
from xpeer.leaves import stays
from xpeer.paths import checked, require

DEFAULT_HOME = Path("~/.xpeer")
MAX_NUMBER = 1_000_000_000
"""Largest value of any setting. In seconds it is 31 years, and timers can't take much more."""
SOCKET = "xpeer.sock"
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
        self.held_out = self.path / "held-out"
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
    """The folder of the machine's register: the system's for root, else the user's.

    Raises:
        ConfigError: no folder can be there, or this user may not read it.
    """
    path = _privacy_register(config)
    require("privacy.register", path, "folder")
    return path


def _privacy_register(config: NodeConfig) -> Path:
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


@cache
def settings() -> tuple[tuple[str, str, Any], ...]:
    """Every setting as (section, key, default), for checks and documentation."""
    found = []
    for section, section_type in get_type_hints(NodeConfig).items():
        for info in msgspec.structs.fields(section_type):
            made = info.default_factory
            default = info.default if made is NODEFAULT else made()
            found.append((section, info.name, default))
    return tuple(found)


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
