"""Multiaddresses that people write: host names."""

from __future__ import annotations

import msgspec
import pytest

from xpeer.errors import ConfigError
from xpeer.network.multiaddress import (
    MAX_ADDRESSES,
    MAX_CHARS,
    MAX_TOTAL_CHARS,
    check_announce,
    check_announced,
)
from xpeer.roster.cards import MAX_CARD_BYTES, MemberCard, MemberRecord


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


def address_of(length: int) -> str:
    label = "a" * 63
    name = ".".join([label] * 4)[: length - len("/dns4//tcp/4001")]
    return f"/dns4/{name}/tcp/4001"


@pytest.mark.parametrize("end", ["", "/p2p/12D3KooW"])
def test_an_address_that_others_would_refuse_is_refused_here(end: str):
    for length in (MAX_CHARS + 1, 260):
        with pytest.raises(ConfigError, match="characters"):
            check_announced("network.announce", [address_of(length) + end])
    check_announced("network.announce", [address_of(MAX_CHARS) + end])


def test_addresses_that_fit_into_no_card_together_are_refused():
    with pytest.raises(ConfigError, match="first 8 addresses"):
        check_announced("network.announce", [address_of(200)] * 9)
    check_announced("network.announce", [address_of(160)] * 20)  # only eight are announced


def test_what_is_accepted_fits_into_every_card():
    peer = "12D3KooW" + "a" * 44
    room = MAX_TOTAL_CHARS // MAX_ADDRESSES
    for lengths in ([room] * MAX_ADDRESSES, [MAX_CHARS] * 5):
        addresses = [address_of(length) for length in lengths]
        check_announced("network.announce", addresses)
        named = [f"{address}/p2p/{peer}" for address in addresses]
        record = MemberRecord(peer, named, "infrastructure", "p" * 20, 1e9, 1 << 40, "z" * 32)
        body = msgspec.msgpack.encode(MemberCard(record, (1 << 48) - 1, 1e12, 300.0, bytes(16)))
        assert len(body) <= MAX_CARD_BYTES
        assert msgspec.msgpack.decode(body, type=MemberCard).record == record
