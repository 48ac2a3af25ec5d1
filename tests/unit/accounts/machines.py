"""Homes with a register, whose files tests copy, lose, and put back."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable
from pathlib import Path

import msgspec

from tests.unit.accounts.ledgers import about_in
from xpeer.accounts.accountant import Segment
from xpeer.accounts.bound import open_register
from xpeer.accounts.ledger import Ledger
from xpeer.errors import LocalError

STEP, OTHER = Segment(1.0, 0.01, 20), Segment(0.8, 0.02, 5)
SIGMA, Q, DELTA = 4.0, 1.0, 1e-5


class Machine:
    """Homes with a register, whose files can be copied, lost and put back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.register = folder / "register"
        folder.mkdir(exist_ok=True)
        self._copies = itertools.count()

    def ledger(self, home: str) -> Path:
        return self.folder / f"{home}.sqlite"

    def start(self, home: str, documents: Iterable[str], unit: str = "record") -> Ledger:
        ledger = Ledger.open(self.ledger(home))
        about = msgspec.structs.replace(about_in("swarm"), unit=unit)
        try:
            register = open_register(ledger, self.register)
            self.joined = ledger.declare_documents(register, documents, about)
        except LocalError:
            ledger.close()
            raise
        return ledger

    def charge(self, home: str, documents: Iterable[str], *segments: Segment) -> None:
        with self.start(home, documents) as ledger:
            for segment in segments:
                ledger.charge(segment)

    def copy(self, path: Path) -> Path:
        kept = self.folder / f"copy{next(self._copies)}"
        shutil.copytree(path, kept) if path.is_dir() else shutil.copy2(path, kept)
        return kept

    def put_back(self, copy: Path, path: Path) -> None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(copy, path) if copy.is_dir() else shutil.copy2(copy, path)


def steps(ledger: Ledger) -> int:
    """Of the document that lost most."""
    return max(sum(s.steps for s in history) for history in ledger.histories())
