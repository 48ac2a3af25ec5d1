"""D40: printed next steps are complete; a joiner learns all that it needs at once."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.cases.support import model_folder, skipping, tokenizer_folder, xpeer
from xpeer.cli import main
from xpeer.config import Home
from xpeer.identity import Identity
from xpeer.network.membership.invites import Token

SEED = f"/ip4/127.0.0.1/tcp/4001/p2p/{Identity.generate().peer_id}"


def commands(printed: str) -> list[list[str]]:
    """The xpeer commands in it, as a shell would take them."""
    lines = [line[line.index("xpeer ") :] for line in printed.splitlines() if ":  xpeer " in line]
    return [shlex.split(line.partition("   (")[0]) for line in lines]


def test_next_steps_name_the_home(tmp_path: Path) -> None:
    home = tmp_path / "my home"
    done = xpeer("init", "--swarm", "s", "--home", home, "--preset", "tiny", *skipping())
    assert done.returncode == 0, done.stderr
    start, invite = commands(done.stderr)
    assert str(home) in start, f"--home is dropped: {start}"
    assert start[1:3] == ["start", "--bootstrap"]
    assert invite[-2:] == ["--home", str(home)]


def cli(*arguments: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, list(map(str, arguments)))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A swarm that trains adapters of a model with its tokenizer: the model, a token, its text."""
    root = tmp_path_factory.mktemp("d40")
    model = tokenizer_folder(model_folder(root / "base"))
    code, _, err = cli("init", "--swarm", "s", "--home", root / "f", "--model", model,
                       "--lora-rank", "2", *skipping())  # fmt: skip
    assert code == 0, err
    code, token, err = cli("invite", "create", "--home", root / "f", "--seed", SEED)
    assert code == 0, err
    return model, token.strip(), err


def test_an_invitation_says_all(swarm: tuple[Path, str, str]) -> None:
    model, token, said = swarm
    assert said.count("--base-model /path/to/model --tokenizer /path/to/tokenizer") == 2
    needs = Token.parse(token).needs
    assert needs is not None
    assert needs.source == model.name == "base"
    for part in (needs.tokenizer[:16], needs.base_model[:16], "base", "xpeer[lora]"):
        assert part in said


@pytest.mark.parametrize("command", ["init", "start"])
def test_a_joiner_learns_all_at_once(
    tmp_path: Path, swarm: tuple[Path, str, str], shard: Path, command: str
) -> None:
    needs = Token.parse(swarm[1]).needs
    assert needs is not None
    code, _, err = cli(command, "--home", tmp_path / "j", "--join", swarm[1], "--shard", shard)
    assert code == (0 if command == "init" else 8), err
    for part in ("data.base_model", "data.tokenizer", needs.tokenizer[:16], needs.base_model[:16]):
        assert part in err
    assert Home(tmp_path / "j").credential.exists() == (command == "init")


def test_a_joiner_that_has_all(tmp_path: Path, swarm: tuple[Path, str, str], shard: Path) -> None:
    model, token, _ = swarm
    beside: list[str | Path] = ["--base-model", model]  # its tokenizer lies there, too
    for name, given in (("a", beside), ("b", [*beside, "--tokenizer", model])):
        home = tmp_path / name
        code, _, err = cli("init", "--home", home, "--join", token, "--shard", shard, *given)
        assert (code, "need" in err) == (0, False), err
        code, _, err = cli("start", "--home", home, "--dry-run", "--listen", "/ip4/127.0.0.1/tcp/0")
        assert code == 0, err
        assert "lacks" not in err


def test_what_is_wrong_is_named_with_what_is_missing(
    tmp_path: Path, swarm: tuple[Path, str, str], shard: Path
) -> None:
    other = tokenizer_folder(tmp_path / "t", 301)
    code, _, err = cli("start", "--home", tmp_path / "j", "--join", swarm[1], "--shard", shard,
                       "--tokenizer", other)  # fmt: skip
    assert code == 8, err
    assert "(1) --base-model" in err
    assert "(2) data.tokenizer" in err


def test_tokens_of_swarms_without_needs_are_as_they_were(tmp_path: Path) -> None:
    code, _, err = cli("init", "--swarm", "s", "--home", tmp_path / "f", "--preset", "tiny",
                       *skipping())  # fmt: skip
    assert code == 0, err
    token = Token.parse(cli("invite", "create", "--home", tmp_path / "f", "--seed", SEED)[1])
    assert token.needs is None
    assert "needs" not in str(token.__class__.parse(str(token))._statement())
