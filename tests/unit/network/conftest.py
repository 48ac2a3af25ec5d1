"""For tests of two parties: who they are."""

from __future__ import annotations

import pytest

from xpeer.identity import Identity


@pytest.fixture
def identities() -> tuple[Identity, Identity]:
    """The one with the lower PeerID first."""
    low, high = sorted((Identity.generate(), Identity.generate()), key=lambda i: i.peer_id)
    return low, high
