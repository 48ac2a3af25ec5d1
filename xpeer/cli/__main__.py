"""`python -m xpeer.cli`."""

from __future__ import annotations

from xpeer.cli import main

if __name__ == "__main__":
    main()
