"""Many peers in one process: real text, real mixing, matching and codec code, a simulated clock.

    corpora   one kind of text per peer, collected from this machine
    model     a byte-level Llama for N peers at once
    peers     their parameters, moments, samples and steps
    links     how long steps and transfers take
    exchange  what peers send one another and what they merge
    exports   what a peer would export in mid-run
    run       one training run, from a `Run` to its figures

Nothing here opens a socket or reads a clock; the same `Run` gives the same figures.
"""
