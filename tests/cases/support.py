"""What the tests of inputs from the field share: a shard, model folders, the command line, a node.

Only the public command line and what the first release had, so that a test runs on older
code, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import click
import psutil
from click.testing import CliRunner

from xpeer.cli.demo.daemons import Daemons, status_of
from xpeer.config import Home
from xpeer.status import Status

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
TEXT = "the quick brown fox jumps over a lazy dog and runs home before the rain begins"
WORDS = TEXT.split(" ")
SMALL = (
    "optimiser.batch_records=8", "optimiser.sequence_tokens=64", "round.fragments=1",
    "privacy.noise_multiplier=0.8",
)  # fmt: skip
"""Fields of a private run that ends in seconds; to find 20 steps' noise takes seconds, too."""


def write_shard(folder: Path, files: int = 60, first: int = 0) -> Path:
    """Short texts, one a file, no two alike."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(first, first + files):
        words = [WORDS[(n * k + k * k) % len(WORDS)] for k in range(1, 40)]
        (folder / f"{n:03}.txt").write_text(f"Text {n}: {' '.join(words)}.\n", encoding="utf-8")
    return folder


def environment(**settings: str) -> dict[str, str]:
    """Ours without XPEER_ variables but the test's register; one thread; no hub."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("XPEER_")}
    register = os.environ["XPEER_PRIVACY_REGISTER"]
    return {
        **kept, "XPEER_PRIVACY_REGISTER": register, "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1", **settings,
    }  # fmt: skip


def xpeer(
    *arguments: str | Path,
    cwd: Path | None = None,
    settings: Mapping[str, str] | None = None,
    text: str = "",
) -> subprocess.CompletedProcess[str]:
    """Run `xpeer ARGUMENTS` to its end, in this process: its imports take seconds, and were made.

    Nodes are processes of their own (`running_nodes`).
    """
    from xpeer.cli import main

    kept = environment(**(settings or {}))
    hidden = {name: None for name in os.environ if name not in kept}
    with chdir(cwd or Path.cwd()):
        done = CliRunner().invoke(main, [str(a) for a in arguments], text, {**kept, **hidden})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


def sets(*fields: str) -> list[str]:
    """`--set FIELD=VALUE` for each."""
    return [part for field in fields for part in ("--set", field)]


def skipping(command: str = "init") -> list[str]:
    """`--skip-trial`, where the command knows it: seconds that only tests of the trial need."""
    from xpeer.cli import main

    found = main.get_command(click.Context(main), command)
    known = found is not None and any(p.name == "skip_trial" for p in found.params)
    return ["--skip-trial"] if known else []


def found(home: Path, shard: Path, *arguments: str | Path, fields: Sequence[str] = ()) -> None:
    """A tiny private swarm; asserts that `init` says so."""
    model = [] if any(str(a).startswith(("--model", "--preset")) for a in arguments) else [
        "--preset", "tiny"]  # fmt: skip
    done = xpeer(
        "init", "--swarm", "s", "--home", home, "--listen", LOOPBACK, "--shard", shard,
        *model, *sets(*SMALL, "end.steps=20", *fields), *skipping(), *arguments,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def tokenizer_folder(folder: Path, size: int = 300, **special: str | None) -> Path:
    """A byte-level BPE tokenizer of `size` ids, saved as transformers does it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **special}
    words = list(dict.fromkeys(name for name in names.values() if name)) + alphabet
    words += [f"<extra{n}>" for n in range(size - len(words))]
    fast = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    given = {k: v for k, v in names.items() if v}
    PreTrainedTokenizerFast(tokenizer_object=fast, **given).save_pretrained(folder)
    return folder


def model_folder(folder: Path, family: str = "llama", **config: Any) -> Path:
    """`save_pretrained` of a tiny random model: width 32, 2 layers, vocabulary 300."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    small: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    }  # fmt: skip
    if family == "gpt2":
        small = {
            "vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
            "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
        }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **{**small, **config}), dtype=torch.float32
        )
        made.save_pretrained(folder)
    return folder


class Nodes:
    """Daemons of one test, by name; their homes are folders of the test."""

    def __init__(self, root: Path, daemons: Daemons, sockets: Path) -> None:
        self.root, self.daemons, self._sockets = root, daemons, sockets

    def home(self, name: str) -> Path:
        return self.root / name

    def start(self, name: str, *arguments: str, **settings: str) -> None:
        self.daemons.forget(name)
        # The test's own register, so that accounts of several starts belong together.
        fixed = {
            "TMPDIR": str(self._sockets), "XPEER_TRAINING_THREADS": "1",
            "XPEER_PRIVACY_REGISTER": os.environ["XPEER_PRIVACY_REGISTER"],
        }  # fmt: skip
        self.daemons.start(
            name, ["start", "--home", str(self.home(name)), *arguments], {**fixed, **settings}
        )

    def stop(self, name: str, timeout_s: float = 60) -> int:
        """Ask it to stop; its exit code."""
        self.daemons.end([name])
        return self.daemons.wait(name, timeout_s)

    def pid(self, name: str) -> int:
        """Of the daemon."""
        return self.daemons._processes[name].pid

    def status(self, name: str) -> Status | None:
        return status_of(Home(self.home(name)))

    def status_json(self, name: str) -> dict[str, Any]:
        """What `xpeer status --json` prints."""
        done = xpeer("status", "--json", "--home", self.home(name))
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def log(self, name: str) -> str:
        return self.daemons.log(name).read_text(encoding="utf-8", errors="replace")

    def until(
        self, name: str, condition: Callable[[Status], bool], timeout_s: float = 90
    ) -> Status:
        """Wait for a status that fits; another process's state has no event here."""
        deadline, status = time.monotonic() + timeout_s, None
        while time.monotonic() < deadline:
            status = self.status(name)
            if status is not None and condition(status):
                return status
            time.sleep(0.1)
        raise AssertionError(f"{name}: {status}\n{self.log(name)[-3000:]}")


@contextmanager
def running_nodes(tmp_path: Path) -> Iterator[Nodes]:
    """Nodes whose processes and sockets are gone at the end."""
    with (
        tempfile.TemporaryDirectory(prefix="xt-") as sockets,  # short: a socket's path is
        Daemons(tmp_path / "logs").running() as daemons,
    ):
        yield Nodes(tmp_path, daemons, Path(sockets))


def trainer_of(pid: int) -> int:
    """The pid of a daemon's trainer process."""
    for child in psutil.Process(pid).children(recursive=True):
        if any("xpeer.trainer" in part for part in child.cmdline()):
            return int(child.pid)
    raise AssertionError(f"no trainer under {pid}")
