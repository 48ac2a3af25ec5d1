"""Runs jobs on several processes, each once; finished ones are kept, so that it can be resumed."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, Final

import msgspec
import torch

from benchmarks.common import say
from benchmarks.finetune.jobs import Finetuned, Lone
from benchmarks.lora.jobs import Factors
from benchmarks.privacy.attacked import Attacked
from benchmarks.privacy.inversion import Inversion
from benchmarks.privacy.lora import Lora
from benchmarks.privacy.setting import PEERS
from benchmarks.privacy.utility import Utility
from benchmarks.privacy.whitebox import Whitebox
from benchmarks.simulator import corpora

VERSION: Final = 1
"""Raised whenever the same job would give other figures."""

Job = Utility | Attacked | Whitebox | Inversion | Lora | Finetuned | Lone | Factors
Figures = dict[str, Any]
Known = Mapping[Job, Figures]
Wanted = Callable[[Known], Sequence[Job]]


def default_cache(benchmark: str = "privacy") -> Path:
    """In the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "xpeer" / benchmark / "runs.jsonl"


class Kept(dict[Job, Figures]):
    """Finished jobs, also on the disk. Only the parent process writes.

    Args:
        path: one line each; None: kept nowhere.
    """

    def __init__(self, path: Path | None) -> None:
        super().__init__()
        self._path = path
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                if line.endswith("}"):  # a line cut off by a crash is run again
                    entry = json.loads(line)
                    if entry["of"] == self._of():
                        self[msgspec.convert(entry["job"], Job)] = entry["figures"]

    def finished(self, job: Job, figures: Figures) -> None:
        """Keep it."""
        self[job] = figures
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            entry = {"of": self._of(), "job": msgspec.to_builtins(job), "figures": figures}
            with self._path.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def _of(self) -> str:
        """This version on this text."""
        text = corpora.digest(corpora.collect(PEERS + 1))
        return hashlib.blake2b(f"{VERSION} {text}".encode(), digest_size=8).hexdigest()


def work(wanted: Wanted, known: Kept, workers: int) -> None:
    """Run until nothing is wanted.

    Args:
        wanted: what may be started now, given what is finished; the most telling first.
        known: where finished jobs are looked up and kept.
        workers: processes, one torch thread each.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker) as pool:
        running: dict[Future[Figures], Job] = {}
        while True:
            for job in wanted(known):
                if len(running) < workers and job not in known and job not in running.values():
                    running[pool.submit(_run, job)] = job
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                job, figures = running.pop(future), future.result()
                known.finished(job, figures)
                say(f"{time.strftime('%H:%M:%S')} {_name(job)}: {figures['cpu_s']} s")


def _run(job: Job) -> Figures:
    began = time.process_time()
    figures = job.figures()
    return figures | {"cpu_s": round(time.process_time() - began, 1)}


def _name(job: Job) -> str:
    fields = msgspec.to_builtins(job)
    return " ".join(f"{key}={value}" for key, value in fields.items())


def _begin_worker() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would finish its job for nobody, and then wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
