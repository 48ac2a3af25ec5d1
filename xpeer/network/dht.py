"""The DHT's records: signed by their owner, a member; bounded in size and lifetime.

Whoever stores or returns a record checks it, the bootstrap node included: a record carries its
owner's credential, which the swarm's fingerprint is enough to verify. What a record says is
encrypted with the swarm key, and lies under a keyed hash (see `roster`), so that a node without the
key stores what it can't read.
"""

from __future__ import annotations

import logging

import msgspec
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.utils import get_dht_time
from msgspec import Struct

from xpeer.errors import NotAuthorisedError
from xpeer.identity import Domain, Identity, verify
from xpeer.network.membership import Membership
from xpeer.network.p2p import GatedP2P

log = logging.getLogger("xpeer.network")

MAX_VALUE_BYTES = 4096
MAX_TTL_S = 300.0
MAX_RECORDS = 4096
REPLICAS = 5
CALL_TIMEOUT_S = 3.0


class SignedValue(Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A record's value as it is stored."""

    payload: bytes
    credential: bytes
    signature: bytes


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

    def validate(self, record: DHTRecord) -> bool:
        """Whether the record's owner is a member and signed exactly this."""
        valid = self._valid(record)
        self.rejected += not valid
        return valid

    def _valid(self, record: DHTRecord) -> bool:
        if len(record.value) > MAX_VALUE_BYTES:
            return False
        if not record.expiration_time <= get_dht_time() + MAX_TTL_S:  # NaN is refused as well
            return False
        try:
            owner = msgspec.msgpack.decode(record.subkey, type=str)
            value = msgspec.msgpack.decode(record.value, type=SignedValue)
            self._membership.admit(owner, value.credential)
        except (msgspec.MsgspecError, UnicodeDecodeError, NotAuthorisedError):
            return False
        if not self._membership.allows(owner, "observer"):
            return False
        return verify(owner, Domain.DHT_RECORD, _statement(record, value), value.signature)

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
        num_replicas=REPLICAS,
        wait_timeout=CALL_TIMEOUT_S,
        cache_locally=False,
        cache_on_store=False,
        cache_nearest=0,
        cache_size=MAX_RECORDS,
        strict=False,
    )
    node.protocol.storage.maxsize = MAX_RECORDS
    return node
