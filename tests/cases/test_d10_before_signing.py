"""D10: what a manifest or a setting makes impossible is found before it is signed or started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from tests.cases.support import found, model_folder, sets, skipping, tokenizer_folder, xpeer
from xpeer import drafting
from xpeer.cli import main
from xpeer.config import Home
from xpeer.manifest import Tokenizer

PEER = "12D3KooWQh1eEHfK3YjQB46WgrQhvpecUQT6suAPZfoSCgSV3m51"
UNUSABLE = {"bos_token": None, "eos_token": None, "pad_token": None}


def test_an_address_that_is_none(tmp_path: Path) -> None:
    done = xpeer("init", "--swarm", "s", "--home", tmp_path / "h", "--preset", "tiny",
                 "--announce", "nonsense")  # fmt: skip
    assert done.returncode == 8, "it was founded with an address that start refuses"
    assert "network.announce" in done.stderr
    assert not (tmp_path / "h").exists()


def test_a_tokenizer_that_can_never_be_started_with(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "m")
    tokens = tokenizer_folder(tmp_path / "t", **UNUSABLE)  # type: ignore[arg-type]
    done = xpeer("init", "--swarm", "s", "--home", tmp_path / "h", "--model", model,
                 "--tokenizer", tokens)  # fmt: skip
    assert done.returncode == 8, "it was signed for good, and can never start"
    assert "pad_token" in done.stderr
    assert not (tmp_path / "h").exists()


def cli(*arguments: str | Path) -> Result:
    done = CliRunner().invoke(main, list(map(str, arguments)))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


@pytest.mark.parametrize(
    ("option", "address", "told"),
    [
        ("--announce", "/ip4/127.0.0.1/tcp/0", "no port"),
        ("--announce", "/ip4/0.0.0.0/tcp/4001", "every address"),
        ("--announce", "/ip6/::/tcp/4001", "every address"),
        ("--announce", "/ip4/192.0.2.1/udp/4001", "network.announce"),
        ("--announce", "/ip4/192.0.2.999/tcp/4001", "network.announce"),
        ("--announce", "/ip4/::1/tcp/4001", "network.announce"),
        ("--announce", "/ip4/192.0.2.1/tcp/70000", "network.announce"),
        ("--announce", "192.0.2.1:4001", "network.announce"),
        ("--announce", "", "network.announce"),
        ("--listen", "nonsense", "network.listen"),
        ("--listen", "/dns4/localhost/tcp/4001", "network.listen"),
        ("--listen", "/ip4/127.0.0.1/tcp", "network.listen"),
        ("--bootstrap", f"/nonsense/p2p/{PEER}", "bootstrap"),
        ("--bootstrap", f"/ip4/192.0.2.1/tcp/0/p2p/{PEER}", "port 0"),
        ("--bootstrap", "/ip4/192.0.2.1/tcp/4001", "/p2p/PEERID"),
    ],
)
def test_addresses_at_init_and_at_start(
    tmp_path: Path, shard: Path, option: str, address: str, told: str
) -> None:
    done = cli("init", "--swarm", "s", "--home", tmp_path / "h", "--preset", "tiny",
               option, address)  # fmt: skip
    assert (done.exit_code, told in done.stderr) == (8, True), done.stderr
    home = tmp_path / "good"
    assert (
        cli("init", "--swarm", "s", "--home", home, "--preset", "tiny", *skipping()).exit_code == 0
    )
    done = cli("start", "--home", home, "--shard", shard, "--dry-run", option, address)
    assert (done.exit_code, told in done.stderr) == (8, True), done.stderr


@pytest.mark.parametrize(
    "address",
    ["/ip4/192.0.2.1/tcp/4001", "/ip6/2001:db8::1/tcp/4001", "/dns4/a.example/tcp/1",
     "/dns/a-b.example.org./tcp/4001", "/ip4/127.0.0.1/tcp/4001"],
)  # fmt: skip
def test_addresses_that_are_right(address: str) -> None:
    from xpeer.network.multiaddress import check_announce

    assert check_announce("network.announce", address) == address


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--set", "privacy.noise_multiplier=0.01"], "a single step costs"),
        (["--set", "optimiser.learning_rate=1e38"], "optimiser.learning_rate"),
        (["--set", "round.masks=true", "--set", "round.group=3",
          "--set", "round.mask_step=1e-9"], "round.mask_step"),
        (["--set", "optimiser.sequence_tokens=600"], "512 positions"),
        (["--set", "round.fragments=1025"], "round.fragments"),
        (["--public-text", "short.txt"], "--public-text"),
        (["--lora-rank", "2", "--lora-target", "nothing"], "model.lora.targets"),
        (["--model-config", "moe.json"], "expert"),
    ],
)  # fmt: skip
def test_what_a_manifest_would_make_impossible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("abc")
    limited: dict[str, Any] = {
        "model_type": "switch_transformers", "vocab_size": 320, "expert_capacity": 4,
    }  # fmt: skip
    Path("moe.json").write_text(json.dumps(limited))
    preset = [] if "--model-config" in options else ["--preset", "tiny"]
    quick = sets("optimiser.batch_records=4", "optimiser.sequence_tokens=32")
    done = cli("init", "--swarm", "s", "--home", "h", *preset, *quick, *options)
    assert done.exit_code == 8, done.output
    assert told in done.stderr.splitlines()[-1] or "moe.json" in options, done.stderr
    assert not Path("h").exists()


def test_a_home_that_was_founded_with_a_fault_is_told_by_a_dry_run(
    tmp_path: Path, shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an older version, which signed it, and knew nothing of special tokens."""
    home = tmp_path / "h"
    named = drafting._named

    def as_before(tokenizer: object, folder: Path | None) -> Tokenizer:
        return msgspec.structs.replace(named(tokenizer, folder), special=None, chat_digest="")

    monkeypatch.setattr(drafting, "_named", as_before)
    model = model_folder(tmp_path / "m")
    tokens = tokenizer_folder(tmp_path / "t")
    found(home, shard, "--model", model, "--tokenizer", tokens)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tokens / name).unlink(missing_ok=True)
    done = cli("start", "--home", home, "--dry-run", *skipping("start"))
    assert (done.exit_code, "pad_token" in done.stderr) == (8, True), done.stderr
    assert not Home(home).ledger_db.exists()
