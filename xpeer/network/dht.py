"""The DHT's records: each is signed by its owner, a member, and bounded in size and lifetime.

Every node checks the records that it stores or returns, also a bootstrap node. A record carries its
owner's credential, and the swarm's fingerprint is enough to verify that. Contents are encrypted
with the swarm key and lie under a keyed hash (see `roster`): a node without the key can't read what
it stores.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Collection
from typing import Any

import msgspec
from google.protobuf.message import DecodeError  # type: ignore[import-untyped] # no stubs
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

from xpeer.errors import NotAuthorisedError, PeerError, Reason
from xpeer.identity import Domain, Identity, verify
from xpeer.leaves import Public, seen_by
from xpeer.network.membership.certificates import Membership
from xpeer.network.p2p import GatedP2P
from xpeer.network.seeds import Answer

MAX_VALUE_BYTES = 4096
MAX_TTL_S = 1200.0
MAX_RECORDS = 4096
MAX_KEYS_OF_OWNER = 8
"""An honest member needs one key. One that used all keys would push out the others' records."""
MAX_OWNERS = 4096
REPLICAS = 5
NEIGHBOURS = 8
"""Kademlia's k, as in BitTorrent (BEP 5). A search asks k nodes, and each names up to k others.
hivemind's 20 costs six times the bytes, and finds nothing more in swarms of hundreds."""
CALL_TIMEOUT_S = 3.0
_Answer = tuple[ValueWithExpiration[Any] | None, dict[DHTID, PeerID]]


@seen_by("anybody", "sealed")
class SignedValue(Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A record's value as it is stored."""

    payload: Public[bytes]
    credential: Public[bytes]
    signature: Public[bytes]


class OwnerSigned(RecordValidatorBase):
    """Decides which records may exist. hivemind calls it for each record.

    Args:
        membership: says who may own records.
        identity: signs our records; None on a node that only stores those of others.

    Attributes:
        rejected: records that were refused so far.
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
        # Any field may hold whatever a stranger put into its msgpack, of any type.
        expiration = record.expiration_time
        if not isinstance(record.value, bytes) or len(record.value) > MAX_VALUE_BYTES:
            return False
        if not isinstance(expiration, float | int):
            return False
        if not expiration <= get_dht_time() + MAX_TTL_S:  # NaN is refused as well
            return False
        try:
            owner = msgspec.msgpack.decode(record.subkey, type=str)
            value = msgspec.msgpack.decode(record.value, type=SignedValue)
            # hivemind decodes the payload unguarded: an error there would hang every reader.
            msgspec.msgpack.decode(value.payload, type=bytes)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return False
        # Check the owner's signature first: we must not learn a credential from anybody else.
        if not verify(owner, Domain.DHT_RECORD, _statement(record, value), value.signature):
            return False
        try:
            self._membership.admit(owner, value.credential)
        except NotAuthorisedError:
            return False
        return self._membership.allows(owner, "observer") and self._has_room(owner, record)

    def _has_room(self, owner: str, record: DHTRecord) -> bool:
        """Whether this is the owner's latest record under its key, and the owner uses few keys.

        hivemind's storage must not see an earlier record again: when that expires, the later one
        goes with it.
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
        """Our value, signed and with our credential."""
        own = self._membership.own
        if self._identity is None or own is None:
            return bytes(record.value)
        unsigned = SignedValue(record.value, own.to_bytes(), b"")
        signature = self._identity.sign(Domain.DHT_RECORD, _statement(record, unsigned))
        return msgspec.msgpack.encode(SignedValue(record.value, unsigned.credential, signature))

    def strip_value(self, record: DHTRecord) -> bytes:
        """The owner's value, without signature and credential."""
        return msgspec.msgpack.decode(record.value, type=SignedValue).payload

    @property
    def priority(self) -> int:
        """Rank among validators. It has no effect: there is no other."""
        return 10


def _statement(record: DHTRecord, value: SignedValue) -> bytes:
    return msgspec.msgpack.encode(
        [record.key, record.subkey, value.payload, record.expiration_time]
    )


async def start_node(p2p: GatedP2P, validator: OwnerSigned) -> DHTNode:
    """Start a DHT node in this process. It has no neighbours yet."""
    node = await DHTNode.create(
        p2p=p2p,
        node_id=DHTID.generate(p2p.peer_id.to_base58()),  # `ping` expects this one
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


async def ping(node: DHTNode, peer: PeerID) -> Answer:
    """Exchange a ping with a node, so that each puts the other into its routing table.

    hivemind's own ping hides errors and the other node's clock.

    Returns:
        Seconds by which its clock is ahead of ours, 0 if the difference is smaller than the time
        that the call took; and whether it could call us.

    Raises:
        PeerError: MALFORMED: it answered something else than a ping of its own.
        Exception: the call's own error, of any type.
    """
    protocol, met = node.protocol, DHTID.generate(peer.to_base58())
    request = dht_pb2.PingRequest(peer=protocol.node_info, validate=True)
    sent: float = get_dht_time()
    try:
        answer = await protocol.get_stub(peer).rpc_ping(request, timeout=protocol.wait_timeout)
        if answer.peer.node_id != met.to_bytes():
            raise PeerError(Reason.MALFORMED, "a ping's answer names another DHT node")
    except Exception as e:
        await protocol.update_routing_table(None, peer, responded=False)
        if isinstance(e, DecodeError):
            raise PeerError(Reason.MALFORMED, "a ping's answer can't be read") from e
        raise
    theirs, now = float(answer.dht_time), float(get_dht_time())
    await protocol.update_routing_table(met, peer, responded=True)
    ahead_s = theirs - min(max(theirs, sent), now) if math.isfinite(theirs) else 0.0
    return Answer(ahead_s, bool(answer.available))


def harden(protocol: DHTProtocol, validator: OwnerSigned) -> None:
    """Make hivemind use only the valid records of another node's answer.

    Three faults of hivemind are mended here. One bad record in a key's dictionary makes it refuse
    all: an expired certificate or a slow clock would hide every member of that key. It believes the
    expiration that an answer claims, and a large one ends the search. An error while it merges
    answers hangs the search for ever.
    """
    find = protocol.call_find

    async def call_find(peer: PeerID, keys: Collection[DHTID]) -> dict[DHTID, _Answer] | None:
        answers = await find(peer, keys)
        if answers is None:
            return None
        return {
            key: (_dictionary(item), dict(itertools.islice(nearest.items(), protocol.bucket_size)))
            for key, (item, nearest) in answers.items()
        }

    protocol.call_find = call_find
    protocol._validate_dictionary = lambda key, records: keep_valid(validator, key, records)


def keep_valid(validator: OwnerSigned, key: bytes, records: DictionaryDHTValue) -> bool:
    """Drop a key's invalid records and keep the others. Always True: the key itself is valid."""
    records.maxsize = math.inf
    for subkey, (value, expiration_time) in list(records.data.items()):
        named = msgspec.msgpack.encode(subkey) if isinstance(subkey, str) else b""
        if not validator.validate(DHTRecord(key, named, value, expiration_time)):
            del records[subkey]
    return True


def _dictionary(item: ValueWithExpiration[Any] | None) -> ValueWithExpiration[Any] | None:
    """The answer with its latest record's expiration; None unless it is a dictionary of records."""
    if item is None or not isinstance(item.value, DictionaryDHTValue) or not item.value.data:
        return None
    latest = max(record.expiration_time for record in item.value.data.values())
    return ValueWithExpiration(item.value, latest)
