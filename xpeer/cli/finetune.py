"""`xpeer finetune`: trains the swarm's model further on this node's text, for this node alone."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from xpeer.cli.commands import command
from xpeer.cli.common import (
    INTERRUPTED,
    Number,
    Whole,
    echo,
    echo_json,
    home_option,
    json_option,
    load_config,
    say,
    secure_home,
)
from xpeer.config import Home, NodeConfig, privacy_register
from xpeer.control import Client
from xpeer.errors import LocalError, NotRunningError
from xpeer.manifest.signed import SignedManifest

if TYPE_CHECKING:
    from xpeer.accounts.own_model import OwnModel
    from xpeer_daemon.lock import HomeLock

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end the command at the next step boundary. It goes on when it is run again."""


@click.command()
@home_option
@json_option
@click.option(
    "--steps", type=Whole(1, 10**6), help="Own steps. Default: a quarter of the swarm's steps."
)
@click.option(
    "--learning-rate",
    type=Number(0, 10.0, min_open=True),
    help="Learning rate of own steps. Default: the manifest's.",
)
@click.option(
    "--keep",
    type=click.Choice(["best", "last"]),
    help="Model to keep. best (default): lowest loss on held-out own text. last: the last step's.",
)
@click.option("--anew", is_flag=True, help="Forget an unfinished run; its charges stay.")
@click.option("--spend-all", is_flag=True, help="Leave no budget for the rest of the swarm's run.")
@click.option("--stop", is_flag=True, help="Stop the node first, if it has finished its run.")
def finetune(
    home: Home,
    as_json: bool,
    steps: int | None,
    learning_rate: float | None,
    keep: str | None,
    anew: bool,
    spend_all: bool,
    stop: bool,
) -> None:
    """Train the swarm's model further on this node's own text, and keep the result at home.

    Nothing of it is exchanged or given to joiners. Under privacy its steps are charged as the
    swarm's are: privacy.keep_back says which part of the budget is left for them.
    """
    config = load_config(home)
    secure_home(home)
    SignedManifest.load(home.manifest)  # a home of no swarm is refused before anything is stopped
    _check_register(home, config)
    if stop:
        _stop_if_finished(home, config)
    with _locked(home, home.socket(config) if stop else None):
        import torch  # noqa: PLC0415 - takes seconds

        from xpeer.trainer.own import OwnTraining, Wishes  # noqa: PLC0415 - torch

        if config.training.threads:
            torch.set_num_threads(config.training.threads)
        wishes = Wishes(steps, learning_rate, keep, anew, spend_all)  # type: ignore[arg-type]
        training = OwnTraining(home, config, wishes, say)
        with _ended_by_signals(training.stop):
            made = training.run()
    if made is None:
        say(f"stopped; `{command(home, 'finetune')}` goes on where it was")
        raise click.exceptions.Exit(INTERRUPTED)
    if as_json:
        echo_json(made)
    else:
        _print(home, made)


def _print(home: Home, made: OwnModel) -> None:
    plan = made.plan
    for what, before, after in (
        ("held-out own text", plan.loss_before, made.loss_after),
        ("public text", plan.loss_public_before, made.loss_public_after),
    ):
        if before is not None and after is not None:
            echo(f"loss on {what}: {before:.4f} -> {after:.4f} nats per token")
    if made.epsilon_target:
        echo(
            f"epsilon {plan.epsilon_before:.4f} -> {made.epsilon_spent:.4f} of "
            f"{made.epsilon_target:g} at delta {made.delta:.1e}"
        )
    short = f" of {plan.steps}, then the budget was spent" if made.steps < plan.steps else ""
    echo(f"kept: the model after {made.kept_step} own steps; {made.steps} were taken{short}")
    say("it stays in this home: the swarm's model is what others get")
    say(f"use it: {command(home, 'generate', '--own', '--prompt', 'TEXT')}")
    say(f"        {command(home, 'checkpoint', 'export', '--own', '--hf', 'FOLDER')}")


def _check_register(home: Home, config: NodeConfig) -> None:
    """Refuse another privacy register than the node's before anything is stopped."""
    from xpeer.accounts.bound import refuse_another  # noqa: PLC0415 - imports cryptography
    from xpeer.accounts.ledger import Ledger  # noqa: PLC0415

    if home.ledger_db.exists():
        with Ledger.look(home.ledger_db) as ledger:
            refuse_another(ledger, privacy_register(config))


def _stop_if_finished(home: Home, config: NodeConfig) -> None:
    """Stop a node whose run is over; do nothing if none runs.

    Raises:
        LocalError: it still trains or exchanges.
    """
    client = Client(home.socket(config))
    try:
        state = client.status().state
    except NotRunningError:
        return
    if state != "finished":
        raise LocalError(
            f"the node is {state}: it has not finished its part of the swarm's run",
            f"wait, or stop it yourself: `{command(home, 'stop')}`",
        )
    client.stop_and_wait(config.daemon.stop_timeout_s, patient=True)
    say(f"stopped the node; start it again afterwards: `{command(home, 'start')}`")


@contextmanager
def _locked(home: Home, asked: Path | None) -> Iterator[HomeLock]:
    """Hold the home's lock: ledger and checkpoints have one writer at a time.

    Args:
        home: the home.
        asked: socket at which a node was asked to stop; None = none was asked.

    Raises:
        LocalError: a node runs on this home, or another `xpeer finetune`.
    """
    from xpeer_daemon.lock import HomeLock  # noqa: PLC0415 - after the arguments are checked

    try:
        lock = HomeLock.acquire(home)
    except LocalError as e:
        if type(e) is not LocalError:
            raise
        problem = f"{e.problem}: it and own steps can't write one ledger at the same time"
        if asked is not None:
            raise LocalError(
                f"{problem}, and it doesn't answer at {asked}",
                "set daemon.socket (XPEER_DAEMON_SOCKET) as for the node, or stop it yourself",
            ) from e
        raise LocalError(
            problem,
            f"stop it with `{command(home, 'stop')}`, and start it again afterwards; a node that "
            "has finished is stopped by `--stop`, and joiners then ask another member",
        ) from e
    with lock:
        yield lock


@contextmanager
def _ended_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Have signals call `stop` instead of ending the process."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        if before[number] is not signal.SIG_IGN:  # e.g. nohup
            signal.signal(number, lambda _number, _frame: stop())
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
