"""The setup of a trainer: what it receives when it is started."""

from __future__ import annotations

from xpeer.accounts.trained import has_trained
from xpeer.config import Home
from xpeer.trainer.setup import TrainerSetup
from xpeer_daemon.division import Shares
from xpeer_daemon.node import Node
from xpeer_daemon.parameters import Origin


class Setups:
    """Makes a setup for each start of the trainer, since the order and the members change.

    Args:
        home: paths.
        swarm_id: fingerprint of the swarm.
        node: its phase gives the order; its record says whether a trainer ran before.
        shares: divides the corpus anew for each setup.
        origin: where the parameters of a trainer without a checkpoint come from.
    """

    def __init__(
        self, home: Home, swarm_id: str, node: Node, shares: Shares, origin: Origin
    ) -> None:
        self._home = home
        self._swarm_id = swarm_id
        self._node = node
        self._shares = shares
        self._origin = origin

    def make(self) -> TrainerSetup:
        """Make a setup, as things are now."""
        node = self._node
        return TrainerSetup(
            manifest_path=str(self._home.manifest),
            swarm_id=self._swarm_id,
            home=str(self._home.path),
            config=node.config,
            peer_id=node.peer_id,
            members=self._shares.divide(),
            mode=node.phase.traits.order,
            has_trained=node.record.last_trainer is not None or has_trained(self._home),
            initial=self._origin.source,
        )
