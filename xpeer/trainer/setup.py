"""Everything that the trainer process needs to know; part of the daemon's first message."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from xpeer.config import NodeConfig
from xpeer.leaves import stays
from xpeer.phase import Order


@stays("what the daemon tells its own trainer")
class TrainerSetup(Struct, frozen=True, kw_only=True):
    """Paths and settings; contains no secret and no text."""

    manifest_path: str
    """A `SignedManifest` as JSON; the trainer verifies it against `swarm_id` itself."""
    swarm_id: str
    home: str
    """Folder of ledger, checkpoints, initial model and cache (`config.Home`)."""
    config: NodeConfig = NodeConfig()
    peer_id: str
    members: dict[str, float] = {}
    """With a shared corpus: tokens/s of all members, ours included, by PeerID; 0 = unknown."""
    mode: Order = "train"
    """The first order, once the trainer is ready."""
    has_trained: bool = False
    """Whether this home has ever taken a step. If so, it mixes and serves even without its text."""
    was_killed: bool = False
    """Whether an earlier trainer of this daemon was killed, as the system does where memory runs
    out: this one gives memory back."""
    initial: Literal["initial", "awaited"] = "initial"
    """Source of the parameters if there is no checkpoint. initial: the swarm's initial model, from
    home/initial, checked against the manifest's digest. awaited: a donor's, which `import_state`
    brings; until then nothing is trained."""
