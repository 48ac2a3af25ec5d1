"""Multiaddresses that people write: host names."""

from __future__ import annotations

import pytest

from xpeer.errors import ConfigError
from xpeer.network.multiaddress import check_announce


@pytest.mark.parametrize(
    "name", ["localhost", "node-1.example.org", "node-1.example.org.", "_srv.example", "a" * 63]
)
def test_host_names(name: str):
    address = f"/dns4/{name}/tcp/4001"
    assert check_announce("network.announce", address) == address


@pytest.mark.parametrize(
    "name",
    ["", ".", "a..b", "-a", "a.-b", "a" * 64, "a." * 127, "a" * 200 + "!", "a-" * 100 + "!", "ä"],
    ids=lambda name: name[:6] or "empty",
)
def test_what_is_no_host_name_is_refused_at_once(name: str):
    """A name of 200 letters and a `!` once took longer than the universe has."""
    with pytest.raises(ConfigError, match="is not /ip4/ADDRESS/tcp/PORT"):
        check_announce("network.announce", f"/dns4/{name}/tcp/4001")
