"""What a trainer makes of a masked group's sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.unit.training.loops import NUM_PARAMS, trainer_with, unbounded
from xpeer.errors import PeerError
from xpeer.forms import Form
from xpeer.manifest.round import Round
from xpeer.mixing.screen import CLIP_AFTER
from xpeer.training.loop import TrainingLoop
from xpeer.update import Checked, PeerUpdate
from xpeer.wire import codec as wire_codec
from xpeer.wire.fixedpoint import add_into, rings


def masked_trainers(k: int, **changes: Any) -> list[TrainingLoop]:
    rules = Round(window_steps=4, fragments=1, masks=True, group=3, **changes)
    return [trainer_with(seed=seed, round=rules) for seed in range(k)]


def masked_verify(peers: list[TrainingLoop]) -> list[Checked]:
    """Everybody's sum, as the group would make it without masks."""
    updates = []
    for peer in peers:
        private = peer.snapshot(1, 0, averaging=True)
        updates.append(peer.exchanges.compress(1, private))
    form = updates[0].form
    total = bytearray(updates[0].payload)
    for update in updates[1:]:
        add_into(rings(form, total), rings(form, update.payload))
    parties = len(peers)
    return [
        peer.exchanges.verify(1, 0, PeerUpdate(memoryview(bytearray(total)), form, "", parties))
        for peer in peers
    ]


def test_a_masked_groups_sum_brings_all_to_their_mean_and_consolidation_sees_it_alone() -> None:
    peers = masked_trainers(3, mask_bits=32)
    for peer in peers:
        unbounded(peer)
    before = torch.stack([peer.parameters.read() for peer in peers])
    for found in masked_verify(peers):
        assert 0.5 < found.distance < 3
    for number, peer in enumerate(peers):
        peer.exchanges.resolve(1, {0: 2 / 3})
        peer.merge(1)
        assert torch.allclose(peer.parameters.read(), before.mean(0), atol=2e-4)
        (kept,) = peer.exchanges.consolidation.now()[0]
        shown = wire_codec.decode(kept.form, wire_codec.view(kept.payload))
        others = [other for other in range(3) if other != number]
        assert torch.allclose(shown[:NUM_PARAMS], before[others].mean(0), atol=0.05)


def test_a_masked_groups_difference_is_clipped_as_a_whole() -> None:
    peers = masked_trainers(3, mask_bits=32)
    before = [peer.parameters.read() for peer in peers]
    for peer in peers:
        for _ in range(CLIP_AFTER):
            peer.exchanges._limits[peer.exchanges._averaging][0].accepted(0.5)
    masked_verify(peers)
    for peer, values in zip(peers, before, strict=True):
        peer.exchanges.resolve(1, {0: 2 / 3})
        assert peer.exchanges.merge(1, 0) == 1
        moved = float((peer.parameters.read() - values).norm())
        assert moved == pytest.approx(2 / 3 * 4 * 0.5, rel=1e-3)
        assert not peer.exchanges.consolidation.now()


def common_of(peer: TrainingLoop) -> torch.Tensor:
    out = torch.empty(NUM_PARAMS)
    peer.show(out)
    return out


def test_a_joiner_is_given_means_of_groups_and_nothing_of_our_own() -> None:
    peers = masked_trainers(3, mask_bits=32)
    start = [peer.parameters.read() for peer in peers]
    for peer, given in zip(peers, start, strict=True):
        unbounded(peer)
        peer.parameters.write(given + 0.01)  # a step of our own: nobody has seen it
        assert torch.equal(common_of(peer), given)
    masked_verify(peers)
    for peer in peers:
        peer.exchanges.resolve(1, {0: 2 / 3})
        peer.merge(1)
        merged = peer.parameters.read()
        peer.parameters.write(merged + 0.01)
        assert torch.equal(peer.parameters.read(), merged + 0.01)
    shown = [common_of(peer) for peer in peers]
    mean = torch.stack(start).mean(0) + 0.01
    for each in shown:
        assert torch.allclose(each, mean, atol=1e-4)
        # the mean of what was sent, on the grid of a third of a step: no digit of anybody's own
        thirds = each.double() * 3 * 2**14
        assert float((thirds - thirds.round()).abs().max()) < 0.02
    assert all(torch.allclose(each, shown[0], atol=1e-6) for each in shown)

    (resumed,) = masked_trainers(1, mask_bits=32)  # with its own parameters, which nobody knows
    resumed.exchanges.restore(peers[0].exchanges.state())
    assert torch.equal(common_of(resumed), shown[0])


@pytest.mark.parametrize(("parties", "reason"), [(1, "malformed"), (9, "malformed")])
def test_a_sum_over_no_group_is_refused(parties: int, reason: str) -> None:
    (peer,) = masked_trainers(1)
    update = peer.exchanges.compress(1, peer.snapshot(1, 0, averaging=True))
    payload = memoryview(bytearray(update.payload))
    with pytest.raises(PeerError, match=reason):
        peer.exchanges.verify(1, 0, PeerUpdate(payload, update.form, "", parties))
    with pytest.raises(PeerError, match="wrong-codec"):
        int8 = Form("int8", update.form.num_values)
        peer.exchanges.verify(1, 0, PeerUpdate(payload, int8, "", 3))
