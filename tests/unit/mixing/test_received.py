"""What a peer shows in mid-run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xpeer.forms import Form
from xpeer.mixing import received
from xpeer.mixing.buffers import Buffers
from xpeer.mixing.fragments import Fragments
from xpeer.mixing.received import PARTNERS, Consolidation, consolidate_, received_payload
from xpeer.training import checkpoint
from xpeer.wire import codec

P = 1000


def randn(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def padded_with_zeros(model: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(model, (0, -P % 64))


def shown_by(model: torch.Tensor, fragments: Fragments, fragment: int) -> received.ReceivedFragment:
    values = fragments.gather(padded_with_zeros(model), fragment)
    payload = codec.encode("int8", values)
    return received_payload(Form("int8", len(values)), payload, slice(0, len(values)), Buffers(4))


def consolidated(model: torch.Tensor, fragments: Fragments, kept: Consolidation) -> torch.Tensor:
    flat = padded_with_zeros(model)
    consolidate_(flat, fragments, kept.now())
    return flat[:P]


@given(partners=st.integers(0, PARTNERS), num_fragments=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_it_is_the_mean_of_own_and_received(partners: int, num_fragments: int, seed: int) -> None:
    fragments = Fragments(P, num_fragments)
    models = [randn(P, seed + i) for i in range(1 + partners)]
    kept = Consolidation(Buffers(4))
    for model in models[1:]:
        for fragment in range(num_fragments):
            kept.merged(fragment, shown_by(model, fragments, fragment))
    found = consolidated(models[0], fragments, kept)
    assert torch.allclose(found, torch.stack(models).mean(dim=0), atol=0.02)


def test_a_fragment_that_nobody_showed_stays_and_old_values_are_forgotten() -> None:
    fragments = Fragments(P, 4)
    own, kept = randn(P, 0), Consolidation(Buffers(4))
    for seed in range(1, 6):
        kept.merged(2, shown_by(randn(P, seed), fragments, 2))
    found = consolidated(own, fragments, kept)
    chosen = fragments.indices(2)
    chosen = chosen[chosen < P]
    expected = (own + randn(P, 4) + randn(P, 5)) / 3
    assert torch.allclose(found[chosen], expected[chosen], atol=0.02)
    others = torch.ones(P, dtype=torch.bool)
    others[chosen] = False
    assert torch.equal(found[others], own[others])
    kept.begin()
    assert torch.equal(consolidated(own, fragments, kept), own)


@pytest.mark.parametrize("name", codec.NAMES)
def test_any_payload_is_kept_as_values_of_its_own(name: str) -> None:
    """Of two vectors the parameters are kept."""
    sent = randn(512, 1) + 0.01 * randn(512, 2)
    payload = codec.encode(name, sent)
    kept = received_payload(Form(name, 512), payload, slice(256, 512), Buffers(4))
    arrived = codec.decode(Form(name, 512), payload)[256:]
    assert torch.allclose(codec.decode(kept.form, codec.view(kept.payload)), arrived, atol=0.02)


def test_a_checkpoint_carries_it(tmp_path: Path) -> None:
    own, other = randn(P, 0), randn(P, 1)
    averaged = (own + other) / 2
    fragments, kept = Fragments(P, 3), Consolidation(Buffers(4))
    for fragment in range(3):
        kept.merged(fragment, shown_by(other, fragments, fragment))
    bundle = checkpoint.Bundle(
        own,
        torch.zeros(P),
        torch.ones(P),
        1,
        consolidation=received.packed_addition(padded_with_zeros(own), fragments, kept.now()),
        counters={"step": 1},
    )
    loaded = checkpoint.load(checkpoint.save(tmp_path, bundle))
    assert torch.equal(loaded.flat, own)
    assert torch.allclose(loaded.consolidated(), averaged, atol=0.02)
    alone = checkpoint.Bundle(own, torch.zeros(P), torch.ones(P), 1, counters={"step": 2})
    assert torch.equal(checkpoint.load(checkpoint.save(tmp_path, alone)).consolidated(), own)


def test_a_checkpoint_adds_what_an_export_does() -> None:
    """Two partners of one fragment, one of another, none of the third."""
    own, fragments, kept = randn(P, 0), Fragments(P, 3), Consolidation(Buffers(4))
    for seed, fragment in ((1, 0), (2, 0), (3, 2)):
        kept.merged(fragment, shown_by(own + 0.01 * randn(P, seed), fragments, fragment))
    added = received.packed_addition(padded_with_zeros(own), fragments, kept.now())
    expected = consolidated(own, fragments, kept)
    assert torch.allclose(received.unpacked(own, added), expected, atol=1e-4)


def test_memory_is_used_again_unless_somebody_may_be_reading_it() -> None:
    fragments, buffers = Fragments(P, 1), Buffers(4)
    kept = Consolidation(buffers)
    first, *others = [shown_by(randn(P, seed), fragments, 0) for seed in range(PARTNERS + 2)]
    kept.merged(0, first)
    for values in others[: PARTNERS - 1]:
        kept.merged(0, values)
    lent = kept.now()
    kept.merged(0, others[-2])
    size = first.payload.numel()
    assert all(buffers.take(size, torch.uint8) is not s.payload for s in lent[0])
    for seed in range(PARTNERS):
        kept.merged(0, shown_by(randn(P, 50 + seed), fragments, 0))
    assert buffers.take(size, torch.uint8) is others[-2].payload
    assert buffers.take(2 * size, torch.uint8).numel() == 2 * size
