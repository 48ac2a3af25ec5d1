"""A joiner whose donor is killed in the middle of the transfer, and that is then killed itself."""

from __future__ import annotations

import json
import os
import re
import signal
from typing import Any

import pytest

from tests.swarm.test_daemons import LOOPBACK, Swarm, said, swarm
from xpeer.status import Status
from xpeer.wire.messages import PIECE_BYTES

__all__ = ["swarm"]
pytestmark = pytest.mark.timeout(900)

PIECES = 12
MODEL: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 128,
    "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 23_000, "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}  # fmt: skip
"""11.6 pieces, nearly all of them the embedding's: steps are cheap."""
CALM = {
    "XPEER_TRAINING_THROTTLE": "0.05",
    "XPEER_TRAINING_COMPILE_CODEC": "0",
    "XPEER_NETWORK_DONATE_MBIT_S": "8",  # a piece every second from each donor
}
WINDOW_STEPS = 400
"""What several donors give is put together, since they are four windows apart at most. One of them
joined the other, and is behind by the steps of a transfer."""
WAIT_S = 240.0
NEAR = 0.3


def pieces_here(status: Status) -> int:
    return status.fetching.bytes_done // PIECE_BYTES if status.fetching is not None else 0


def found(swarm: Swarm) -> None:
    config = swarm.root / "config.json"
    config.write_text(json.dumps(MODEL))
    fields = {
        "optimiser.sequence_tokens": 16, "optimiser.batch_records": 2, "round.slot_s": 1,
        "round.window_steps": WINDOW_STEPS, "round.fragments": 80, "round.deadline_s": 20,
        "optimiser.learning_rate": 2e-6, "end.steps": 1_000_000,
    }  # fmt: skip
    options = (f"--set={name}={value}" for name, value in fields.items())
    said(
        "init", "--home", swarm.home("a").path, "--swarm", "test", "--privacy", "off",
        "--model-config", config, "--tokenizer", "bytes", "--shard", swarm.shard("a"),
        "--listen", LOOPBACK, "--skip-trial", *options,
    )  # fmt: skip


def gives(status: Status) -> list[str]:
    return status.fetching.donors if status.fetching is not None else []


def in_step(status: Status) -> bool:
    """Whether it is near to its partner, as its merges found. Another start's is 1.4 away."""
    progress = status.progress
    far = progress.consensus_distance
    return progress.merges >= 2 and far is not None and far < NEAR


def test_a_donor_is_killed_and_then_the_joiner(swarm: Swarm) -> None:
    """What had come is not fetched again, and the joiner ends in step with the swarm."""
    found(swarm)
    swarm.start("a", **CALM)
    swarm.seed = swarm.until("a", lambda s: bool(s.addresses), WAIT_S).addresses[0]
    swarm.join("a", "b", **CALM)
    doomed = swarm.until("b", lambda s: s.state == "training", WAIT_S)

    swarm.join("a", "c", **CALM)
    begun = swarm.until("c", lambda s: pieces_here(s) >= 2 and doomed.peer_id in gives(s), WAIT_S)
    os.kill(doomed.pid, signal.SIGKILL)
    middle = swarm.until(
        "c",
        lambda s: pieces_here(s) >= pieces_here(begun) + 2 and doomed.peer_id not in gives(s),
        WAIT_S,
    )
    assert pieces_here(middle) < PIECES - 1
    os.kill(middle.pid, signal.SIGKILL)

    swarm.start(
        "c", "--bootstrap", swarm.seed, "--listen", LOOPBACK, "--shard", swarm.shard("c"), **CALM
    )
    swarm.until("c", lambda s: s.state == "training" and s.exchanges_done >= 1, WAIT_S)
    events = json.loads(said("events", "--home", swarm.home("c").path, "--json"))["events"]
    (detail,) = [event["detail"] for event in events if event["kind"] == "took-over"]
    match = re.search(r"(\d+) pieces, (\d+) fetched since the start", detail)
    assert match is not None, detail
    assert int(match[1]) == PIECES
    assert 0 < int(match[2]) <= PIECES - pieces_here(middle)
    swarm.until("c", in_step, WAIT_S)
