"""Own steps on the swarm's model, against a peer alone, at equal epsilon."""
