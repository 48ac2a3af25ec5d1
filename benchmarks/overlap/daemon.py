"""A whole daemon, as `xpeer start` runs it, whose trainer's steps are emulated."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from xpeer import config_sources
from xpeer.config import Home
from xpeer_daemon import start


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("home", type=Path)
    given = parser.parse_args()
    home = Home(given.home)
    settings = config_sources.load(home.config, os.environ)
    return start.run(home, settings, trainer="benchmarks.overlap.trainer")


if __name__ == "__main__":
    sys.exit(main())
