"""The command line of a benchmark whose runs are tuned, kept and put into rows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from benchmarks import common
from benchmarks.privacy import setting, work
from benchmarks.simulator import corpora

Rows = list[dict[str, Any]]


class Plan(Protocol):
    """All that is to be run."""

    def wanted(self, known: work.Known) -> list[work.Job]:
        """Runs that may be started now; those finished among them."""

    def rows(self, known: work.Known) -> Rows:
        """What came of all, when everything has ended."""


def run(
    name: str,
    doc: str | None,
    plan: Callable[[int, bool], Plan],
    summary_of: Callable[[Rows], dict[str, Any]],
    table: Callable[[Rows], str],
) -> None:
    """Run what is not there yet, and say what came of all.

    Args:
        name: of the benchmark.
        doc: of its module, for `--help`.
        plan: makes one, of a number of seeds and of whether it is to be quick.
        summary_of: the claims, of rows.
        table: rows for people.
    """
    options = _options(name, doc)
    quick: bool = options.quick
    chosen = plan(1 if quick else options.seeds, quick)
    known = work.Kept(None if quick else options.cache)
    work.work(chosen.wanted, known, options.workers)
    rows = chosen.rows(known)
    common.say(table(rows))
    found = summary_of(rows)
    if not quick:
        kinds = corpora.collect(setting.PEERS + 1)
        digests = {c.kind: {"digest": c.digest, "bytes": c.train.numel()} for c in kinds}
        command = " ".join([f"python -m benchmarks.{name}", *sys.argv[1:]])
        common.write_result(name, found, {"rows": rows, "corpora": digests}, command)
    common.emit(name, found)


def _options(name: str, doc: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(f"benchmarks.{name}", description=doc)
    parser.add_argument("--quick", action="store_true", help="tiny, under two minutes, not kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    cache = work.default_cache(name)
    parser.add_argument("--cache", type=Path, default=cache, help="finished runs")
    return parser.parse_args()
