"""D38: `status` and `peers` fit 80 columns, whatever is in them; peers have names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.cases.support import LOOPBACK, found, xpeer
from tests.fake_daemon import answering
from xpeer.cli import main
from xpeer.config import Home
from xpeer.phase import Phase
from xpeer.status import Partner, PrivacySpent, Progress, Status

ID = "12D3KooWSahP5pFRCEfaziPEba7urXGeif6T1y8jmodzdFUvzBHj"
PEER: dict[str, Any] = {
    "peer_id": ID, "phase": "budget-spent", "role": "infrastructure", "speed": 123456.0,
    "exchanges": 123456, "failures": 98765, "last_reason": "ledger-went-back",
    "privacy": "record, epsilon 8, delta 1e-06", "ledger_went_back": "1234567 now, 2345678 before",
    "last_exchange_age_s": 12345.0, "bytes_in": 10**12, "bytes_out": 10**12,
    "addresses": [f"/dns4/a-rather-long-name.of-some-cloud.example.org/tcp/40001/p2p/{ID}"],
}  # fmt: skip
LONG = Status(
    state=Phase.TRAINING, peer_id=ID, swarm_id="ab" * 32, swarm_name="hospitals-of-three-countries",
    version="0.1.0", pid=4194304, uptime_s=9e6, addresses=PEER["addresses"], num_params=10**9,
    device="cuda:0", round=123456,
    progress=Progress(
        step=1234567, planned_steps=2345678, tokens=10**12, loss_train=3.25, loss_public=4.125,
        loss_validation=3.5, tokens_per_s=1234567.0, consensus_distance=0.01, seconds_training=9e6,
        seconds_here=1e6, seconds_blocked=1e5,
    ),
    privacy=PrivacySpent(
        epsilon_spent=3.25, epsilon_target=8.0, delta=1e-6, noise_multiplier=1.125,
        steps_charged=1234567, steps_left=2345678, ends_unix_s=2e9, documents_elsewhere=123456,
        engine="ghost", engine_reason="it is 3.2 times as fast as vmap, which needs 12 GB more; "
        "hooks were refused, since two layers share their weights", clip_norm=1.0,
    ),
    partners=[Partner(**PEER)] * 3, exchanges_done=1234567,
    exchanges_failed={"timeout": 123, "unreachable": 4567, "ledger-went-back": 890, "closed": 12},
    one_sided_merges=123, bytes_in=10**12, bytes_out=10**12, egress_cost=1234567.0, currency="EUR",
    compression_ratio=3.9, last_good_round_age_s=12345.0, last_checkpoint_age_s=123.0,
    trainer_restarts=12, sidecar_restarts=34, strangers_refused=123456,
)  # fmt: skip


@pytest.mark.parametrize("command", ["status", "peers"])
def test_eighty_columns_are_enough(tmp_path: Path, command: str) -> None:
    with answering(tmp_path / "xpeer.sock", LONG):
        told = CliRunner(env={"XPEER_HOME": str(tmp_path)}).invoke(main, [command])
    assert told.exit_code == 0
    widest = max(told.stdout.splitlines(), key=len)
    assert len(widest) <= 80, f"{len(widest)} columns: {widest}"
    assert ID[-8:] in told.stdout


def test_what_was_cut_is_there_with_wide(tmp_path: Path) -> None:
    with answering(tmp_path / "xpeer.sock", LONG):
        for command in ("status", "peers"):
            told = CliRunner(env={"XPEER_HOME": str(tmp_path)}).invoke(main, [command, "--wide"])
            assert PEER["addresses"][0] in told.stdout
            assert ID in told.stdout


def test_names_come_first(tmp_path: Path) -> None:
    partners = [Partner(**{**PEER, "name": name}) for name in ("clinic-b", "", "x" * 32)]
    named = Status(partners=partners)
    with answering(tmp_path / "xpeer.sock", named):
        told = CliRunner(env={"XPEER_HOME": str(tmp_path)}).invoke(main, ["peers"])
    head, first, *_ = told.stdout.splitlines()
    assert head.startswith("NAME")
    assert first.startswith("clinic-b  ")
    assert all(len(line) <= 80 for line in told.stdout.splitlines())


def test_a_name_is_set_at_init_and_bad_ones_are_refused(tmp_path: Path, shard: Path) -> None:
    found(tmp_path / "home", shard, "--name", "clinic-a")
    assert 'name = "clinic-a"' in Home(tmp_path / "home").config.read_text()
    for bad in ("x" * 33, "two words", "\x1b[2J", "näme"):
        refused = xpeer(
            *("init", "--swarm", "s", "--home", tmp_path / "other", "--preset", "tiny"),
            *("--listen", LOOPBACK, "--shard", shard, "--name", bad, "--set", "end.steps=20"),
        )
        assert refused.returncode == 8
        assert refused.stderr.startswith("xpeer: error: network.name: ")
        assert "\x1b" not in refused.stderr
