"""For every test: what it charges to documents is not counted on this machine; and who runs it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.slow import SLOW, without_parameters
from tests.spread import Scopes

# Of the values that a test tries none has to be quick: other load would fail it.
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def hangups_end_processes() -> Iterator[None]:
    """As by default, for what the tests start: under nohup it would be ignored there, too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(autouse=True)
def register_of_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "xpeer-privacy"
    monkeypatch.setenv("XPEER_PRIVACY_REGISTER", str(folder))
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make quick` leaves out what took long when it was last measured (`tests/slow.py`)."""
    slow = set(SLOW.read_text().split())
    for item in items:
        if without_parameters(item.nodeid) in slow:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Callable[..., None]) -> object:
    """Whole swarms on half of the workers; see `spread.Scopes`."""
    from xdist.scheduler import LoadScopeScheduling

    scopes: list[Scopes] = []

    class Scheduler(LoadScopeScheduling):  # type: ignore[misc] # untyped
        def _split_scope(self, nodeid: str) -> str:
            if not scopes:
                scopes.append(Scopes(len(self.nodes)))
            return scopes[0].of(nodeid)

    return Scheduler(config, log)
