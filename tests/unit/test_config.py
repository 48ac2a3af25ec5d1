"""Settings: where they come from, in which order, and what is said about wrong ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from xpeer import config, config_sources
from xpeer.config import Home, NodeConfig, Privacy, privacy_register
from xpeer.errors import ConfigError, ExitCode


def write(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text)
    return path


def test_no_file_means_defaults(tmp_path: Path) -> None:
    assert config_sources.load(tmp_path / "none.toml", {}) == NodeConfig()


def test_flags_win_over_variables_over_file(tmp_path: Path) -> None:
    path = write(tmp_path, '[training]\nthreads = 1\nspeed = 1.5\n[daemon]\nlog_level = "debug"\n')
    environ = {"XPEER_TRAINING_THREADS": "2", "XPEER_TRAINING_SPEED": "3"}
    made = config_sources.load(path, environ, {"training.threads": 4, "daemon.log_level": None})
    assert (made.training.threads, made.training.speed) == (4, 3.0)
    assert made.daemon.log_level == "debug"


def test_variables_are_typed(tmp_path: Path) -> None:
    made = config_sources.load(
        tmp_path / "none",
        {
            "XPEER_DATA_SHARD": "/a,/b",
            "XPEER_NETWORK_NAT_PORT_MAP": "true",
            "XPEER_DAEMON_EXIT_ON_BUDGET": "0",
            "XPEER_CHECKPOINT_KEEP": "7",
            "XPEER_DAEMON_SOCKET": "/run/x",
            "XPEER_HOME": "/not/a/setting",
            "PATH": "/bin",
        },
    )
    assert made.data.shard == ["/a", "/b"]
    assert made.network.nat_port_map
    assert not made.daemon.exit_on_budget
    assert made.checkpoint.keep == 7
    assert made.daemon.socket == "/run/x"


def test_every_setting_has_a_variable(tmp_path: Path) -> None:
    for section, key, default in config.settings():
        raw = ",".join(default) if isinstance(default, list) else str(default)
        if not raw and f"{section}.{key}" in config.PATHS:
            continue  # an empty path is an unset variable of somebody's
        made = config_sources.load(tmp_path / "none", {f"XPEER_{section}_{key}".upper(): raw})
        assert getattr(getattr(made, section), key) == default


@pytest.mark.parametrize(
    ("text", "problem", "remedy"),
    [
        ("[netwrok]\n", "netwrok", "did you mean network?"),
        ("[network]\nlisen = []\n", "network.lisen", "did you mean listen?"),
        ("[data]\nshards = []\n", "data.shards", "did you mean shard?"),
        ("[data]\nqqqq = 1\n", "data.qqqq", "valid: "),
        ("threads = 1\n", "threads", ""),
        ("network = 1\n", "network = 1 must be a section", "[network]"),
        ("[training]\nthreads = -1\n", "training.threads", "correct training.threads"),
        ("[training]\nthreads = 1.5\n", "value: 1.5", "training.threads"),
        ('[training]\ndevice = "tpu"\n', "value: 'tpu'", "training.device"),
        ("[training]\nthrottle = 0\n", "training.throttle", ""),
        ("[training]\nthrottle = nan\n", "training.throttle", ""),
        ("[data]\nvalidation_share = 0.5\n", "data.validation_share", ""),
        ("[data]\nshard = [1]\n", "value: 1", "data.shard"),
        ('[data]\nshard = "text"\n', "data.shard", ""),
        ("[checkpoint]\nkeep = 0\n", "checkpoint.keep", ""),
        ('[data]\nshard = ["a"]\ncorpus = ["b"]\n', "data.shard and data.corpus", "keep one"),
        ("[network\n", "not valid TOML", "correct that line"),
        ("a = 1\na = 2\n", "not valid TOML", "correct that line"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, problem: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)) as e:
        config_sources.load(write(tmp_path, text), {})
    assert remedy in e.value.remedy
    assert e.value.exit_code == ExitCode.BAD_CONFIG


@pytest.mark.parametrize(
    ("name", "raw", "problem"),
    [
        ("XPEER_NETWORK_LISEN", "x", "XPEER_NETWORK_LISEN is unknown"),
        ("XPEER_X", "x", "XPEER_X is unknown"),
        ("XPEER_TRAINING_THREADS", "many", "training.threads"),
        ("XPEER_TRAINING_THREADS", "-1", "training.threads"),
        ("XPEER_NETWORK_NAT_PORT_MAP", "maybe", "network.nat_port_map"),
        ("XPEER_DAEMON_LOG_LEVEL", "loud", "daemon.log_level"),
    ],
)
def test_wrong_variables(tmp_path: Path, name: str, raw: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        config_sources.load(tmp_path / "none", {name: raw})


def test_the_nearest_variable_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as e:
        config_sources.load(tmp_path / "none", {"XPEER_NETWORK_LISEN": ""})
    assert e.value.remedy == "did you mean XPEER_NETWORK_LISTEN?"


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "binary", tmp_path):
        with pytest.raises(ConfigError, match="can't be read"):
            config_sources.load(path, {})


@given(st.text(max_size=60))
@hypothesis_settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_settings_or_a_clear_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        config_sources.load(path, {})
    except ConfigError as e:
        assert e.problem


values: Any = st.one_of(
    st.none(), st.booleans(), st.integers(), st.text(max_size=5), st.lists(st.integers())
)


@given(st.sampled_from([f"{s}.{k}" for s, k, _ in config.settings()]), values)
@hypothesis_settings(max_examples=80)
def test_any_value_is_taken_or_named(key: str, value: Any) -> None:
    try:
        config_sources.load(Path("/nonexistent/config.toml"), {}, {key: value})
    except ConfigError as e:
        assert key in e.problem


def test_a_register_is_the_same_folder_from_everywhere(tmp_path: Path) -> None:
    given = NodeConfig(privacy=Privacy(register=str(tmp_path)))
    assert privacy_register(given) == tmp_path
    with pytest.raises(ConfigError, match=r"privacy\.register: reg/x is a relative path"):
        privacy_register(NodeConfig(privacy=Privacy(register="reg/x")))


def test_home_and_its_socket(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    assert home.socket(NodeConfig()) == tmp_path / "home" / "xpeer.sock"
    with pytest.raises(ConfigError, match=r"daemon\.socket"):
        Home(tmp_path / ("x" * 100)).socket(NodeConfig())
    short = config_sources.load(tmp_path / "none", {"XPEER_DAEMON_SOCKET": "/run/xpeer.sock"})
    assert Home(tmp_path / ("x" * 100)).socket(short) == Path("/run/xpeer.sock")
