"""`xpeer checkpoint`: what was saved. Only `save` needs a daemon that runs."""

from __future__ import annotations

import time
from pathlib import Path

import click

from xpeer.cli.common import GivenPath, echo, echo_json, home_option, json_option, load_config, say
from xpeer.config import Home, privacy_register
from xpeer.control import Client
from xpeer.errors import ConfigError, LocalError
from xpeer.manifest.signed import SignedManifest


@click.group()
def checkpoint() -> None:
    """List, save, verify, export checkpoints."""


@checkpoint.command("list")
@home_option
@json_option
def list_command(home: Home, as_json: bool) -> None:
    """List the checkpoints in the home, newest first."""
    from xpeer.training.checkpoint_files import paths, step_of  # noqa: PLC0415

    rows = []
    for path in paths(home.checkpoints):
        stat = path.stat()
        rows.append(
            {
                "step": step_of(path),
                "path": str(path),
                "bytes": stat.st_size,
                "saved_unix_s": stat.st_mtime,
            }
        )
        if not as_json:
            saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(stat.st_mtime))
            echo(f"step {step_of(path):<9} {saved}  {stat.st_size / 1e6:9.2f} MB  {path}")
    if as_json:
        echo_json(rows)
    elif not rows:
        say(f"no checkpoints in {home.checkpoints}")


@checkpoint.command("save")
@home_option
def save_command(home: Home) -> None:
    """Have the running daemon save a checkpoint now; print its path."""
    path = Client(home.socket(load_config(home))).checkpoint()
    if path:
        echo(path)
    else:
        say("nothing to save: this node trains nothing yet")


@checkpoint.command("verify")
@home_option
@json_option
def verify_command(home: Home, as_json: bool) -> None:
    """Read every checkpoint in full and check its digest; exit 1 if one is damaged."""
    from xpeer.training.checkpoint import load  # noqa: PLC0415 - torch takes seconds
    from xpeer.training.checkpoint_files import paths  # noqa: PLC0415
    from xpeer.training.tensor_file import CorruptFileError  # noqa: PLC0415

    problems: dict[str, str] = {}
    for path in paths(home.checkpoints):
        try:
            load(path)
            problems[str(path)] = ""
        except (CorruptFileError, LocalError) as e:
            problems[str(path)] = str(e)
    if as_json:
        echo_json([{"path": path, "problem": problem} for path, problem in problems.items()])
    else:
        for name, problem in problems.items():
            echo(f"{name}  {f'damaged: {problem}' if problem else 'ok'}")
    if damaged := sum(map(bool, problems.values())):
        raise LocalError(
            f"{damaged} of {len(problems)} checkpoints are damaged",
            "the newest whole one is used; restore the others from a backup, or remove them",
        )


@checkpoint.command("export")
@home_option
@click.option(
    "--hf",
    "folder",
    required=True,
    type=GivenPath("new"),
    help="New folder, to be loaded with from_pretrained by transformers, or by peft for adapters.",
)
@click.option("--merged", is_flag=True, help="Add the adapters to their base: a complete model.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Type of the weights. Default: as in the model that training started from.",
)
@click.option("--own", is_flag=True, help="The model of `xpeer finetune`, not the swarm's.")
def export_command(home: Home, folder: Path, merged: bool, dtype: str | None, own: bool) -> None:
    """Write the newest checkpoint as a Hugging Face model with its tokenizer.

    Where the swarm trains adapters, only adapters and the base model's hash are written.

    transformers or peft then loads what was written, and it is compared with the checkpoint.

    With --own it is the model that `xpeer finetune` made. Its own steps used this node's text
    alone, and you answer for passing it on: read its card first.

    Otherwise it is the last checkpoint, averaged with partners' values. Members' models agree only
    after closing.
    """
    # torch takes seconds
    from xpeer.accounts.bound import look_at_register  # noqa: PLC0415
    from xpeer.accounts.ledger import Ledger  # noqa: PLC0415
    from xpeer.accounts.model_card import card_of  # noqa: PLC0415
    from xpeer.accounts.own_model import facts_of  # noqa: PLC0415
    from xpeer.training import model  # noqa: PLC0415
    from xpeer.training.initial import saved_model, source_folders, trained_model  # noqa: PLC0415
    from xpeer.training.kept import Source  # noqa: PLC0415
    from xpeer.training.tokenizer import load_tokenizer  # noqa: PLC0415

    signed, data = SignedManifest.load(home.manifest), load_config(home).data
    manifest = signed.open()
    tokenizer = load_tokenizer(manifest.tokenizer, data.tokenizer, base_model=data.base_model)
    lora = manifest.model.lora
    if merged and lora is None:
        raise ConfigError("--merged: this swarm trains no adapters", "leave it out")
    if dtype and lora is not None and not merged:
        raise ConfigError("--dtype: adapters are written as trained, float32", "or add --merged")
    bundle, warnings = saved_model(home, own=own)
    for warning in warnings:
        say(f"warning: {warning}")
    # Merge into unquantised weights: quantising again would lose more.
    made = trained_model(manifest, home, data.base_model, bundle, quantised=not merged)
    if merged and manifest.model.base_block:
        say(
            f"warning: the adapters were trained on weights in {manifest.model.base_dtype}, and "
            "are merged into the unquantised weights: compare `xpeer eval` of both"
        )
    ledger = Ledger.look(home.ledger_db) if home.ledger_db.exists() else None
    if bundle.ledger_id and (ledger is None or ledger.id != bundle.ledger_id):
        raise LocalError(
            f"the checkpoint was made with privacy ledger {bundle.ledger_id}, which is not "
            f"{home.ledger_db}: its epsilon is unknown",
            "restore the ledger that belongs to the checkpoint",
        )
    folder_of_register = privacy_register(load_config(home))
    register = look_at_register(ledger, folder_of_register) if ledger else None
    facts = facts_of(bundle.counters) if own else None
    card = card_of(manifest, signed.genesis.swarm_id, bundle.step, ledger, register, facts)
    folders = source_folders(home, data)
    source = Source(manifest.model.config, manifest.model.generation, folders, dtype or "")
    text = manifest.public_text.text
    if lora is None or merged:
        done = model.export_hf(made, tokenizer, folder, card, source=source, text=text)
    else:
        done = model.export_adapters(
            made, manifest.model, tokenizer, folder, card, source=source, text=text
        )
        say(f"adapters for the model whose weights have BLAKE2b-256 {lora.base_digest}")
    for note in done.notes:
        say(f"warning: {note}")
    say(
        f"exported {'own ' if own else ''}step {bundle.step}, {bundle.flat.numel()} parameters as "
        f"{done.dtype}; loaded again, its logits differ from the checkpoint's by at most "
        f"{done.difference:.2g}"
    )
    echo(str(folder))
