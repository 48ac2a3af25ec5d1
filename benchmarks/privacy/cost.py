"""`python -m benchmarks.privacy.cost`: what record mode costs in time and memory, against none.

Steps of the product's own mechanisms and optimiser on the demo's Llama, all weights trained and
adapters of rank 8. Speeds: both mechanisms in one process on one thread, a step of each in turn,
medians of seconds per token. Memory: the peak of a process of its own for each. Noise: for the
tensors of a Llama of 134.5 M parameters, by ours, which is cryptographic on a CPU whatever the
node's setting, and by torch's own float32 generator, which is not used.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from pydoc_data import topics
from typing import Any, Final

import torch

from benchmarks import common
from benchmarks.privacy.ledgers import open_ledger
from xpeer.accounts.ledger import Ledger
from xpeer.founding_model import PRESETS
from xpeer.identity import blake2b
from xpeer.manifest import Manifest, Optimiser, PublicText
from xpeer.manifest.model import Lora, Model
from xpeer.manifest.privacy import Privacy
from xpeer.privacy.mechanism import Mechanism, build_mechanism
from xpeer.privacy.noise import SecretGenerator
from xpeer.training.adapters import adapt
from xpeer.training.document import document_of
from xpeer.training.flat import FlatParameters
from xpeer.training.losses import record_losses
from xpeer.training.model import build
from xpeer.training.optimiser import make_optimiser
from xpeer.training.records import cut
from xpeer.training.tokenizer import ByteTokenizer

KINDS: Final = ("full", "lora")
MODES: Final = ("off", "record")
RANK: Final = 8
BATCH: Final = 64
TOKENS: Final = 128
_WIDTH, _WIDER, _LAYERS, _VOCABULARY, _KEYS = 576, 1536, 30, 49152, 192
_LAYER: Final = 2 * _WIDTH * _WIDTH + 2 * _KEYS * _WIDTH + 3 * _WIDER * _WIDTH + 2 * _WIDTH
SIZES_135M: Final = (_VOCABULARY * _WIDTH, *_LAYERS * (_LAYER,), _WIDTH)
"""Values per layer of SmolLM2-135M: 134,515,008 together."""


def measure(quick: bool) -> dict[str, Any]:
    """All of it; `summary` holds the claimed figures, as ratios and seconds.

    Args:
        quick: a minute instead of several, and less steady.
    """
    torch.set_num_threads(1)
    summary: dict[str, float] = {}
    details: dict[str, Any] = {"batch": BATCH, "tokens": TOKENS, "lora_rank": RANK, "threads": 1}
    for kind in KINDS:
        found = _speeds(kind, rounds=2 if quick else 15)
        summary[f"{kind}_speed"] = found["record"]["tokens_per_s"] / found["off"]["tokens_per_s"]
        details[kind] = {"speed": found}
        if not quick or kind == "full":  # each is a process that takes long to start
            peaks = {mode: _peak(kind, mode, steps=1 if quick else 4) for mode in MODES}
            summary[f"peak_memory_{kind}"] = peaks["record"]["peak"] / peaks["off"]["peak"]
            details[kind]["memory_bytes"] = peaks
        common.say(f"{kind}: {json.dumps(details[kind])}")
    noise = _noise(SIZES_135M[-3:] if quick else SIZES_135M)
    summary["noise_s_135m"] = noise["torch"]
    summary["noise_s_135m_cryptographic"] = noise["ours"]
    return {"summary": {key: round(value, 4) for key, value in summary.items()}, **details}


def _speeds(kind: str, rounds: int) -> dict[str, Any]:
    """Tokens per second by mode, a step of each in turn."""
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    with ExitStack() as ending:
        both = {mode: ending.enter_context(_trainer(kind, mode)) for mode in MODES}
        for turn in range(rounds + 1):
            for mode in MODES if turn % 2 else reversed(MODES):
                began = time.perf_counter()
                tokens = both[mode].step()
                if turn:  # the first warms up
                    seconds[mode].append((time.perf_counter() - began) / tokens)
        return {
            mode: {
                "tokens_per_s": 1 / statistics.median(seconds[mode]),
                "engine": both[mode].mechanism.engine,
                "notes": both[mode].mechanism.notes,
            }
            for mode in MODES
        }


class _Trainer:
    """A model, its mechanism and its optimiser."""

    def __init__(self, kind: str, mode: str, ledger: Ledger) -> None:
        rules = _manifest(mode)
        model = build(PRESETS["small"], seed=1)
        if kind == "lora":
            model = adapt(model, Lora(rank=RANK, alpha=2.0 * RANK, seed=1, base_digest=""))
        tokenizer = ByteTokenizer()
        text = "\n".join(text for _, text in sorted(topics.topics.items()))
        records = cut([document_of(text, "topics")], tokenizer, TOKENS)[:1024]
        parameters = FlatParameters(model)
        self.mechanism: Mechanism = build_mechanism(
            rules,
            model,
            records,
            record_losses,
            ledger,
        )
        self.optimiser = make_optimiser(rules, parameters)

    def step(self) -> int:
        """Take one; how many tokens it was."""
        self.mechanism.charge_until(1)
        tokens = self.mechanism.step_gradient().tokens
        self.optimiser.step()
        return tokens


@contextmanager
def _trainer(kind: str, mode: str) -> Iterator[_Trainer]:
    with (
        tempfile.TemporaryDirectory() as folder,
        open_ledger(Path(folder), _manifest(mode)) as ledger,
    ):
        made = _Trainer(kind, mode, ledger)
        try:
            yield made
        finally:
            made.mechanism.close()


def _manifest(mode: Any) -> Manifest:
    return Manifest(
        name="cost",
        created_unix_s=0,
        model=Model(config={}, num_params=1, initial_digest=""),
        optimiser=Optimiser(batch_records=BATCH, sequence_tokens=TOKENS),
        privacy=Privacy(mode=mode, epsilon=100.0, noise_multiplier=1.0),
        public_text=PublicText(digest=blake2b(b"x").hex(), text="x"),
    )


def _peak(kind: str, mode: str, steps: int) -> dict[str, int]:
    """Bytes of a process of its own: before it had a model, and at most."""
    command = [sys.executable, "-m", __name__, "--one", kind, mode, "--steps", str(steps)]
    if __name__ == "__main__":
        command[2] = "benchmarks.privacy.cost"
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(ran.stdout.splitlines()[-1])
    return found


def _one(kind: str, mode: str, steps: int) -> None:
    torch.set_num_threads(1)
    before = _peak_bytes()
    with _trainer(kind, mode) as made:
        for _ in range(steps):
            made.step()
    print(json.dumps({"before": before, "peak": _peak_bytes()}))


def _peak_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def _noise(sizes: tuple[int, ...]) -> dict[str, float]:
    """Seconds of one processor for as many values as the model has: ours, and torch's own."""
    buffer = torch.zeros(max(sizes))
    scale = sum(SIZES_135M) / sum(sizes)
    generators: dict[str, Callable[[torch.Tensor], object]] = {
        "ours": lambda part: SecretGenerator().gaussian_(part, 1.0),
        "torch": torch.nn.init.normal_,
    }
    best = dict.fromkeys(generators, float("inf"))
    for _ in range(2):
        for name, fill in generators.items():
            began = time.thread_time()
            for size in sizes:
                fill(buffer[:size])
            best[name] = min(best[name], time.thread_time() - began)
    return {name: seconds * scale for name, seconds in best.items()}


def main() -> None:
    """Measure and print; or, for `measure`, one process' memory."""
    parser = argparse.ArgumentParser("benchmarks.privacy.cost", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a minute, less steady")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "MODE"), help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        kind, mode = options.one
        _one(kind, mode, options.steps)
    else:
        common.emit("privacy-cost", measure(options.quick)["summary"])


if __name__ == "__main__":
    main()
