"""Aggregation rules between whole daemons: peers train, meet and end at one model."""

from __future__ import annotations

import pytest

from tests.swarm.test_daemons import LOOPBACK, Swarm, swarm

__all__ = ["swarm"]  # the fixture
pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize(
    ("changes", "joiners"),
    [
        ({"rule": "gradient", "group": 0, "fragments": 1}, "b"),
        ({"rule": "asynchronous", "codec": "bfloat16"}, "b"),
        ({"combiner": "trimmed-mean", "group": 0}, "bc"),  # of two it leaves nothing
    ],
    ids=["gradient", "asynchronous", "trimmed-mean"],
)
def test_peers_end_at_one_model(swarm: Swarm, changes: dict[str, object], joiners: str):
    fields = {f"round__{name}": value for name, value in changes.items()}
    swarm.bootstrap(swarm.found("a", end__steps=20, **fields))
    all_there = {"XPEER_TRAINING_MIN_PEERS": str(len(joiners))}
    swarm.start("a", "--bootstrap", swarm.seed, **all_there)
    for name in joiners:
        swarm.join("a", name, **all_there)
    for name in f"a{joiners}":
        ended = swarm.until(name, lambda s: s.state == "finished", 100)
        assert ended.progress.step == 20
        assert ended.progress.merges >= 6
        assert ended.trainer_restarts == 0
        assert ended.progress.consensus_distance is not None
        assert ended.progress.consensus_distance < 0.05
        assert 0 < ended.privacy.epsilon_spent <= ended.privacy.epsilon_target


def test_members_share_a_corpus_by_declared_speed(swarm: Swarm):
    corpus = swarm.shard("corpus")
    fields = {"end__steps": 10, "shared_corpus__name": "corpus", "round__slot_s": 0.2}
    swarm.bootstrap(swarm.found("a", **fields))
    shared = {"XPEER_TRAINING_MIN_PEERS": "1", "XPEER_DATA_CORPUS": corpus}
    (swarm.home("a").path / "config.toml").unlink()  # it names a shard
    swarm.start("a", "--bootstrap", swarm.seed, "--listen", LOOPBACK, XPEER_TRAINING_SPEED="1",
                **shared)  # fmt: skip
    token = swarm.token_for("a", "b")
    swarm.start("b", "--join", token, "--listen", LOOPBACK, XPEER_TRAINING_SPEED="3", **shared)
    ends = [swarm.until(name, lambda s: s.state == "finished", 100) for name in "ab"]
    parts = [status.corpus for status in ends]
    assert all(part is not None for part in parts)
    slow, fast = [part for part in parts if part is not None]
    assert (slow.weight, fast.weight) == (0.25, 0.75)
    assert slow.units + fast.units == slow.units_total == fast.units_total
    assert slow.documents + fast.documents == slow.documents_total
    assert slow.tokens < fast.tokens
    assert all(status.progress.step == 10 for status in ends)
