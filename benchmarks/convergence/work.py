"""Runs the plan on several processes, and keeps every finished run, so that it can be resumed."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import msgspec
import torch

from benchmarks.convergence.plan import Plan
from benchmarks.simulator import corpora
from benchmarks.simulator.run import simulate
from benchmarks.simulator.spec import Run


def default_cache() -> Path:
    """The user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "xpeer" / "convergence"


class Cache:
    """Finished runs, one line each. Only the parent process writes.

    Args:
        folder: made if need be.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "runs.jsonl"
        self._digests: dict[int, str] = {}
        self._known: dict[str, dict[str, Any]] = {}
        if self._path.exists():
            for line in self._path.read_text().splitlines():
                if line.endswith("}"):  # a line cut off by a crash is run again
                    entry = json.loads(line)
                    self._known[entry["key"]] = entry["figures"]

    def get(self, run: Run) -> dict[str, Any] | None:
        """Its figures, if it ran on the same text."""
        return self._known.get(self._key(run))

    def put(self, run: Run, figures: dict[str, Any]) -> None:
        """Keep them."""
        key = self._key(run)
        self._known[key] = figures
        entry = {"key": key, "run": msgspec.to_builtins(run), "figures": figures}
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def _key(self, run: Run) -> str:
        if run.peers not in self._digests:
            self._digests[run.peers] = corpora.digest(corpora.collect(run.peers))
        return run.key(self._digests[run.peers])


class Known(dict[Run, dict[str, Any]]):
    """Results as the plan reads them: looked up in the cache once."""

    def __init__(self, cache: Cache) -> None:
        super().__init__()
        self._cache = cache

    def __contains__(self, run: object) -> bool:
        if not super().__contains__(run):
            figures = self._cache.get(run) if isinstance(run, Run) else None
            if figures is None:
                return False
            super().__setitem__(run, figures)  # type: ignore[index]
        return True


def work(plan: Plan, cache: Cache, workers: int, progress: Callable[[Known], None]) -> Known:
    """Run until nothing is wanted.

    Args:
        plan: what.
        cache: where finished runs are looked up and kept.
        workers: processes, one torch thread each.
        progress: called after every finished run.
    """
    known = Known(cache)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker) as pool:
        running: dict[Future[dict[str, Any]], Run] = {}
        while True:
            for run in plan.wanted(known):
                if len(running) < workers and run not in running.values():
                    running[pool.submit(_simulate, run)] = run
            if not running:
                return known
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                run = running.pop(future)
                cache.put(run, future.result())
                figures = future.result()
                print(
                    f"{time.strftime('%H:%M:%S')} N={run.peers} {run.steps} steps "
                    f"{'clock ' if run.link else ''}{run.method} rate {run.rate:g} "
                    f"seed {run.seed}: mean {figures['mean']:.4f} "
                    f"peers {sum(figures['peers']) / len(figures['peers']):.4f} "
                    f"({figures['cpu_s']} s)",
                    file=sys.stderr,
                    flush=True,
                )
            progress(known)


def _begin_worker() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would finish its run for nobody, and then wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _simulate(run: Run) -> dict[str, Any]:
    return simulate(run, corpora.collect(run.peers))
