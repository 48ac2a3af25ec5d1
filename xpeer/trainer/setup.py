"""Everything the trainer process needs to know; the daemon sends it as the first message."""

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
    """A `SignedManifest` as JSON; the trainer opens it against `swarm_id` itself."""
    swarm_id: str
    home: str
    """Ledger, checkpoints, initial model and cache lie in it (`config.Home`)."""
    config: NodeConfig = NodeConfig()
    peer_id: str
    members: dict[str, float] = {}
    """With a shared corpus: tokens/s by PeerID of all who take part, us included; 0: unknown."""
    mode: Order = "train"
    """What to do once ready."""
    has_trained: bool = False
    """This home took steps: without its text it mixes and serves."""
    initial: Literal["initial", "awaited"] = "initial"
    """Where the parameters come from if there is no checkpoint. initial: the manifest's, from
    home/initial, checked against its digest. awaited: a joiner's: `import_state` brings them, and
    nothing is trained before."""
