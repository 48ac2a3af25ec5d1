"""The command line stays quick: neither torch nor hivemind, and rich only for terminals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_daemon import answering

ROOT = Path(__file__).parents[2]
HEAVY = {
    "torch",
    "hivemind",
    "transformers",
    "aiohttp",
    "opacus",
    "dp_accounting",
    "numpy",
    "uvloop",
}

PROBE = """
import sys
from xpeer.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    code = end.code
print("LOADED", code, *sorted({name.partition(".")[0] for name in sys.modules}))
"""


def loaded(*args: str) -> tuple[int, set[str]]:
    """Exit code of a command, and the top-level modules that it loaded."""
    result = subprocess.run(
        [sys.executable, "-c", PROBE, *args], cwd=ROOT, capture_output=True, text=True, check=True
    )
    _, code, *modules = result.stdout.splitlines()[-1].split()
    return int(code), set(modules)


@pytest.mark.parametrize("command", ["--help", "version", "status", "peers", "start --help"])
def test_quick_commands_are_light(tmp_path: Path, command: str) -> None:
    args = command.split()
    if args[0] in ("status", "peers"):
        args += ["--home", str(tmp_path)]
    with answering(tmp_path / "xpeer.sock"):
        code, modules = loaded(*args)
    assert code == 0
    assert not modules & HEAVY
    assert "rich" not in modules
    assert "nacl" not in modules


@pytest.mark.parametrize(
    "command", ["init", "invite", "id", "bootstrap", "start", "checkpoint", "demo", "logs"]
)
def test_the_help_of_every_command_is_light(command: str) -> None:
    code, modules = loaded(command, "--help")
    assert code == 0
    assert not modules & {"torch", "hivemind", "transformers"}
