"""The `xpeer` command: a table of subcommands, each imported only when it is run.

`xpeer --help` prints the table's own help lines, so that it is quick and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

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


COMMANDS = {
    "init": Lazy("xpeer.cli.init:init", "Found a swarm, or join one with a token."),
    "plan": Lazy("xpeer.cli.plan:plan", "Which fragments, window and codec suit a link."),
    "id": Lazy("xpeer.cli.identity:id_command", "Print this node's PeerID; make its key."),
    "invite": Lazy("xpeer.cli.invite:invite", "Create tokens that let others join."),
    "bootstrap": Lazy("xpeer.cli.bootstrap:bootstrap", "Run a DHT entry point."),
    "start": Lazy("xpeer.cli.start:start", "Run the daemon: join, train, exchange."),
    "status": Lazy("xpeer.cli.node:status", "What the daemon is doing, and its health."),
    "peers": Lazy("xpeer.cli.node:peers", "The members of the swarm as this node sees them."),
    "pause": Lazy("xpeer.cli.node:pause", "Stop training and exchanging for a while."),
    "resume": Lazy("xpeer.cli.node:resume", "Undo pause."),
    "stop": Lazy("xpeer.cli.node:stop", "Stop the daemon; it saves a checkpoint first."),
    "leave": Lazy("xpeer.cli.node:leave", "Tell the swarm, then stop the daemon."),
    "checkpoint": Lazy("xpeer.cli.checkpoint:checkpoint", "List, save, verify, export."),
    "generate": Lazy("xpeer.cli.use:generate", "Continue a prompt with what was trained."),
    "eval": Lazy("xpeer.cli.use:eval_command", "The loss of a text under what was trained."),
    "privacy": Lazy("xpeer.cli.privacy:privacy", "What was spent; plan, report, verify."),
    "logs": Lazy("xpeer.cli.logs:logs", "Show the daemon's log."),
    "events": Lazy("xpeer.cli.events:events", "What happened to this node, and its exchanges."),
    "demo": Lazy("xpeer.cli.demo.command:demo", "A real swarm on this machine, start to end."),
    "completion": Lazy("xpeer.cli.misc:completion", "Print a shell completion script."),
    "version": Lazy("xpeer.cli.misc:version", "Print the version."),
}


class LazyGroup(click.Group):
    """A group whose subcommands are imported when they are needed, inside the error boundary."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every name, in the order of a node's life."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one subcommand."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].target.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{COMMANDS[cmd_name].target} is not a command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Print the table without importing what it names."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names from the table, without importing what it names."""
        names = [
            CompletionItem(name, help=entry.help)
            for name, entry in COMMANDS.items()
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
