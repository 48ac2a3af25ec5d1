"""`xpeer invite` and `xpeer init --join`: from the admin's token to the joiner's home."""

from __future__ import annotations

import json
import time
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from tests.fake_daemon import HEALTHY, answering
from xpeer import founding
from xpeer.cli import main
from xpeer.config import Home, NodeConfig
from xpeer.errors import ExitCode
from xpeer.identity import Identity, blake2b
from xpeer.manifest import End, Manifest, PublicText
from xpeer.manifest.model import Model
from xpeer.network.membership.invites import Token

SEED = f"/ip4/192.0.2.1/tcp/4001/p2p/{Identity.generate().peer_id}"
OTHER_SEED = f"/dns4/seed.example/tcp/4001/p2p/{Identity.generate().peer_id}"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XPEER_HOME", raising=False)


def xpeer(*args: str, text: str = "") -> tuple[int, str, str]:
    result = CliRunner().invoke(main, args, input=text)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def found(path: Path, settings: str = "") -> Home:
    made = Manifest(
        name="demo",
        created_unix_s=0,
        model=Model({"model_type": "llama"}, 1, ""),
        public_text=PublicText(blake2b(b"text").hex(), "text"),
        end=End(steps=1),
    )
    founding.found(Home(path), made, lambda folder: folder.mkdir(), settings)
    return Home(path)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return found(tmp_path / "admin")


def create(home: Home, *args: str) -> str:
    code, out, err = xpeer("invite", "create", "--home", str(home.path), *args)
    assert code == ExitCode.OK, err
    assert len(out.splitlines()) == 1
    return out.strip()


def names(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("how", ["argument", "file", "stdin"])
def test_from_id_to_joined(tmp_path: Path, home: Home, how: str) -> None:
    joiner = Home(tmp_path / "joiner")
    peer_id = xpeer("id", "--home", str(joiner.path))[1].strip()
    token = create(home, "--for", peer_id, "--seed", SEED)
    (tmp_path / "token").write_text(token + "\n")
    argument = {"argument": token, "file": f"file:{tmp_path / 'token'}", "stdin": "-"}[how]
    code, out, err = xpeer(
        "init", "--home", str(joiner.path), "--join", argument, "--shard", "/text",
        "--listen", "/ip4/0.0.0.0/tcp/4003", text=token if how == "stdin" else "",
    )  # fmt: skip
    assert code == ExitCode.OK, err
    assert out.strip() == Token.parse(token).swarm_id
    assert "xpeer start --bootstrap" in err
    credential = founding.load_credential(joiner)
    assert credential.verify(out.strip(), time.time()).subject == peer_id
    assert founding.load_seeds(joiner) == [SEED]
    assert "/ip4/0.0.0.0/tcp/4003" in joiner.config.read_text()
    # The secrets of the swarm are not in the token: a member hands them over later.
    assert not joiner.swarm_key.exists()
    assert home.swarm_key.read_bytes().hex() not in token


def test_json(tmp_path: Path, home: Home) -> None:
    code, out, _ = xpeer(
        "invite", "create", "--home", str(home.path), "--seed", SEED, "--ttl", "30m", "--json"
    )
    assert code == ExitCode.OK
    made = json.loads(out)
    token = Token.parse(made["token"])
    assert made["invite"]["join_before_unix_s"] == token.certificate.join_before_unix_s
    assert abs(token.certificate.join_before_unix_s - time.time() - 1800) < 60
    assert all(made["token"] in command for command in made["commands"])
    code, out, _ = xpeer("init", "--home", str(tmp_path / "j"), "--join", made["token"], "--json")
    assert json.loads(out) == {"swarm_id": token.swarm_id, "swarm_name": "demo"}


@pytest.mark.parametrize("role", ["member", "observer", "infrastructure"])
def test_roles(home: Home, role: str) -> None:
    token = Token.parse(create(home, "--role", role, "--seed", SEED))
    assert token.certificate.role == role


def test_admins_are_not_made_by_invitation(home: Home) -> None:
    code, _, _ = xpeer("invite", "create", "--home", str(home.path), "--role", "admin")
    assert code == ExitCode.USAGE


def test_seeds_from_settings_and_daemon(tmp_path: Path) -> None:
    home = found(tmp_path / "h", f'[network]\nbootstrap = ["{OTHER_SEED}"]\n')
    assert Token.parse(create(home)).seeds == [OTHER_SEED]
    reachable = msgspec.structs.replace(HEALTHY, addresses=[SEED, OTHER_SEED])
    with answering(home.socket(NodeConfig()), reachable):
        assert Token.parse(create(home)).seeds == [OTHER_SEED, SEED]
        assert Token.parse(create(home, "--seed", SEED)).seeds == [SEED]


@pytest.mark.parametrize(
    ("addresses", "args", "is_said"),
    [
        (["/ip4/10.0.0.5/tcp/4001", "/ip6/fe80::1/tcp/4001"], (), True),
        (["/ip4/10.0.0.5/tcp/4001", "/dns4/a.example/tcp/4001"], (), False),
        (["/ip4/10.0.0.5/tcp/4001", "/ip4/8.8.8.8/tcp/4001"], (), False),
        (["/ip4/10.0.0.5/tcp/4001"], ("--seed", SEED), False),
        (["/ip4/10.0.0.5/tcp/4001"], ("--no-seed",), False),
    ],
)
def test_addresses_of_this_network_alone_are_said(
    home: Home, addresses: list[str], args: tuple[str, ...], is_said: bool
) -> None:
    """A cloud's machine knows only its private address."""
    peer = SEED.rpartition("/")[2]
    known = msgspec.structs.replace(HEALTHY, addresses=[f"{a}/p2p/{peer}" for a in addresses])
    with answering(home.socket(NodeConfig()), known):
        code, _, err = xpeer("invite", "create", "--home", str(home.path), *args)
    assert code == ExitCode.OK, err
    assert ("network.announce" in err and "/ip4/10.0.0.5/tcp/4001" in err) == is_said


def test_a_token_without_any_seed_needs_a_word(home: Home) -> None:
    code, out, err = xpeer("invite", "create", "--home", str(home.path))
    assert (code, out) == (ExitCode.BAD_CONFIG, "")
    assert "no address is known" in err
    assert "--no-seed" in err
    assert not home.invites.exists()
    assert Token.parse(create(home, "--no-seed")).seeds == []


def test_list(home: Home) -> None:
    code, out, err = xpeer("invite", "list", "--home", str(home.path))
    assert (code, out) == (ExitCode.OK, "")
    assert "no invitation" in err
    peer_id = Identity.generate().peer_id
    tokens = [create(home, "--seed", SEED), create(home, "--for", peer_id, "--seed", SEED)]
    _, out, _ = xpeer("invite", "list", "--home", str(home.path))
    lines = out.splitlines()
    assert "bearer:" in lines[0]
    assert "for 24.0 h" in lines[0]
    assert peer_id in lines[1]
    _, out, _ = xpeer("invite", "list", "--home", str(home.path), "--json")
    assert [entry["serial"] for entry in json.loads(out)] == [
        Token.parse(token).certificate.serial for token in tokens
    ]
    for token in tokens:
        assert token not in out
        assert token not in home.invites.read_text()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--for", "12D3KooWnobody"], "--for"),
        (["--for", "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"], "--for"),
        (["--ttl", "soon"], "--ttl"),
        (["--ttl", "0h"], "--ttl"),
        (["--ttl", "-1h"], "--ttl"),
        (["--ttl", "٣h"], "--ttl"),
        (["--ttl", "366d"], "longer than a membership"),
        (["--ttl", "999999999d"], "longer than a membership"),
        (["--seed", "/ip4/1.2.3.4/tcp/1"], "/p2p/PEERID"),
        (["--no-seed"], "exclude one another"),
        ([*["--seed", OTHER_SEED] * 16], "17 seeds"),
    ],
)
def test_wrong_options_change_nothing(
    tmp_path: Path, home: Home, options: list[str], complaint: str
) -> None:
    before = names(tmp_path)
    code, out, err = xpeer("invite", "create", "--home", str(home.path), "--seed", SEED, *options)
    assert (code, out) == (ExitCode.BAD_CONFIG, "")
    assert complaint in err
    assert err.count("\n") == 1
    assert names(tmp_path) == before


def test_only_the_admin_invites(tmp_path: Path, home: Home) -> None:
    code, _, err = xpeer("invite", "create", "--home", str(tmp_path / "none"), "--seed", SEED)
    assert code == ExitCode.NOT_AUTHORISED
    assert "holds no admin key" in err
    assert not (tmp_path / "none").exists()
    home.admin_key.unlink()
    Identity.generate().save(home.admin_key)
    code, _, err = xpeer("invite", "create", "--home", str(home.path), "--seed", SEED)
    assert code == ExitCode.NOT_AUTHORISED
    assert "is not the admin key" in err
    home.admin_key.chmod(0o440)
    code, _, err = xpeer("invite", "create", "--home", str(home.path), "--seed", SEED)
    assert code == ExitCode.BAD_CONFIG
    assert "mode 0440" in err


def test_tokens_that_do_not_join_change_nothing(tmp_path: Path, home: Home) -> None:
    other = found(tmp_path / "other")
    mine = create(home, "--for", Identity.generate().peer_id, "--seed", SEED)
    bearer = create(home, "--seed", SEED)
    swapped = bearer[:-9] + ("A" if bearer[-9] != "A" else "B") + bearer[-8:]
    joiner, taken = tmp_path / "joiner", str(other.path)
    xpeer("id", "--home", str(joiner))
    before = names(tmp_path)
    cases = [
        (str(joiner), mine, ExitCode.NOT_AUTHORISED, "is for 12D3Koo"),
        (str(tmp_path / "fresh"), mine, ExitCode.NOT_AUTHORISED, "has no key"),
        (str(joiner), swapped, ExitCode.NOT_AUTHORISED, "damaged"),
        (str(joiner), "", ExitCode.NOT_AUTHORISED, "token"),
        (str(joiner), "file:/nonexistent", ExitCode.BAD_CONFIG, "/nonexistent"),
        (taken, bearer, ExitCode.BAD_CONFIG, "belongs to swarm"),
    ]
    for path, token, expected, complaint in cases:
        code, out, err = xpeer("init", "--home", path, "--join", token)
        assert (code, out) == (expected, "")
        assert complaint in err
        assert names(tmp_path) == before


@pytest.mark.parametrize("option", ["--privacy=off", "--set=end.steps=1", "--preset=tiny"])
def test_a_joiner_decides_nothing_for_the_swarm(tmp_path: Path, home: Home, option: str) -> None:
    token = create(home, "--seed", SEED)
    code, _, err = xpeer("init", "--home", str(tmp_path / "j"), "--join", token, option)
    assert code == ExitCode.BAD_CONFIG
    assert "does not go with --join" in err
    assert not (tmp_path / "j").exists()


def test_help_says_what_bearer_tokens_do_not_give() -> None:
    _, out, _ = xpeer("invite", "create", "--help")
    assert "no limit of uses" in out
