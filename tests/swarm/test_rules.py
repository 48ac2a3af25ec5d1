"""Aggregation rules between whole daemons: three peers train, meet and end at one model."""

from __future__ import annotations

import pytest

from tests.swarm.test_daemons import Swarm, swarm

__all__ = ["swarm"]  # the fixture
pytestmark = pytest.mark.timeout(150)


@pytest.mark.parametrize(
    "changes",
    [
        {"rule": "gradient", "group": 0, "fragments": 1},
        {"rule": "asynchronous"},
    ],
    ids=lambda changes: changes["rule"],
)
def test_three_peers_end_at_one_model(swarm: Swarm, changes: dict[str, object]):
    fields = {f"round__{name}": value for name, value in changes.items()}
    swarm.bootstrap(swarm.found("a", end__steps=20, **fields))
    all_there = {"XPEER_TRAINING_MIN_PEERS": "2"}
    swarm.start("a", "--bootstrap", swarm.seed, **all_there)
    for name in "bc":
        swarm.join("a", name, **all_there)
    for name in "abc":
        ended = swarm.until(name, lambda s: s.state == "finished", 100)
        assert ended.progress.step == 20
        assert ended.progress.merges >= 6
        assert ended.trainer_restarts == 0
        assert ended.progress.consensus_distance is not None
        assert ended.progress.consensus_distance < 0.05
        assert 0 < ended.privacy.epsilon_spent <= ended.privacy.epsilon_target
