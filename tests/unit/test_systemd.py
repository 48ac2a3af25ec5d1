"""The units: what systemd itself says of them, and what they must agree on with the code."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from xpeer.config import Daemon
from xpeer.errors import ExitCode

SYSTEMD = Path(__file__).parents[2] / "systemd"
UNITS = ("xpeer.service", "xpeer@.service", "xpeer-bootstrap.service")
PEERS = UNITS[:2]
ANALYZE = shutil.which("systemd-analyze")
MAX_EXPOSURE = 20
"""Of 100, as `systemd-analyze security --threshold` counts."""

needs_systemd = pytest.mark.skipif(
    ANALYZE is None, reason="systemd-analyze is not installed: the units were not verified"
)


def values(unit: str, key: str) -> list[str]:
    """Every value of a key, in order."""
    return re.findall(rf"^{key}=(.*)$", (SYSTEMD / unit).read_text(), re.MULTILINE)


def analyze(*args: str) -> subprocess.CompletedProcess[str]:
    assert ANALYZE is not None
    return subprocess.run([ANALYZE, *args], capture_output=True, text=True, check=False)


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """Copies whose binary, documentation and environment file exist on this machine."""
    (tmp_path / "env").touch()
    (tmp_path / "operating.md").touch()
    for unit in UNITS:
        text = (SYSTEMD / unit).read_text()
        text = text.replace("/opt/xpeer/bin/xpeer ", "/bin/true ")
        text = text.replace("/opt/xpeer/share/doc/xpeer/", f"{tmp_path}/")
        (tmp_path / unit.replace("@.", "@one.")).write_text(text)
    return tmp_path


@needs_systemd
def test_verify(units: Path) -> None:
    for unit in units.glob("*.service"):
        result = analyze("verify", "--man=no", "--recursive-errors=no", str(unit))
        assert (result.returncode, result.stderr) == (0, ""), unit.name


@needs_systemd
def test_security(units: Path) -> None:
    for unit in units.glob("*.service"):
        result = analyze("security", "--offline=true", f"--threshold={MAX_EXPOSURE}", str(unit))
        assert result.returncode == 0, result.stdout[-2000:]


@pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="systemd-sysusers is missing")
def test_user(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    command = ["systemd-sysusers", f"--root={tmp_path}", str(SYSTEMD / "xpeer.sysusers")]
    subprocess.run(command, check=True, capture_output=True)
    assert "\nxpeer:" in f"\n{(tmp_path / 'etc/passwd').read_text()}"
    assert "\nxpeer:" in f"\n{(tmp_path / 'etc/group').read_text()}"


@pytest.mark.parametrize("unit", UNITS)
def test_what_a_restart_would_not_mend_is_not_restarted(unit: str) -> None:
    (codes,) = values(unit, "RestartPreventExitStatus")
    expected = {ExitCode.NOT_AUTHORISED, ExitCode.BUDGET_SPENT, ExitCode.BAD_CONFIG}
    if unit in PEERS:
        expected.add(ExitCode.NOT_SAVED)
    assert {int(code) for code in codes.split()} == expected


@pytest.mark.parametrize("unit", UNITS)
def test_supervision(unit: str) -> None:
    assert values(unit, "Type") == ["notify"]
    assert values(unit, "NotifyAccess") == ["main"]
    assert values(unit, "KillMode") == ["mixed"]
    assert int(values(unit, "WatchdogSec")[0]) >= 30
    assert values(unit, "LimitCORE") == ["0"]


@pytest.mark.parametrize("unit", PEERS)
def test_the_daemon_may_take_its_time_to_stop(unit: str) -> None:
    assert float(values(unit, "TimeoutStopSec")[0]) > 2 * Daemon().stop_timeout_s


@pytest.mark.parametrize("unit", UNITS)
def test_every_folder_is_the_units_own(unit: str) -> None:
    name = unit.removesuffix(".service").replace("@", "-%i")
    folders = values(unit, "StateDirectory") + values(unit, "CacheDirectory")
    folders += values(unit, "RuntimeDirectory")
    shared = {"xpeer-privacy"} if unit in PEERS else set()  # all peers of a machine count together
    assert {folder for line in folders for folder in line.split()} == {name} | shared
    environment = " ".join(values(unit, "Environment"))
    assert f"XPEER_HOME=%S/{name} " in environment
    if unit in PEERS:
        assert f"XPEER_DAEMON_SOCKET=%t/{name}/xpeer.sock" in environment
        assert "XPEER_PRIVACY_REGISTER=%S/xpeer-privacy " in environment


@pytest.mark.parametrize("unit", PEERS)
def test_a_shard_below_home_can_be_opened(unit: str) -> None:
    """With `yes`, BindReadOnlyPaths can't reach below /home (tried under systemd 252)."""
    assert values(unit, "ProtectHome") == ["tmpfs"]


def test_instances_differ_from_the_single_unit_in_names_only() -> None:
    single, template = ((SYSTEMD / unit).read_text().splitlines() for unit in PEERS)
    single = [line for line in single if not line.startswith("#")]
    template = [line for line in template if not line.startswith("#")]
    assert [x.replace("xpeer-%i", "xpeer").replace("peer %i", "peer") for x in template] == single
