"""status, peers, pause, resume, stop and leave against a control API."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from tests.fake_daemon import HEALTHY, OTHER, answering
from tests.unit.test_control import process
from xpeer.cli import main, node, render
from xpeer.cli.peer_table import peer_lines
from xpeer.config import SOCKET, Home
from xpeer.control import Peers
from xpeer.errors import ExitCode, LocalError, NotRunningError
from xpeer.health import HealthReason
from xpeer.policies import MODES
from xpeer.status import Partner, PrivacySpent, ShardSummary, Status, TextProgress
from xpeer_daemon.lock import HomeLock

SICK = msgspec.structs.replace(
    HEALTHY,
    health="degraded",
    reasons=[
        HealthReason(code="no-partner", text="no live partner", remedy="are they up?"),
        HealthReason(code="trainer-down", text="trainer exited with 1"),
    ],
)
OPEN = msgspec.structs.replace(
    HEALTHY, privacy=PrivacySpent(mode="off"), privacy_warning=MODES["off"].warning
)


def test_status_tells_what_of_the_text_was_left_out() -> None:
    shard = ShardSummary(
        files=3, documents=60, characters=61_000, repeated=2, too_short=1,
        skipped={"null": 1, "empty": 2}, left_out={f".{n}": n for n in range(1, 9)},
    )  # fmt: skip
    lines = render.status_lines(msgspec.structs.replace(HEALTHY, shard=shard))
    assert max(map(len, lines)) <= render.WIDTH
    at = lines.index("text        60 documents, 61,000 characters, in 3 files")
    assert [line.strip() for line in lines[at + 1 : at + 5]] == [
        "36 files left out: .8 8, .7 7, .6 6, .5 5, .4 4, others 6",
        "3 rows without text: empty 2, null 1",
        "2 texts that came before",
        "1 documents too short for a record",
    ]


def test_status_tells_how_far_the_tokens_are() -> None:
    tokenising = TextProgress(
        bytes_read=1_500_000_000,
        bytes_total=5_000_000_000,
        documents=123_456,
        bytes_per_s=4_200_000,
        eta_s=833,
    )
    lines = render.status_lines(msgspec.structs.replace(HEALTHY, tokenising=tokenising))
    assert max(map(len, lines)) <= render.WIDTH
    assert (
        "tokens 1.50 GB of 5.00 GB (30%) are tokenised, 4.20 MB/s, 13m 53s left; 123,456 documents"
    ) in " ".join(" ".join(lines).split())


def xpeer(home: Path, *args: str) -> Result:
    return CliRunner(env={"XPEER_HOME": str(home)}).invoke(main, args)


def test_status_for_people(tmp_path: Path) -> None:
    with answering(tmp_path / "xpeer.sock"):
        result = xpeer(tmp_path, "status")
    assert result.exit_code == ExitCode.OK
    assert result.stderr == ""
    rows = re.sub(r"\n {12}(?! )", " ", result.stdout)
    lines = dict(line.split(maxsplit=1) for line in rows.splitlines())
    assert result.stdout.startswith("health      ok\n")
    assert lines["state"] == "training, round 12, step 240 of 1000"
    assert lines["loss"] == (
        "public 4.1250, 12s ago at step 230 never leaving this node: train 3.2500, 1s ago; "
        "validation 3.5000, 12s ago at step 230"
    )
    assert lines["time"] == "15m 0s of training so far"
    assert lines["speed"].startswith(
        "4,321 tokens/s on cpu in float32, 123,456 tokens so far, 1.5%"
    )
    assert lines["partners"] == (
        f"1 live (1 training), 1 missed beta ({OTHER[-8:]}): training, step 231; exchange 3s ago, "
        "takes 1.5 s KooWGone: missed for 2m 5s; no exchange yet"
    )
    assert lines["exchanges"] == (
        "40 done, 2 failed (2 timeout), 0 one-sided; last good round 3s ago"
    )
    assert lines["traffic"] == (
        "in 12.3 MB, out 2.0 GB (3.90x compressed); cost 0.1800 USD, at 0.09 per GB"
    )
    assert lines["privacy"].startswith(
        "epsilon 3.250 of 8 spent per record, 4.750 or 600 steps left"
    )
    assert lines["distance"].startswith("0.0125")
    assert "adapters" not in lines["distance"]
    assert lines["checkpoint"] == "2m 0s ago"


def test_what_averaging_adapters_loses(tmp_path: Path) -> None:
    progress = msgspec.structs.replace(HEALTHY.progress, adapter_misalignment=0.00612)
    with answering(tmp_path / "xpeer.sock", msgspec.structs.replace(HEALTHY, progress=progress)):
        people, programs = (xpeer(tmp_path, "status", *more) for more in ((), ("--json",)))
    assert "averaging loses 0.61% of what the adapters do" in " ".join(people.stdout.split())
    assert json.loads(programs.stdout)["progress"]["adapter_misalignment"] == 0.00612


def test_reasons_come_first(tmp_path: Path) -> None:
    with answering(tmp_path / "xpeer.sock", SICK):
        result = xpeer(tmp_path, "status")
    assert result.exit_code == ExitCode.OK
    assert result.stdout.splitlines()[:4] == [
        "health      degraded",
        "reason      no live partner",
        "            -> are they up?",
        "reason      trainer exited with 1",
    ]


def test_privacy_off_is_shouted(tmp_path: Path) -> None:
    with answering(tmp_path / "xpeer.sock", OPEN):
        result = xpeer(tmp_path, "status")
        told = xpeer(tmp_path, "status", "--json")
    assert result.stdout.startswith("PRIVACY OFF")
    assert "epsilon" not in result.stdout
    assert msgspec.json.decode(told.stdout)["privacy_warning"].startswith("PRIVACY OFF")


def test_status_for_programs(tmp_path: Path) -> None:
    with answering(tmp_path / "xpeer.sock", SICK):
        result = xpeer(tmp_path, "status", "--json")
    assert msgspec.json.decode(result.stdout, type=Status) == SICK
    assert msgspec.json.decode(result.stdout)["schema_version"] == 2


@pytest.mark.parametrize(
    ("status", "expected"), [(HEALTHY, ExitCode.OK), (SICK, ExitCode.DEGRADED)]
)
def test_exit_code(tmp_path: Path, status: Status, expected: ExitCode) -> None:
    with answering(tmp_path / "xpeer.sock", status):
        result = xpeer(tmp_path, "status", "--exit-code")
    assert result.exit_code == expected
    assert result.stdout.startswith("health")


@pytest.mark.parametrize(
    "command", ["status", "peers", "pause", "resume", "stop", "leave", "status --watch"]
)
def test_not_running(tmp_path: Path, command: str) -> None:
    result = xpeer(tmp_path, *command.split())
    assert result.exit_code == ExitCode.NOT_RUNNING
    assert result.stdout == ""
    assert re.fullmatch(
        r"xpeer: error: no daemon answers at \S+ - .*xpeer start.*\n", result.stderr
    )
    assert list(tmp_path.iterdir()) == []


def looking(*answers: Status) -> Callable[[], Status]:
    """Answers one after another; then the daemon is gone."""
    left = list(answers)

    def ask() -> Status:
        if not left:
            raise NotRunningError("gone", "start it")
        return left.pop(0)

    return ask


def test_watch_into_a_pipe_prints_a_line_per_look(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NotRunningError):
        node._watch(looking(HEALTHY, SICK, OPEN), 0.0, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines] == [
        "ok",
        "degraded: no live partner; trainer exited with 1",
        "ok",
    ]
    assert "epsilon 3.250/8" in lines[0]
    assert "PRIVACY OFF" in lines[2]
    with pytest.raises(NotRunningError):
        node._watch(looking(HEALTHY, SICK), 0.0, as_json=True)
    lines = capsys.readouterr().out.splitlines()
    assert [msgspec.json.decode(line, type=Status) for line in lines] == [HEALTHY, SICK]


def test_watch_on_a_terminal_redraws(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with pytest.raises(NotRunningError):
        node._watch(looking(HEALTHY, SICK), 0.0, as_json=False)
    out = capsys.readouterr().out
    assert "\x1b[1A" in out  # the cursor goes up: drawn over
    assert "degraded" in out


def test_colour_only_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    lines = render.status_lines(OPEN)
    render.show(lines)
    assert "\x1b" not in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    render.show(lines)
    coloured = capsys.readouterr().out
    assert "\x1b[1;32mok" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == "\n".join(lines) + "\n"
    monkeypatch.setenv("NO_COLOR", "1")
    render.show(lines)
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", capsys.readouterr().out)


def test_peers(tmp_path: Path) -> None:
    with answering(tmp_path / "xpeer.sock"):
        table = xpeer(tmp_path, "peers")
        answer = xpeer(tmp_path, "peers", "--json")
        wide = xpeer(tmp_path, "peers", "--wide")
    header, first, failure, second = table.stdout.splitlines()
    assert header.split() == ["NAME", "ID", "PHASE", "STEP", "DONE", "FAILED", "LAST", "TOOK"]
    assert first.split() == ["beta", OTHER[-8:], "training", "231", "40", "2", "3s", "1.5s"]
    assert failure == "    last failure: timeout"
    assert header.index("PHASE") == first.index("training") == second.index("missed")
    header, first, second = wide.stdout.splitlines()
    assert header.split()[:3] == ["PEER", "NAME", "STATE"]
    assert first.split()[:5] == [OTHER, "beta", "alive", "training", "member"]
    assert header.index("STATE") == first.index("alive") == second.index("missed")
    assert msgspec.json.decode(answer.stdout, type=Peers).peers == HEALTHY.partners


def test_a_ledger_that_went_back_is_seen_and_so_is_when_the_budget_ends() -> None:
    cheat = Partner(peer_id=OTHER, privacy="record, epsilon 8", ledger_went_back="7, 20 before")
    header, row = peer_lines([cheat], wide=True)
    assert row[header.index("LEDGER") :].startswith("WENT BACK")
    assert row[header.index("PRIVACY") :].startswith("record, epsilon 8")
    spent = msgspec.structs.replace(HEALTHY.privacy, ends_unix_s=2e9, documents_elsewhere=3)
    told = msgspec.structs.replace(HEALTHY, partners=[cheat], privacy=spent)
    lines = "\n".join(render.status_lines(told, wide=True))
    assert f"1 went back, may spend a budget twice ({OTHER[-8:]}: 7, 20 before)" in lines
    assert "WENT BACK: 7, 20 before" in peer_lines([cheat])[2]
    since = msgspec.structs.replace(cheat, ledger_caught_up=True)
    assert "WENT BACK" not in peer_lines([since], wide=True)[1]
    told = msgspec.structs.replace(told, partners=[since])
    assert "went back" not in "\n".join(render.status_lines(told))
    assert f"about {render.moment(2e9)}" in lines
    assert "3 were trained on by other homes" in lines
    assert "went back" not in "\n".join(render.status_lines(HEALTHY))


def test_peers_cannot_steer_the_terminal() -> None:
    evil = Partner(peer_id=OTHER, phase="\x1b]0;owned\x07", addresses=["/ip4/\n/tcp/1"])
    for wide in (False, True):
        text = "\n".join(peer_lines([evil], wide=wide))
        assert "\x1b" not in text
        assert text.count("\n") == 1
    sick = msgspec.structs.replace(
        HEALTHY, swarm_name="a\x1b[2J", reasons=[HealthReason(code="x", text="b\nc")]
    )
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", "\n".join(render.status_lines(sick)))
    assert len(render.status_lines(sick)) == 1 + len(render.status_lines(HEALTHY))


def test_pause_and_resume(tmp_path: Path) -> None:
    with answering(tmp_path / "xpeer.sock") as fake:
        for command in ("pause", "resume"):
            result = xpeer(tmp_path, command)
            assert (result.exit_code, result.stdout) == (ExitCode.OK, "")
        fake.paused_as = "joining"
        told = xpeer(tmp_path, "pause").stderr
        assert told == "joining: it pauses once it would begin\n"
        fake.error = LocalError("the trainer is busy", "wait")
        result = xpeer(tmp_path, "pause")
        assert result.exit_code == ExitCode.ERROR
        assert result.stderr == "xpeer: error: the trainer is busy - wait\n"
        assert fake.calls == ["pause", "resume", "pause", "pause"]


@pytest.mark.parametrize("command", ["stop", "leave"])
def test_stop_returns_when_the_daemon_is_gone(tmp_path: Path, command: str) -> None:
    with process(tmp_path / "xpeer.sock") as running:
        result = xpeer(tmp_path, command, "--timeout", "20")
        assert result.exit_code == ExitCode.OK
        assert running.wait(20) == 0


@pytest.mark.parametrize("remove", [True, False])
def test_leaving_says_what_is_left_and_removes_tokens_if_asked(
    tmp_path: Path, remove: bool
) -> None:
    tokens = tmp_path / "cache" / "tokens" / "recipe"
    tokens.mkdir(parents=True)
    (tokens / "a.tokens").write_bytes(bytes(2000))
    (tmp_path / "cache" / "engine.json").write_text("{}")
    (tmp_path / "ledger.sqlite").write_bytes(b"spent")
    with process(tmp_path / "xpeer.sock"):
        result = xpeer(tmp_path, "leave", *(["--remove-tokens"] if remove else []))
    assert result.exit_code == ExitCode.OK
    assert tokens.parent.exists() != remove
    assert (f"removed: {tokens.parent}, 2.0 kB" in result.stderr) == remove
    assert (f"left on the disk: {tokens.parent}, 2.0 kB" in result.stderr) != remove
    assert f"left on the disk: {tmp_path / 'ledger.sqlite'}" in result.stderr
    assert (tmp_path / "cache" / "engine.json").exists()


def test_tokens_can_be_removed_after_a_node_has_left(tmp_path: Path) -> None:
    """Unless somebody uses them, e.g. another start. Without tokens nothing was asked for."""
    tokens = tmp_path / "cache" / "tokens"
    assert xpeer(tmp_path, "leave", "--remove-tokens").exit_code == ExitCode.NOT_RUNNING
    tokens.mkdir(parents=True)
    (tokens / "a.tokens").write_bytes(bytes(2000))
    assert xpeer(tmp_path, "leave").exit_code == ExitCode.NOT_RUNNING
    with HomeLock.acquire(Home(tmp_path)):
        result = xpeer(tmp_path, "leave", "--remove-tokens")
    assert result.exit_code == ExitCode.ERROR
    assert "another daemon" in result.stderr
    assert tokens.exists()
    result = xpeer(tmp_path, "leave", "--remove-tokens")
    assert result.exit_code == ExitCode.OK
    assert "no daemon runs here" in result.stderr
    assert f"removed: {tokens}, 2.0 kB" in result.stderr
    assert not tokens.exists()


def test_leaving_names_all_that_is_left(tmp_path: Path) -> None:
    home = Home(tmp_path)
    parts = [path for path in home.parts() if path.name != SOCKET]  # gone with the daemon
    for path in (home.cache, home.tokens, home.checkpoints, home.own):
        path.mkdir()
    for path in (home.initial_model, home.joining):
        path.mkdir()
        (path / "values").write_bytes(bytes(3000))
    for path in parts:
        if path.suffix != ".toml" and not path.exists():
            path.write_bytes(b"x")
    with process(tmp_path / "xpeer.sock"):
        result = xpeer(tmp_path, "leave")
    assert result.exit_code == ExitCode.OK, result.stderr
    told = [line for line in result.stderr.splitlines() if line.startswith("left on the disk: ")]
    for path in (part for part in parts if part.exists()):
        lines = [line for line in told if re.search(rf"[/ ]{re.escape(path.name)}(,|$)", line)]
        assert lines, path.name
    for path in (home.initial_model, home.joining):
        assert any(line.startswith(f"left on the disk: {path}, 3.0 kB: ") for line in told)


def test_stop_times_out(tmp_path: Path) -> None:
    with process(tmp_path / "xpeer.sock", "deaf") as running:
        result = xpeer(tmp_path, "stop", "--timeout", "0.2")
        assert result.exit_code == ExitCode.TIMED_OUT
        assert f"pid {running.pid}" in result.stderr


def test_the_socket_of_a_service(tmp_path: Path) -> None:
    """An operator outside the service's folder names its socket only."""
    with answering(tmp_path / "run.sock"):
        env = {
            "XPEER_DAEMON_SOCKET": str(tmp_path / "run.sock"),
            "XPEER_HOME": str(tmp_path / "no"),
        }
        result = CliRunner(env=env).invoke(main, ["status"])
    assert result.exit_code == ExitCode.OK
