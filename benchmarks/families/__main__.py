"""Each family of models through a whole run, with real daemons.

A tiny model of random weights is saved, founded, trained privately, stopped, started again, joined
by a second home, and exported by both. The exports are loaded by plain transformers and compared
with the checkpoints that they were made of, and continued with and without a cache.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from benchmarks.common import emit, say, write_result
from benchmarks.families.models import FAMILIES, VOCABULARY, save
from xpeer.cli.demo.daemons import Daemons, call, status_of
from xpeer.config import Home
from xpeer.errors import XpeerError
from xpeer.manifest.signed import SignedManifest
from xpeer.status import Status
from xpeer.training.checkpoint import load_latest
from xpeer.training.initial import trained_model

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
FIELDS = (
    *("optimiser.batch_records=8", "optimiser.sequence_tokens=64", "round.fragments=1"),
    *("round.window_steps=4", "end.steps=100000", "privacy.noise_multiplier=1.0"),
    "privacy.epsilon=1000",
)
QUICK = ("llama", "gemma2", "opt")
TOLERANCE = 1e-4
"""Of logits, absolute; theirs are of order one."""
_TIMEOUT_S = 180.0


class Run:
    """One family's swarm of two.

    Args:
        root: empty folder.
        daemons: to start them with.
        sockets: short folder.
    """

    def __init__(self, root: Path, daemons: Daemons, sockets: Path) -> None:
        self.root, self._daemons = root, daemons
        self._settings = {"TMPDIR": str(sockets), "XPEER_TRAINING_THREADS": "1"}

    def home(self, name: str) -> Home:
        """Of a member."""
        return Home(self.root / name)

    def start(self, name: str, *arguments: str) -> None:
        """Start a daemon."""
        self._daemons.forget(name)
        command = ["start", "--home", str(self.home(name).path), *arguments]
        self._daemons.start(name, command, self._settings)

    def stop(self, name: str) -> None:
        """Ask it to stop; its checkpoint is written when this returns."""
        call(["stop", "--home", str(self.home(name).path)])

    def until(self, name: str, done: Callable[[Status], bool]) -> Status:
        """Wait for a status that fits."""
        deadline = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < deadline:
            self._daemons.check_alive()
            status = status_of(self.home(name))
            if status is not None and done(status):
                return status
            time.sleep(0.1)  # another process's state has no event here
        raise TimeoutError(f"{name}: {self._daemons.log(name).read_text()[-1000:]}")


def measure(run: Run, family: str) -> dict[str, Any]:
    """The whole run; what came of it."""
    model = save(run.root / "model", family)
    a, b = (str(run.home(name).path) for name in "ab")
    for name in "ab":
        text = run.root / f"text-{name}"
        text.mkdir()
        for n in range(60):
            (text / f"{n}.txt").write_text(f"Text {n} of {name}: " + "a quick brown fox. " * 30)
    sets = [part for field in FIELDS for part in ("--set", field)]
    shards = [["--shard", str(run.root / f"text-{name}"), "--listen", LOOPBACK] for name in "ab"]
    call(["init", "--swarm", "s", "--home", a, "--model", str(model), *sets, *shards[0]])
    run.start("a")
    first = run.until("a", lambda s: s.progress.step >= 4)
    run.stop("a")
    kept, _ = load_latest(run.home("a").checkpoints)
    if kept is None or kept.step < first.progress.step:
        raise RuntimeError("the stop saved nothing")
    run.start("a")
    again = run.until("a", lambda s: s.progress.step > kept.step)
    token = call(
        ["invite", "create", "--home", a, "--for", call(["id", "--home", b]),
         "--seed", again.addresses[0]]
    )  # fmt: skip
    call(["init", "--join", token, "--home", b, "--tokenizer", str(model), *shards[1]])
    run.start("b")
    both = [run.until(name, lambda s: s.exchanges_done >= 2) for name in "ba"]
    for name in "ba":
        run.stop(name)
    found = [compare(run, name) for name in "ab"]
    frozen = SignedManifest.load(run.home("a").manifest).open().model.frozen
    return {
        "engine": both[1].privacy.engine,
        "parameters": both[1].num_params,
        "frozen": frozen.num_values if frozen else 0,
        "steps": [status.progress.step for status in reversed(both)],
        "difference": max(found),
    }


@torch.no_grad()
def compare(run: Run, name: str) -> float:
    """Export a home's checkpoint, and load it as users do.

    Returns:
        The largest difference of its logits: from the checkpoint's, and with a cache from without.
    """
    home, folder = run.home(name), run.root / f"export-{name}"
    call(["checkpoint", "export", "--home", str(home.path), "--hf", str(folder)])
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    if len(AutoTokenizer.from_pretrained(folder)("a fox")["input_ids"]) != 5:
        raise RuntimeError("the export's tokenizer is not the source's")
    bundle, _ = load_latest(home.checkpoints)
    if bundle is None:
        raise RuntimeError("there is no checkpoint")
    trained: Any = trained_model(SignedManifest.load(home.manifest).open(), home, "", bundle)
    ids = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(5))
    expected, found = trained.eval()(input_ids=ids).logits, loaded(input_ids=ids).logits
    begun = loaded(input_ids=ids[:, :-1], use_cache=True)
    last = loaded(input_ids=ids[:, -1:], past_key_values=begun.past_key_values).logits
    differences = [found - expected, last[:, 0] - expected[:, -1]]
    return max(float(difference.abs().max()) for difference in differences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} alone; writes no result")
    parser.add_argument("--only", nargs="*", default=[], help="these families; writes no result")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows: dict[str, dict[str, Any]] = {}
    for family in given.only or (QUICK if given.quick else FAMILIES):
        began = time.monotonic()
        with (
            tempfile.TemporaryDirectory(prefix="xf-") as root,
            Daemons(Path(root) / "logs").running() as daemons,
        ):
            sockets = Path(root) / "s"
            sockets.mkdir()
            try:
                row = measure(Run(Path(root), daemons, sockets), family)
                row["ok"] = row["difference"] < TOLERANCE
            except (XpeerError, RuntimeError, TimeoutError) as e:
                row = {"ok": False, "problem": str(e)}
        row["seconds"] = round(time.monotonic() - began, 1)
        rows[family] = row
        say(f"{family}: {json.dumps(row)}")
    table(rows)
    summary = {
        "families": len(rows),
        "work": sum(row["ok"] for row in rows.values()),
        "fail": [family for family, row in rows.items() if not row["ok"]],
        "largest_difference": max(row.get("difference", 0.0) for row in rows.values()),
    }
    if not (given.quick or given.only):
        write_result("families", summary, rows, "python -m benchmarks.families")
    emit("families", summary)


def table(rows: dict[str, dict[str, Any]]) -> None:
    """For people."""
    say(f"{'family':20} {'':4} {'engine':13} {'trained':>8} {'frozen':>7} {'difference':>11}")
    for family, row in rows.items():
        if "problem" in row:
            say(f"{family:20} FAIL {row['problem'][:120]}")
            continue
        say(
            f"{family:20} {'ok' if row['ok'] else 'FAIL':4} {row['engine']:13} "
            f"{row['parameters']:8} {row['frozen']:7} {row['difference']:11.2g}"
        )


if __name__ == "__main__":
    main()
