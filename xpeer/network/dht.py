"""The DHT's records: signed by their owner, a member; bounded in size and lifetime.

Whoever stores or returns a record checks it, the bootstrap node included: a record carries its
owner's credential, which the swarm's fingerprint is enough to verify. What a record says is
encrypted with the swarm key, and lies under a keyed hash (see `roster`), so that a node without the
key stores what it can't read.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import OrderedDict
from collections.abc import Collection
from typing import Any

import msgspec
from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2
from hivemind.utils import get_dht_time
from hivemind.utils.timed_storage import ValueWithExpiration
from msgspec import Struct

from xpeer.errors import NotAuthorisedError
from xpeer.identity import Domain, Identity, verify
from xpeer.leaves import Public, seen_by
from xpeer.network.membership.certificates import Membership
from xpeer.network.p2p import GatedP2P

log = logging.getLogger("xpeer.network")

MAX_VALUE_BYTES = 4096
MAX_TTL_S = 1200.0
MAX_RECORDS = 4096
MAX_KEYS_OF_OWNER = 8
"""Members need one key; whoever used them all would push the others' records out."""
MAX_OWNERS = 4096
REPLICAS = 5
NEIGHBOURS = 8
"""Kademlia's k, as in BitTorrent's (BEP 5): a search asks as many nodes, each answers with as many.
hivemind's 20 costs six times the bytes, and finds nothing more in swarms of hundreds."""
CALL_TIMEOUT_S = 3.0
_Found = tuple[ValueWithExpiration[Any] | None, dict[DHTID, PeerID]]


@seen_by("anybody", "sealed")
class SignedValue(Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A record's value as it is stored."""

    payload: Public[bytes]
    credential: Public[bytes]
    signature: Public[bytes]


class OwnerSigned(RecordValidatorBase):
    """hivemind's hook: which records may exist at all.

    Args:
        membership: who may own records.
        identity: signs ours; None on a node that stores only others' records.
    """

    def __init__(self, membership: Membership, identity: Identity | None) -> None:
        self._membership = membership
        self._identity = identity
        self.rejected = 0
        self._keys_of: OrderedDict[str, dict[bytes, float]] = OrderedDict()

    def validate(self, record: DHTRecord) -> bool:
        """Whether the record's owner is a member and signed exactly this."""
        valid = self._valid(record)
        self.rejected += not valid
        return valid

    def _valid(self, record: DHTRecord) -> bool:
        expiration = record.expiration_time  # as all of it: whatever a stranger's msgpack holds
        if not isinstance(record.value, bytes) or len(record.value) > MAX_VALUE_BYTES:
            return False
        if not isinstance(expiration, float | int):
            return False
        if not expiration <= get_dht_time() + MAX_TTL_S:  # NaN is refused as well
            return False
        try:
            owner = msgspec.msgpack.decode(record.subkey, type=str)
            value = msgspec.msgpack.decode(record.value, type=SignedValue)
            # hivemind decodes it without a net: a failure there would hang every reader for ever
            msgspec.msgpack.decode(value.payload, type=bytes)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return False
        # first the owner's word: a credential that somebody else stored must teach us nothing
        if not verify(owner, Domain.DHT_RECORD, _statement(record, value), value.signature):
            return False
        try:
            self._membership.admit(owner, value.credential)
        except NotAuthorisedError:
            return False
        return self._membership.allows(owner, "observer") and self._has_room(owner, record)

    def _has_room(self, owner: str, record: DHTRecord) -> bool:
        """Whether this is the owner's latest record, and it has not spread over too many keys.

        An earlier record that is stored again would, in hivemind's storage, take the later one
        along when it expires.
        """
        now = get_dht_time()
        keys = {k: end for k, end in self._keys_of.pop(owner, {}).items() if end > now}
        if record.key in keys:
            room = bool(record.expiration_time >= keys[record.key])
        else:
            room = len(keys) < MAX_KEYS_OF_OWNER
        if room:
            keys[record.key] = record.expiration_time
        self._keys_of[owner] = keys
        if len(self._keys_of) > MAX_OWNERS:
            self._keys_of.popitem(last=False)
        return room

    def sign_value(self, record: DHTRecord) -> bytes:
        """Make our value storable."""
        own = self._membership.own
        if self._identity is None or own is None:
            return bytes(record.value)
        unsigned = SignedValue(record.value, own.to_bytes(), b"")
        signature = self._identity.sign(Domain.DHT_RECORD, _statement(record, unsigned))
        return msgspec.msgpack.encode(SignedValue(record.value, unsigned.credential, signature))

    def strip_value(self, record: DHTRecord) -> bytes:
        """What the owner stored."""
        return msgspec.msgpack.decode(record.value, type=SignedValue).payload

    @property
    def priority(self) -> int:
        """Order among validators; we are alone."""
        return 10


def _statement(record: DHTRecord, value: SignedValue) -> bytes:
    return msgspec.msgpack.encode(
        [record.key, record.subkey, value.payload, record.expiration_time]
    )


async def start_node(p2p: GatedP2P, validator: OwnerSigned) -> DHTNode:
    """A DHT node in this process, with no neighbours yet."""
    node = await DHTNode.create(
        p2p=p2p,
        node_id=DHTID.generate(p2p.peer_id.to_base58()),
        record_validator=validator,
        bucket_size=NEIGHBOURS,
        num_replicas=REPLICAS,
        wait_timeout=CALL_TIMEOUT_S,
        cache_locally=False,
        cache_on_store=False,
        cache_nearest=0,
        cache_size=MAX_RECORDS,
        strict=False,
    )
    node.protocol.storage.maxsize = MAX_RECORDS
    harden(node.protocol, validator)
    return node


async def ping(node: DHTNode, peer: PeerID) -> float:
    """Meet a node, and have it meet us.

    hivemind's own ping keeps to itself why there was no answer, and what the time is there.

    Returns:
        By how many seconds its clock is ahead of ours; within the time that the answer took, 0.

    Raises:
        Exception: whatever the call ended with.
    """
    protocol = node.protocol
    request = dht_pb2.PingRequest(peer=protocol.node_info, validate=True)
    sent: float = get_dht_time()
    try:
        answer = await protocol.get_stub(peer).rpc_ping(request, timeout=protocol.wait_timeout)
        met = DHTID.from_bytes(answer.peer.node_id)
    except Exception:
        await protocol.update_routing_table(None, peer, responded=False)
        raise
    theirs, now = float(answer.dht_time), float(get_dht_time())
    await protocol.update_routing_table(met, peer, responded=True)
    if not answer.available:
        log.info("%s can't call us back: is our port open?", peer)
    return theirs - min(max(theirs, sent), now) if math.isfinite(theirs) else 0.0


def harden(protocol: DHTProtocol, validator: OwnerSigned) -> None:
    """Take from another node's answer what is valid, and nothing else.

    hivemind refuses a key's whole dictionary for one bad record in it: one expired certificate or
    slow clock would hide every member of that key. It believes the answer's own expiration, which
    ends the search when it is large; and an error in what it merges hangs the search for ever.
    """
    find = protocol.call_find

    async def call_find(peer: PeerID, keys: Collection[DHTID]) -> dict[DHTID, _Found] | None:
        found = await find(peer, keys)
        if found is None:
            return None
        return {
            key: (_dictionary(item), dict(itertools.islice(nearest.items(), protocol.bucket_size)))
            for key, (item, nearest) in found.items()
        }

    protocol.call_find = call_find
    protocol._validate_dictionary = lambda key, records: keep_valid(validator, key, records)


def keep_valid(validator: OwnerSigned, key: bytes, records: DictionaryDHTValue) -> bool:
    """Drop the records of a key that are not valid, and keep the others."""
    records.maxsize = math.inf
    for subkey, (value, expiration_time) in list(records.data.items()):
        named = msgspec.msgpack.encode(subkey) if isinstance(subkey, str) else b""
        if not validator.validate(DHTRecord(key, named, value, expiration_time)):
            del records[subkey]
    return True


def _dictionary(item: ValueWithExpiration[Any] | None) -> ValueWithExpiration[Any] | None:
    """The answer with the expiration of its latest record; we keep no values but dictionaries."""
    if item is None or not isinstance(item.value, DictionaryDHTValue) or not item.value.data:
        return None
    latest = max(record.expiration_time for record in item.value.data.values())
    return ValueWithExpiration(item.value, latest)
