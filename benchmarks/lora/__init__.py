"""Adapters in a swarm: both factors trained, or B alone."""
