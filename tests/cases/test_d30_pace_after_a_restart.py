"""D30: the trainer was killed with a checkpoint 340 steps old; the pace went on counting from its
last exchange, so that none was due until the new one had passed that step.
"""

from __future__ import annotations

import pytest

from tests.unit.gossip.rigs import OTHER, Rig


async def test_a_trainer_that_resumes_further_back_exchanges_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(monkeypatch)
    trainer = rig.host.trainer
    assert trainer is not None
    trainer.step = 400
    await rig.slot()
    assert rig.merged == [OTHER]
    trainer.epoch, trainer.step, trainer.resumed_step = 8, 60, 60  # the next trainer
    await rig.slot()
    assert rig.merged == [OTHER] * 2
