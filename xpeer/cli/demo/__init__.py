"""`xpeer demo`: a real swarm of daemons on this machine, on text that is already here."""
