"""A hostile member's daemon: the real one, with a trainer that lies, or an exchange that stalls."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path

from benchmarks.hostile.attacks import ATTACK_VARIABLE
from xpeer import config_sources
from xpeer.config import Home
from xpeer.errors import Reason
from xpeer.gossip.clock import Gossip
from xpeer.identity import PeerId
from xpeer.network.agreement import Agreement
from xpeer.round import Meeting
from xpeer.update import CompressedUpdate
from xpeer.wire.messages import Propose
from xpeer_daemon import start

_FOR_EVER_S = 3600.0


async def _stall(self: Meeting) -> CompressedUpdate:
    """It agreed, and sends nothing."""
    del self
    await asyncio.sleep(_FOR_EVER_S)
    raise RuntimeError("unreachable")


async def _silent(self: Agreement) -> None:
    """It received ours, and does not accept."""
    del self
    await asyncio.sleep(_FOR_EVER_S)


def _refuse(self: Gossip, peer_id: PeerId, proposal: Propose) -> str:
    """Never now."""
    del self, peer_id, proposal
    return Reason.NOT_DUE


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("home", type=Path)
    given = parser.parse_args()
    attack = os.environ[ATTACK_VARIABLE]
    if attack == "stall":
        Meeting._snapshot_once = _stall  # type: ignore[method-assign]
    elif attack == "silent":
        Agreement.accept_both = _silent  # type: ignore[method-assign]
    elif attack == "refuse":
        Gossip.refusal_of = _refuse  # type: ignore[method-assign]
    home = Home(given.home)
    settings = config_sources.load(home.config, os.environ)
    return start.run(home, settings, trainer="benchmarks.hostile.trainer")


if __name__ == "__main__":
    sys.exit(main())
