from __future__ import annotations

import gc

import pytest

from xpeer import uncollected


@pytest.fixture
def thawed() -> object:
    yield
    gc.unfreeze()


@pytest.mark.parametrize("enabled", [True, False])
def test_imports_are_not_walked_through_and_the_collector_is_as_before(
    thawed: object, enabled: bool
) -> None:
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ImportError), uncollected.imports():
            assert not gc.isenabled()
            made: list[list[int]] = [[] for _ in range(1000)]
            raise ImportError
        assert gc.isenabled() is enabled
        assert gc.get_freeze_count() >= len(made)
    finally:
        (gc.enable if before else gc.disable)()
