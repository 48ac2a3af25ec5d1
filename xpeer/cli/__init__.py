"""The `xpeer` command: a table of subcommands, each imported only when it is run.

`xpeer --help` prints the table's own help lines, so that it is quick and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import Any, Final, NamedTuple

import click
from click.shell_completion import CompletionItem

from xpeer import __version__
from xpeer.cli.common import error_boundary
from xpeer.files import private_umask


class Lazy(NamedTuple):
    """A subcommand: where it is, and its line in `xpeer --help`."""

    target: str
    """module:attribute"""
    help: str


COMMANDS: Final = {
    "init": Lazy("xpeer.cli.init:init", "Found a swarm, or join one with a token."),
    "plan": Lazy("xpeer.cli.plan:plan", "Which fragments, window and codec suit a link."),
    "estimate": Lazy("xpeer.cli.estimate:estimate", "What memory, disk and bytes a run needs."),
    "id": Lazy("xpeer.cli.identity:id_command", "Print this node's PeerID; make its key."),
    "invite": Lazy("xpeer.cli.invite:invite", "Create tokens that let others join."),
    "bootstrap": Lazy("xpeer.cli.bootstrap:bootstrap", "Run a DHT entry point."),
    "start": Lazy("xpeer.cli.start:start", "Run the daemon: join, train, exchange."),
    "checkpoint": Lazy("xpeer.cli.checkpoint:checkpoint", "List, save, verify, export."),
    "finetune": Lazy("xpeer.cli.finetune:finetune", "Train on own text, for this node alone."),
    "generate": Lazy("xpeer.cli.use:generate", "Continue a prompt with what was trained."),
    "eval": Lazy("xpeer.cli.use:eval_command", "The loss of a text under what was trained."),
    "data": Lazy("xpeer.cli.data:data", "What the text to train on holds."),
    "privacy": Lazy("xpeer.cli.privacy:privacy", "What was spent; plan, report, verify."),
    "logs": Lazy("xpeer.cli.logs:logs", "Show the daemon's log."),
    "events": Lazy("xpeer.cli.events:events", "What happened to this node, and its exchanges."),
    "demo": Lazy("xpeer.cli.demo.command:demo", "A real swarm on this machine, start to end."),
    "completion": Lazy("xpeer.cli.misc:completion", "Print a shell completion script."),
    "version": Lazy("xpeer.cli.misc:version", "Print the version."),
}


"""All but those that ask the daemon."""
_THEN_ASKING: Final = "start"
"""The command behind which those are listed that ask the daemon."""


def asking_the_daemon() -> dict[str, click.Command]:
    """Commands that ask a running daemon: all in `xpeer.cli.node`, in its order."""
    module = importlib.import_module("xpeer.cli.node")
    commands = [value for value in vars(module).values() if isinstance(value, click.Command)]
    return {str(command.name): command for command in commands}


def all_commands() -> dict[str, str]:
    """The help line of every command by its name, in the order of a node's life."""
    lines = {}
    for name, entry in COMMANDS.items():
        lines[name] = entry.help
        if name == _THEN_ASKING:
            lines |= {name: str(each.short_help) for name, each in asking_the_daemon().items()}
    return lines


class LazyGroup(click.Group):
    """A group whose subcommands are imported when they are needed, inside the error boundary."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every name, in the order of a node's life."""
        return list(all_commands())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one subcommand."""
        if cmd_name not in COMMANDS:
            return asking_the_daemon().get(cmd_name)
        module, _, attribute = COMMANDS[cmd_name].target.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{COMMANDS[cmd_name].target} is not a command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Print the table without importing what it names."""
        with formatter.section("Commands"):
            formatter.write_dl(list(all_commands().items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names from the table, without importing what it names."""
        names = [
            CompletionItem(name, help=line)
            for name, line in all_commands().items()
            if name.startswith(incomplete)
        ]
        return [*names, *click.Command.shell_complete(self, ctx, incomplete)]

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Read the root's own options, inside the error boundary."""
        with error_boundary():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a subcommand; its errors become one line and an exit code.

        Whatever it makes, itself or through a library, is for this user alone.
        """
        with private_umask(), error_boundary(ctx):
            return super().invoke(ctx)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, message="xpeer %(version)s")
def main() -> None:
    """Several clouds train one language model, peer to peer, without an aggregator."""
