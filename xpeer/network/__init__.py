"""The swarm: libp2p, DHT, membership, matching, exchanges. Only here is hivemind imported."""
