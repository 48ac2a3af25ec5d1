"""A whole daemon, as `xpeer start` runs it. It writes down the pieces that it gathers."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.joining.figures import PIECES, Came
from xpeer import config_sources
from xpeer.config import Home
from xpeer.identity import PeerId
from xpeer.network.giving import Giver
from xpeer_daemon import start
from xpeer_daemon.fetching import Fetch
from xpeer_daemon.takeover import Takeover


def write_down(path: Path) -> None:
    """A row for each offer that is asked for, and for each piece that came, wanted or not."""
    file = path.open("a", buffering=1)
    ask, keep = Takeover.ask, Fetch._keep

    def note(piece: int | None, num_bytes: int, donor: str) -> None:
        row = Came(time.time(), piece, num_bytes, donor)
        file.write(json.dumps(asdict(row)) + "\n")

    async def ask_and_note(self: Takeover, donor: PeerId) -> Giver:
        note(None, 0, donor)
        return await ask(self, donor)

    async def keep_and_note(self: Fetch, piece: int, data: memoryview, giver: Giver) -> None:
        await keep(self, piece, data, giver)
        note(piece, len(data), giver.donor)

    Takeover.ask = ask_and_note  # type: ignore[method-assign]
    Fetch._keep = keep_and_note  # type: ignore[method-assign]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("home", type=Path)
    given = parser.parse_args()
    home = Home(given.home)
    write_down(home.path / PIECES)
    settings = config_sources.load(home.config, os.environ)
    return start.run(home, settings, trainer="benchmarks.joining.trainer")


if __name__ == "__main__":
    sys.exit(main())
