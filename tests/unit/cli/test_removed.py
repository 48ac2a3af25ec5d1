"""A home of a swarm that uses what later versions don't know: it does not start, and is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.accounts.ledgers import open_declared
from tests.unit.cli.test_init import xpeer
from xpeer import founding
from xpeer.accounts.accountant import Segment
from xpeer.accounts.chain import ChargeContext
from xpeer.config import Home
from xpeer.errors import ExitCode
from xpeer.founding_model import PRESETS
from xpeer.identity import Domain, Identity, blake2b
from xpeer.manifest import End, Manifest, PublicText
from xpeer.manifest.model import Model
from xpeer.manifest.signed import SignedManifest

SETTINGS = f"""
[network]
listen = ["/ip4/127.0.0.1/tcp/0"]
[data]
shard = ["{__file__}"]
"""


GONE = {
    "modulo": ("round", "codec", "int8-modulo", "modulo codecs were removed", "int8"),
    "update": ("privacy", "mode", "update", "mode update was removed", "record"),
}


@pytest.fixture(params=GONE)
def gone(request: pytest.FixtureRequest) -> tuple[str, str, str, str, str]:
    """Section, field, value, why not, what to say now."""
    return GONE[request.param]


@pytest.fixture
def home(tmp_path: Path, gone: tuple[str, str, str, str, str]) -> Home:
    """No manifest of this version can say that, so that it is JSON."""
    home = Home(tmp_path / "h")
    text = PublicText(digest=blake2b(b"text").hex(), text="text")
    model = Model(config=PRESETS["tiny"], num_params=1, initial_digest="")
    manifest = Manifest(name="s", created_unix_s=0, model=model, public_text=text, end=End(steps=1))
    founding.found(home, manifest, lambda folder: folder.mkdir(), SETTINGS)
    tree = json.loads(SignedManifest.load(home.manifest).body)
    section, field, value, *_ = gone
    tree[section][field] = value
    body, admin = json.dumps(tree), Identity.load(home.admin_key)
    signature = admin.sign(Domain.MANIFEST, body.encode())
    signed = SignedManifest(body, admin.verify_key, signature)
    home.manifest.chmod(0o600)
    home.manifest.write_bytes(signed.to_bytes())
    mode, unit = ("update", "shard") if value == "update" else ("record", "record")
    about = ChargeContext("swarm", mode, 1.0, 1e-5, 8.0, unit)
    with open_declared(home.ledger_db, about=about) as ledger:
        ledger.charge(Segment(1.0, 0.02, 40))
    return home


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_it_is_refused_to_start(
    home: Home, gone: tuple[str, str, str, str, str], options: tuple[str, ...]
) -> None:
    section, field, value, why, instead = gone
    code, _, err = xpeer("start", "--home", str(home.path), *options)
    assert code == 8 == int(ExitCode.BAD_CONFIG)
    assert f"{section}.{field} = {value}: {why}" in err
    assert f"found another one with {section}.{field} = {instead}" in err
    assert "run this swarm with xpeer 0.1.0 as of 2026-11-29 or earlier" in err


def test_its_ledger_stays_readable(home: Home, gone: tuple[str, str, str, str, str]) -> None:
    code, out, err = xpeer("privacy", "status", "--home", str(home.path))
    assert code == ExitCode.OK, err
    assert "of 8 at delta 1e-05" in out
    assert f"warning: manifest: {'.'.join(gone[:2])} = {gone[2]}" in err
    for command in ("report", "verify"):
        code, out, err = xpeer("privacy", command, "--home", str(home.path), "--json")
        assert code == ExitCode.OK, err
        assert json.loads(out)
