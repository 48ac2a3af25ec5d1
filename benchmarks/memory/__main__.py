"""Host memory that loading, saving and exporting a model take, in bytes per parameter.

Each state is measured in a process of its own, which begins with everything imported. A figure is
the process's largest memory minus what it had before: `resident` by the kernel's count (VmHWM, with
the mapped pages of files, which it takes back when they are wanted), `anonymous` without files, as
seen every few milliseconds. On a CPU that is all memory there is: a trainer's start includes the
parameters (4 bytes) and, after a restart, the moments (8), which a peer with a GPU holds there. A
founder's trial includes them and a gradient (4): these 16 are taken from its figure for
`init_host_bytes`.

The base of the last homes is in float16 on the disk. Nodes hold it in bfloat16: a founder has a
copy in that type, a joiner converts its own at each start.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner

from benchmarks.common import emit, say, write_result
from xpeer.cli import main as xpeer
from xpeer.config import Checkpoint, Data, NodeConfig, Privacy, Training
from xpeer.drafting import draft_manifest
from xpeer.forms import Form
from xpeer.founding_model import InitialModel, LoraOptions, initial_model
from xpeer.identity import Identity
from xpeer.manifest.signed import SignedManifest
from xpeer.mixing.received import received_payload
from xpeer.trainer.assembled import Assembled
from xpeer.trainer.build import assemble
from xpeer.trainer.setup import TrainerSetup
from xpeer.training.handed_out import narrow
from xpeer.training.model import build
from xpeer.wire import codec

CONFIG = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 960, "intermediate_size": 2640,
    "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8,
    "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip
"""90.6 million parameters: what a process takes besides is less than one byte of each."""
CHANGES = (
    "optimiser.batch_records=2", "optimiser.sequence_tokens=16", "end.steps=100",
    "round.window_steps=2",
)  # fmt: skip
ON_DEVICE = 16
"""Bytes of a trained parameter that a founder with a GPU holds there: it, its gradient, and its
moments."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="6.5 M parameters; writes no result")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    config = {**CONFIG, "hidden_size": 256, "intermediate_size": 704} if quick else CONFIG
    with tempfile.TemporaryDirectory() as folder:
        found, parameters = measure(Path(folder), config)
    worst = ("full_first_start", "full_restart", "full_save", "full_save_with_partners")
    kept = [name for name in found if name.startswith("lora_") and name.endswith("_anonymous")]
    summary = {
        "trained_bytes": max(found[f"{name}_resident"] for name in worst),
        "frozen_bytes": max(found[name] for name in kept),
        "init_host_bytes": round(found["full_init_anonymous"] - ON_DEVICE, 2),
        "donor_host_bytes": found["full_donation_anonymous"],
        **found,
    }
    if not quick:
        details = {"parameters": parameters, "config": config}
        write_result("memory", summary, details, "python -m benchmarks.memory")
    emit("memory", summary)


def measure(folder: Path, config: dict[str, Any]) -> tuple[dict[str, float], int]:
    """Bytes per parameter of each state, and the number of parameters."""
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    homes = {
        "full": _in_child(lambda: _make_home(folder / "full", file, None)),
        "float32": _in_child(lambda: _make_home(folder / "f32", file, LoraOptions(4))),
        "bfloat16": _in_child(
            lambda: _make_home(folder / "b16", file, LoraOptions(4, base_dtype="bfloat16"))
        ),
    }
    parameters = int(homes["full"]["num_params"])
    _warm(file)
    found: dict[str, float] = {}

    def state(name: str, run: Callable[[Callable[[], None]], object]) -> None:
        peak = _in_child(lambda: _peak(run))
        for kind, size in peak.items():
            found[f"{name}_{kind}"] = round(size / parameters, 2)
        say(
            f"{name}: {found[f'{name}_anonymous']} bytes a parameter, "
            f"{found[f'{name}_resident']} with pages of files"
        )

    full = _setup(folder / "full", homes["full"]["swarm_id"])
    state("full_first_start", lambda _begin: _discard(assemble(full)))
    state("full_save", lambda begin: _save(full, begin, partners=0))
    state("full_save_with_partners", lambda begin: _save(full, begin, partners=2))
    state("full_restart", lambda _begin: _discard(assemble(full)))
    state("full_export", lambda _begin: _export(folder / "full", "whole"))
    state("full_donation", lambda begin: _give(full, begin))
    state("full_init", lambda _begin: _found(folder / "founded", "--model-config", str(file)))
    _in_child(lambda: _export(folder / "full", "f16", "--dtype", "float16"))
    half = folder / "full" / "f16"
    homes["float16"] = _in_child(lambda: _make_home(folder / "h16", None, LoraOptions(4), half))
    for kind, path in (("float32", "f32"), ("bfloat16", "b16"), ("float16", "h16")):
        setup = _setup(folder / path, homes[kind]["swarm_id"])
        state(f"lora_{kind}_start", lambda _begin, s=setup: _discard(assemble(s)))  # type: ignore[misc]
        _in_child(lambda s=setup: _peak(lambda begin: _save(s, begin, partners=0)))  # type: ignore[misc]
        state(f"lora_{kind}_export", lambda _begin, p=path: _export(folder / p, "whole"))  # type: ignore[misc]
        state(
            f"lora_{kind}_merged_export",
            lambda _begin, p=path: _export(folder / p, "merged", "--merged"),  # type: ignore[misc]
        )
    joins = _setup(folder / "h16", homes["float16"]["swarm_id"], base_model=half)
    state("lora_float16_converted_start", lambda _begin: _discard(assemble(joins)))
    arguments = "--model", str(half), "--lora-rank", "4"
    state("lora_float16_init", lambda _begin: _found(folder / "adapted", *arguments))
    return found, parameters


def _make_home(
    home: Path, config: Path | None, lora: LoraOptions | None, model: Path | None = None
) -> dict[str, Any]:
    (home / "shard").mkdir(parents=True)
    source: InitialModel = initial_model(model, config, None, lora)
    manifest = draft_manifest(
        "memory", source, tokenizer=None, public_text=None, changes=CHANGES, privacy="off"
    )
    signed = SignedManifest.sign(manifest, Identity.generate())
    source.write(home / "initial")
    (home / "manifest.json").write_bytes(signed.to_bytes())
    (home / "shard" / "text.txt").write_text("some text of no meaning, for a few records. " * 40)
    return {"swarm_id": signed.genesis.swarm_id, "num_params": manifest.model.num_params}


def _setup(home: Path, swarm_id: str, base_model: Path | None = None) -> TrainerSetup:
    return TrainerSetup(
        manifest_path=str(home / "manifest.json"),
        swarm_id=swarm_id,
        home=str(home),
        peer_id="measured",
        config=NodeConfig(
            data=Data(shard=[str(home / "shard")], base_model=str(base_model or "")),
            training=Training(threads=1, device="cpu", validation_records=2),
            checkpoint=Checkpoint(every_s=3600.0),
            privacy=Privacy(register=str(home / "register")),
        ),
    )


def _warm(config: Path) -> None:
    """Load what the first model of a process loads: code, not values."""
    small = {**json.loads(config.read_text()), "hidden_size": 64, "intermediate_size": 128}
    build(small, seed=1)
    if initial_model(None, None, "tiny", LoraOptions(2)).lora is None:
        raise SystemExit("no adapters were made")


def _discard(made: Assembled) -> None:
    made.close()


def _save(setup: TrainerSetup, begin: Callable[[], None], *, partners: int) -> None:
    """Save a checkpoint of a trainer that has taken a step."""
    made = _stepped(setup, partners)
    begin()
    made.checkpoints.copy()()
    made.close()


def _give(setup: TrainerSetup, begin: Callable[[], None]) -> None:
    """Hand the model to joiners twice, after a checkpoint, as trainer and daemon do together."""
    made, copies = _stepped(setup, partners=2), []
    form = made.trainer.manifest.state_form
    begin()
    made.checkpoints.copy()()
    for _ in range(2):
        region = bytearray(4 * form.num_params)  # shared, where these are two processes
        made.trainer.show(torch.frombuffer(region, dtype=torch.float32))()
        narrow(memoryview(region), form.num_params, form.codec)
        copies.append(region[: form.num_bytes])
        del region
    made.close()


def _stepped(setup: TrainerSetup, partners: int) -> Assembled:
    """A trainer that has taken a step, and so many partners' values of every fragment."""
    made = assemble(setup)
    made.trainer.run(1)
    exchanges = made.trainer.exchanges
    for fragment in range(exchanges.fragments.num_fragments if partners else 0):
        form = Form("int8", exchanges.fragments.size(fragment))
        values = torch.zeros(form.num_values)
        for _ in range(partners):
            payload = codec.encode("int8", values)
            kept = received_payload(form, payload, slice(0, form.num_values), exchanges.buffers)
            exchanges.consolidation.merged(fragment, kept)
    return made


def _export(home: Path, name: str, *more: str) -> dict[str, Any]:
    _run("checkpoint", "export", "--home", str(home), "--hf", str(home / name), *more)
    return {}


def _found(home: Path, *more: str) -> None:
    """Found a swarm as an operator does, with its trial."""
    changes = (f"--set={change}" for change in CHANGES)
    where = "init", "--home", str(home), "--swarm", "memory", "--privacy", "off"
    _run(*where, "--skip-estimate", *changes, *more)


def _run(*arguments: str) -> None:
    settings = {"XPEER_TRAINING_DEVICE": "cpu", "XPEER_TRAINING_THREADS": "1"}
    done = CliRunner(env=settings).invoke(xpeer, arguments, catch_exceptions=False)
    if done.exit_code:
        raise SystemExit(done.output)


def _peak(run: Callable[[Callable[[], None]], object]) -> dict[str, int]:
    """Largest memory in `run`, minus that before it, or at its call of `begin`; bytes."""
    before = most = 0
    resident = 0
    ended = threading.Event()

    def begin() -> None:
        nonlocal before, most, resident
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = most = _memory("RssAnon")
        resident = _memory("VmRSS")

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.003):
            most = max(most, _memory("RssAnon"))

    begin()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run(begin)
    finally:
        ended.set()
        watcher.join()
    return {"anonymous": most - before, "resident": _memory("VmHWM") - resident}


def _memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def _in_child(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run a function in a copy of this process, and return its result."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.write(writes, json.dumps(run()).encode())
            status = 0
        except BaseException:  # noqa: BLE001 - it is printed, and ends the benchmark
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        result = pipe.read()
    if os.waitpid(child, 0)[1]:
        raise SystemExit("a state failed")
    found: dict[str, Any] = json.loads(result)
    return found


if __name__ == "__main__":
    main()
