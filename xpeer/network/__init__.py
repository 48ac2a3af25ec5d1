"""Bytes between members: libp2p, DHT, membership, links, exchanges.

No other package imports hivemind, but for its clock.
"""
