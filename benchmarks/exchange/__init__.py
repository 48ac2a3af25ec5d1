"""A model averaged by two and four peers: ours, hivemind's averager, and the links alone.

    python -m benchmarks.exchange [--quick]

Every peer is a process of its own with its own sidecar; `hosts` gives them loopback, or network
namespaces joined by shaped links. `__main__` tells all of them to begin at the same moment of the
clock, and takes the time until the last of them has merged.
"""
