"""D13: variables that Kubernetes and Docker make of a service called xpeer are no settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cases.support import LOOPBACK, xpeer

KUBERNETES = {
    "XPEER_SERVICE_HOST": "10.0.0.1",
    "XPEER_SERVICE_PORT": "4001",
    "XPEER_SERVICE_PORT_LIBP2P": "4001",
    "XPEER_PORT": "tcp://10.0.0.1:4001",
    "XPEER_PORT_4001_TCP": "tcp://10.0.0.1:4001",
    "XPEER_PORT_4001_TCP_PROTO": "tcp",
    "XPEER_PORT_4001_TCP_PORT": "4001",
    "XPEER_PORT_4001_TCP_ADDR": "10.0.0.1",
}


def test_a_service_named_xpeer(tmp_path: Path) -> None:
    done = xpeer("start", "--home", tmp_path / "h", "--listen", LOOPBACK, settings=KUBERNETES)
    assert (done.returncode, "belongs to no swarm" in done.stderr) == (5, True), done.stderr


@pytest.mark.parametrize("prefix", ["XPEER", "XPEER_BOOTSTRAP", "XPEER_NETWORK", "XPEER_A_2"])
def test_services_of_other_names(prefix: str) -> None:
    from xpeer import config_sources

    given = {name.replace("XPEER", prefix, 1): value for name, value in KUBERNETES.items()}
    given |= {f"{prefix}_PORT_53_UDP": "udp://[fd00::1]:53", f"{prefix}_PORT_9_SCTP_ADDR": "::1"}
    linked = {f"{prefix}_NAME": "/web/xpeer", f"{prefix}_ENV_HOME": "/root"}
    if prefix == "XPEER_NETWORK":  # its _NAME is a setting of ours
        linked = {}
    assert config_sources.foreign(given | linked) == sorted(given | linked)
    config_sources.load(Path("none"), given | linked)
    assert " ignored: " in config_sources.note_of_foreign(given)
    assert config_sources.note_of_foreign({"PATH": "/bin"}) == ""


@pytest.mark.parametrize(
    ("name", "value", "nearest"),
    [
        ("XPEER_NETWORK_PORT", "4001", ""),
        ("XPEER_PORT", "4001", ""),
        ("XPEER_NAME", "alice", "did you mean"),
        ("XPEER_ENV_HOME", "/root", ""),
        ("XPEER_NETWORK_LISTN", "x", "did you mean XPEER_NETWORK_LISTEN?"),
        ("XPEER_DAEMON_SOKET", "x", "did you mean XPEER_DAEMON_SOCKET?"),
        ("XPEER_SHARD", "x", "did you mean XPEER_DATA_SHARD?"),
        ("XPEER_SERVICE", "x", ""),
        ("XPEER_HOMES", "x", "XPEER_HOME"),
    ],
)
def test_a_misspelt_setting_is_still_an_error(name: str, value: str, nearest: str) -> None:
    from xpeer import config_sources
    from xpeer.errors import ConfigError

    with pytest.raises(ConfigError, match=name) as caught:
        config_sources.load(Path("none"), {name: value})
    assert nearest in str(caught.value)


def test_the_note_is_said(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from xpeer.cli import main

    (tmp_path / "h").mkdir(mode=0o700)
    done = CliRunner(env=KUBERNETES).invoke(
        main, ["init", "--home", str(tmp_path / "h"), "--join", "nonsense"]
    )
    assert done.exit_code == 5
    assert "note: XPEER_PORT and 7 more ignored" in done.stderr
