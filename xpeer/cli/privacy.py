"""`xpeer privacy`: reports what was spent, plans the noise of a budget, and checks the sums."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from xpeer.cli.common import (
    GivenPath,
    GivenText,
    Number,
    Whole,
    echo,
    echo_json,
    ended_by_signals,
    home_option,
    json_option,
    load_config,
    say,
)
from xpeer.cli.naming import naming
from xpeer.cli.plan_lines import print_plan, print_table
from xpeer.cli.render import moment
from xpeer.config import Home, privacy_register
from xpeer.errors import ConfigError, ExitCode, LocalError
from xpeer.manifest.privacy import DELTA_MIN
from xpeer.manifest.signed import SignedManifest
from xpeer.paths import checked

if TYPE_CHECKING:
    from xpeer.accounts.ledger import Ledger
    from xpeer.accounts.register import Register
    from xpeer.accounts.report import Account

MAX_COUNT = 10**12
"""Most records or steps. Above it the accountant's doubles are too coarse."""
BATCHES = (32, 128, 512, 2048, 8192)
"""Batches in the table that is printed without --batch."""


@click.group()
def privacy() -> None:
    """What was spent of the privacy budget, and how to plan, report and verify it."""


@privacy.command("status")
@home_option
@json_option
def status_command(home: Home, as_json: bool) -> None:
    """Say what this node's ledger has been charged; the daemon need not run."""
    from xpeer.accounts import audit, report  # noqa: PLC0415 - slow to import

    keep_back = load_config(home).privacy.keep_back
    with _opened(home) as (ledger, register):
        account = report.account(ledger, register, keep_back)
    if as_json:
        echo_json(account)
        return
    for label, text in _rows(account):
        echo(f"{label:12}{text}")
    for problem in account.problems:
        say(f"warning: {problem}")
    say("not covered: " + "; ".join(audit.not_covered(account.unit)))


@privacy.command("plan")
@click.option(
    "--epsilon", type=Number(1e-6, 1e6), default=8.0, show_default=True, help="Budget to plan for."
)
@click.option("--delta", type=Number(), help="Delta. Default: min(1e-5, records^-1.1).")
@click.option(
    "--records",
    type=Whole(1, MAX_COUNT),
    help="Number of training sequences in the shard, or of documents.",
)
@click.option(
    "--shard",
    multiple=True,
    type=GivenText(),
    help="Text to count instead of --records: files, folders or globs.",
)
@click.option(
    "--text-field",
    type=GivenText(checked),
    metavar="FIELD",
    default="text",
    show_default=True,
    help="Field of a row that holds its text, as in data.text_field.",
)
@click.option(
    "--tokenizer",
    type=GivenPath("folder", "tokenizer"),
    help="Folder of a tokenizer. Default: bytes.",
)
@click.option("--documents", is_flag=True, help="Protect documents, not training sequences.")
@click.option(
    "--batch",
    type=Whole(1, MAX_COUNT),
    help="Expected records (documents) of a step. Default: print a table.",
)
@click.option("--steps", type=Whole(1, MAX_COUNT), help="Private steps in all.")
@click.option("--rounds", type=Whole(1, MAX_COUNT), help="Windows in all, instead of --steps.")
@click.option(
    "--window-steps", type=Whole(1, 10**6), default=5, show_default=True, help="Steps of a window."
)
@click.option(
    "--sequence-tokens", type=Whole(8, 10**7), default=128, show_default=True,
    help="Tokens of a training sequence.",
)  # fmt: skip
@click.option(
    "--parameters",
    type=Whole(1, 10**15),
    help="Number of trained parameters; adds the noise's norm to the table.",
)
@json_option
def plan_command(
    epsilon: float,
    delta: float | None,
    records: int | None,
    shard: tuple[str, ...],
    text_field: str,
    tokenizer: Path | None,
    documents: bool,
    batch: int | None,
    steps: int | None,
    rounds: int | None,
    window_steps: int,
    sequence_tokens: int,
    parameters: int | None,
    as_json: bool,
) -> None:
    """Say how much noise a budget asks for, before a swarm is founded.

    Prints the options for `xpeer init --swarm`. Without --batch it prints a table to choose from: a
    larger batch has less noise and costs more tokens.
    """
    from xpeer.accounts import planning  # noqa: PLC0415 - slow to import

    if (records is None) == (not shard):
        raise ConfigError(
            "--records and --shard: one of them is needed", "e.g. --records 20000, or --shard PATH"
        )
    unit = "document" if documents else "record"
    if records is None:
        with naming({"data.tokenizer": "--tokenizer", "data.text_field": "--text-field"}):
            records = _counted(shard, text_field, tokenizer, sequence_tokens, unit)

    if (steps is None) == (rounds is None):
        raise ConfigError("--steps and --rounds: one of them is needed", "e.g. --steps 2000")
    total = steps if steps is not None else (rounds or 0) * window_steps
    sizes = [batch] if batch is not None else [b for b in BATCHES if b <= records] or [records]
    plans = [
        planning.plan(
            epsilon=epsilon,
            records=records,
            batch=size,
            steps=total,
            delta=delta,
            sequence_tokens=sequence_tokens,
            parameters=parameters,
            unit=unit,
        )
        for size in sizes
    ]
    if as_json:
        echo_json(plans)
    elif batch is None:
        print_table(plans)
    else:
        print_plan(plans[0])


@privacy.command("documents")
@home_option
@click.option(
    "--shard",
    multiple=True,
    type=GivenText(),
    metavar="PATH",
    help="Files, folders or globs. Default: data.corpus, or else data.shard.",
)
@click.option("--above", type=Number(), default=0.0, help="Only files with more epsilon than this.")
@click.option("--delta", type=Number(), help="Delta. Default: the one that the ledger notes.")
@json_option
def documents_command(
    home: Home, shard: tuple[str, ...], above: float, delta: float | None, as_json: bool
) -> None:
    """List files of the shard that hold charged text. Charges by all homes of this machine count.

    A node trains no more once the budget of one document is spent. Take all files that hold it out
    of the shard.
    """
    from xpeer.accounts import report  # noqa: PLC0415 - slow to import
    from xpeer.training.documents import name_documents  # noqa: PLC0415

    data = load_config(home).data
    with _opened(home) as (ledger, register):
        if register is None:
            raise LocalError("the machine's register is not there", "it is made when a node trains")
        held = name_documents(shard or data.corpus or data.shard, data.text_field)
        files = report.files(
            ledger,
            register,
            held.with_files(),
            _checked_delta(delta) or report.noted_targets(ledger)[0],
        )
    files = [file for file in files if file.epsilon > above]
    if as_json:
        echo_json(files)
        return
    for file in files:
        echo(f"{file.epsilon:9.4f}  {file.documents:6d}  {file.path}")


@privacy.command("report")
@home_option
@json_option
def report_command(home: Home, as_json: bool) -> None:
    """Write what an auditor needs to recompute epsilon, as Markdown or JSON."""
    from xpeer.accounts import audit, report  # noqa: PLC0415 - slow to import

    with _opened(home) as (ledger, register):
        account = report.account(ledger, register, load_config(home).privacy.keep_back)
        verdict = report.verify(ledger, register)
        charges = ledger.charges()
    if as_json:
        echo_json({"account": account, "verdict": verdict, "charges": charges})
    else:
        click.echo(audit.markdown(account, verdict, charges), nl=False)


@privacy.command("use-register")
@home_option
def use_register_command(home: Home) -> None:
    """Have this home go on with the register that is configured now.

    Only if its own register is lost for good: what other homes charged there is forgotten. This
    home's charges then count for every document that it has or ever will have.
    """
    from xpeer.accounts.bound import use_register  # noqa: PLC0415 - imports cryptography
    from xpeer.accounts.ledger import Ledger  # noqa: PLC0415
    from xpeer_daemon.lock import HomeLock  # noqa: PLC0415

    folder = privacy_register(load_config(home))
    with Ledger.look(home.ledger_db):
        pass  # there is one, or it says so
    with HomeLock.acquire(home), Ledger.open(home.ledger_db) as ledger:
        before = ledger.noted_register()
        use_register(ledger, folder)
    was = f"; before, it used the one in {before[1]}" if before else ""
    say(f"this home's charges go to the privacy register in {folder} from now on{was}")


@privacy.command("verify")
@home_option
@click.option(
    "--ledger", "path", type=GivenPath("file"), help="Another ledger.sqlite than the home's."
)
@click.option("--delta", type=Number(), help="Delta. Default: the one that the ledger notes.")
@json_option
def verify_command(home: Home, path: Path | None, delta: float | None, as_json: bool) -> None:
    """Check the chain of charges and recompute epsilon independently; exit 1 if they disagree."""
    from xpeer.accounts import report  # noqa: PLC0415 - slow to import

    with _opened(home, path) as (ledger, register):
        verdict = report.verify(ledger, register, _checked_delta(delta))
    if as_json:
        echo_json(verdict)
    else:
        click.echo(
            f"{verdict.charges} charges, an unbroken chain; epsilon at delta {verdict.delta:.3g}:"
        )
        for sums in verdict.checked:
            click.echo(
                f"  {sums.what}: accountant {sums.epsilon_accountant:.4f}, replayed "
                f"{sums.epsilon_replayed:.4f} (in {max(0.0, sums.epsilon_lower):.4f} .. "
                f"{sums.epsilon_upper:.4f}), Renyi {sums.epsilon_rdp:.4f}"
            )
    for problem in verdict.problems:
        say(f"xpeer: error: {problem}")
    if verdict.problems:
        raise click.exceptions.Exit(int(ExitCode.ERROR))


@contextmanager
def _opened(home: Home, path: Path | None = None) -> Iterator[tuple[Ledger, Register | None]]:
    """Open the ledger and, if there is one, the machine's register, both read-only."""
    from xpeer.accounts.bound import look_at_register  # noqa: PLC0415 - imports cryptography
    from xpeer.accounts.ledger import Ledger  # noqa: PLC0415

    if path is None and home.manifest.exists():
        _require_private(SignedManifest.load(home.manifest))
    if path is None and not home.ledger_db.exists() and any(home.checkpoints.glob("*")):
        raise LocalError(
            f"privacy ledger {home.ledger_db} is missing, but there are checkpoints",
            "restore it from a copy made after the last training step",
        )
    with Ledger.look(path or home.ledger_db) as ledger:
        folder = privacy_register(load_config(home))
        try:
            register = look_at_register(ledger, folder)
        except ConfigError:
            if path is None:
                raise
            register = None  # an auditor's copy, from another machine
        if register is None:
            say(
                f"warning: the machine's register is not in {folder}: other homes and earlier text "
                "are not counted; is XPEER_PRIVACY_REGISTER set as for the daemon?"
            )
        with register or nullcontext():
            yield ledger, register


def _require_private(signed: SignedManifest) -> None:
    """Refuse a swarm that charges nothing.

    If this version can't read the manifest, only warn, so that the charges can still be read.
    """
    try:
        policy = signed.open().privacy.policy
    except ConfigError as e:
        say(f"warning: {e}")
        return
    if not policy.charges:
        raise LocalError(
            "this swarm trains without privacy: nothing is charged, and nothing is protected",
            "join or found a swarm with privacy.mode = record",
        )


def _checked_delta(delta: float | None) -> float | None:
    if delta is not None and not DELTA_MIN <= delta < 1:
        raise ConfigError(
            f"--delta {delta} is not between {DELTA_MIN:g} and 1", "e.g. --delta 1e-5"
        )
    return delta


def _counted(
    shard: Sequence[str], text_field: str, tokenizer: Path | None, sequence_tokens: int, unit: str
) -> int:
    """Count the units that a node would train on. The default part of the shard is held out."""
    from xpeer.config import Data  # noqa: PLC0415
    from xpeer.trainer.text import read_table  # noqa: PLC0415 - torch
    from xpeer.training.piece_table import split_pieces  # noqa: PLC0415
    from xpeer.training.reading import Recipe  # noqa: PLC0415
    from xpeer.training.record_view import MappedRecords  # noqa: PLC0415
    from xpeer.training.tokenising import told  # noqa: PLC0415
    from xpeer.training.tokenizer import ByteTokenizer, HuggingFaceTokenizer  # noqa: PLC0415

    words = HuggingFaceTokenizer(tokenizer) if tokenizer else ByteTokenizer()
    recipe = Recipe(words, text_field)
    with ended_by_signals(), tempfile.TemporaryDirectory(prefix="xpeer-tokens-") as cache:
        table, _ = read_table(shard, "--shard", recipe, Path(cache), told(say))
        training, _ = split_pieces(table, Data().validation_share, Data().split)
        examples = recipe.makes_examples
        mine = table.select(training)
        records = MappedRecords(mine, sequence_tokens, examples=examples)
        records.require_some()
        return len(mine) - records.too_short() if unit == "document" else len(records)


def _rows(account: Account) -> Iterator[tuple[str, str]]:
    left = max(0.0, account.epsilon_target - account.epsilon_spent)
    yield "mode", f"{account.mode}, per {account.unit}"
    yield (
        "spent",
        f"epsilon {account.epsilon_spent:.4f} of {account.epsilon_target:g} at delta "
        f"{account.delta:.3g}; {left:.4f} or {account.steps_left} steps left",
    )
    if account.epsilon_kept_back:
        yield (
            "kept back",
            f"epsilon {account.epsilon_kept_back:g} of the budget is reserved for `xpeer finetune`",
        )
    if own := sum(segment.steps for segment in account.own_segments):
        yield "own steps", f"{own} of the steps below, by `xpeer finetune`"
    if account.epsilon_ever > account.epsilon_spent:
        yield "ever", f"epsilon {account.epsilon_ever:.4f}, counting text no longer in the shard"
    for segment in account.segments:
        yield (
            "steps",
            f"{segment.steps} with noise {segment.noise_multiplier:g}, sampling probability "
            f"{segment.sampling_probability:.6g}",
        )
    for each in account.documents:
        where = "in the shard" if each.here else "no longer in the shard"
        homes = "this home alone" if each.homes == 1 else f"{each.homes} homes"
        yield "documents", f"{each.documents} {where}: epsilon {each.epsilon:.4f}, by {homes}"
    if account.classes_left_out:
        yield "documents", f"and {account.classes_left_out} classes of documents with fewer steps"
    ends = account.ends_unix_s
    when = f"about {moment(ends)}" if ends else "unknown: the node is not training now"
    if not account.steps_left:
        when = "the budget is spent"
    yield "ends", when
    yield (
        "ledger",
        f"{account.ledger_id}, {account.charges} charges, head {account.chain_head[:16]}",
    )
