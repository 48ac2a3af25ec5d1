from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cases.support import Nodes, running_nodes, write_shard


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_shard(tmp_path / "shard")


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with running_nodes(tmp_path) as found:
        yield found
