"""Bytes between members: libp2p, DHT, membership, links, exchanges.

No other package imports hivemind, but for its clock.
"""

from xpeer import piecemeal

piecemeal.take("hivemind", "hivemind.dht", "hivemind.utils")
