"""Documents, adaptive clipping and several ranks, in steps of real models."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from tests.unit.privacy.models import by_autograd, llama, record_losses, some_records
from tests.unit.privacy.test_units import Chosen
from xpeer.manifest.privacy import Privacy
from xpeer.privacy.clipping import BookKeepingEngine, Bound, Clipped, MicrobatchEngine, trainable
from xpeer.privacy.gradient import PrivateGradient, Sampling
from xpeer.privacy.noise import SecretGenerator
from xpeer.privacy.norms import ClipNorm, clip_norm_of
from xpeer.privacy.options import Options
from xpeer.privacy.ranks import ProcessGroup, Ranks
from xpeer.privacy.units import Documents, Records, Units

TINY = 1e-9
"""A noise multiplier that hides nothing."""
OWNERS = torch.tensor([0, 0, 0, 1, 1, 2, 3])


def gradient(
    norm: ClipNorm,
    units: Units,
    generator: SecretGenerator,
    *,
    expected: int = 1,
    ranks: Ranks | None = None,
    engine: Any = BookKeepingEngine,
) -> tuple[PrivateGradient, list[torch.nn.Parameter]]:
    model = llama(tied=True)
    parameters = trainable(model)
    made = engine(model, record_losses)
    records = some_records()
    private = PrivateGradient(
        parameters,
        made,
        records,
        units,
        norm,
        Sampling(expected, 0.5),
        generator,
        Options(ranks=ranks),
    )
    return private, parameters


def flat(parameters: Sequence[torch.nn.Parameter]) -> Tensor:
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


@pytest.mark.parametrize("clip", [1e-3, 0.5, 50.0])
@pytest.mark.parametrize("at_most", [1, 2, 3])
def test_a_whole_document_moves_the_sum_by_the_norm_at_most(clip: float, at_most: int) -> None:
    units = Documents(torch.arange(7), OWNERS, at_most)
    for document in range(4):
        one, parameters = gradient(ClipNorm(clip, TINY), units, Chosen([document]))
        told = one.step()
        assert told.records == min(at_most, OWNERS.tolist().count(document))
        moved = float(flat(parameters).norm())
        assert moved <= clip * (1 + 1e-6)
        if clip == 1e-3 and told.records == 1:
            assert moved == pytest.approx(clip, rel=1e-4)


def test_all_records_of_a_document_share_its_norm() -> None:
    """Each is clipped to C over their number: written as plainly as can be."""
    private, parameters = gradient(
        ClipNorm(0.6, TINY), Documents(torch.arange(7), OWNERS, 9), Chosen([0, 3]), expected=2
    )
    private.step()
    model = llama(tied=True)
    thirds = by_autograd(model, some_records()[:3], 0.2)[1]
    whole = by_autograd(model, some_records()[6:], 0.6)[1]
    expected = torch.cat([(a + b).flatten() / 2 for a, b in zip(thirds, whole, strict=True)])
    torch.testing.assert_close(flat(parameters), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("documents", [True, False])
def test_the_norm_follows_the_noised_count_alone(documents: bool) -> None:
    """One unit of several is within the norm, whatever is private beside that."""
    norms, _ = by_autograd(llama(tied=True), some_records(), 1.0)
    units: Units = Records(torch.arange(7))
    if documents:
        units = Documents(torch.arange(7), OWNERS, 9)
    rules = Privacy(clipping="adaptive", clip_norm=1.01 * float(norms.median()), clip_rate=0.5)
    norm = clip_norm_of(rules, TINY, 4, None)
    start = norm.norm
    private, _ = gradient(norm, units, Chosen([0, 1, 2]), expected=4)
    told = private.step()
    if documents:
        parts = [norms[d == OWNERS] <= start / OWNERS.tolist().count(d) for d in (0, 1, 2)]
        total = sum(float(p.double().mean()) - 0.5 for p in parts)
    else:
        total = float((norms[:3] <= start).double().sum()) - 1.5
    # sigma_b is a twentieth of the batch, 0.2: its noise moves the norm by less than 6 * 0.2 / 4
    found = -math.log(norm.norm / start) / 0.5
    assert abs(found - total / 4) < 6 * 0.2 / 4
    assert told.clip_norm == norm.norm


def test_the_counts_noise_has_the_size_that_was_accounted_for() -> None:
    rules = Privacy(clipping="adaptive", clip_norm=1e9, clip_rate=0.2)
    norm = clip_norm_of(rules, 3.0, 1, None)
    assert norm.count_std == 6.0
    private, _ = gradient(norm, Records(torch.arange(7)), Chosen([]), engine=Counting)
    found = []
    for _ in range(2000):
        norm.norm = 1e9
        private.step()
        found.append(-math.log(norm.norm / 1e9) / 0.2)
    noise = torch.tensor(found).double()
    assert abs(float(noise.mean())) < 6 * 6.0 / math.sqrt(2000)
    assert float(noise.std()) == pytest.approx(6.0, rel=6 / math.sqrt(2 * 2000))


class Counting(MicrobatchEngine):
    """Looks at nothing."""

    def accumulate(self, records: Tensor, clip_norm: Bound, sums: Sequence[Tensor]) -> Clipped:
        none = torch.zeros(len(records))
        return Clipped(none, none.long(), none.double())


def test_a_batch_of_thousands_is_taken_in_parts_that_fit() -> None:
    """Its peak is that of a batch of hundreds, but for the numbers of the records themselves."""
    peaks = []
    for count in (512, 8192):
        model, sizes = llama(tied=True, hidden_size=64, intermediate_size=256), []

        def losses(model: torch.nn.Module, part: Tensor) -> tuple[Tensor, Tensor]:
            sizes.append(len(part))  # noqa: B023 - used within its turn
            return record_losses(model, part)

        engine = BookKeepingEngine(model, losses, memory_bytes=8 << 20)
        generator = Chosen(list(range(count)))
        private = PrivateGradient(
            trainable(model),
            engine,
            some_records(64).repeat(count // 64, 1),
            Records(torch.arange(count)),
            ClipNorm(1.0, 1.0),
            Sampling(count, 0.5),
            generator,
        )
        _reset_peak()
        before = _peak_bytes()
        result = private.step()
        peaks.append(_peak_bytes() - before)
        assert result.records == sum(sizes) == count
        assert max(sizes) <= 64
    assert peaks[1] < peaks[0] + (16 << 20)


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


NOISY = 5.0


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/meet", 2)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    ranks = ProcessGroup()
    for name, sigma, document in (
        ("clipped", TINY, False),
        ("documents", TINY, True),
        ("noise", NOISY, False),
    ):
        units: Units = Records(torch.arange(7))
        if document:
            units = Documents(torch.arange(7), OWNERS, 9)
        rules = Privacy(clipping="adaptive", clip_norm=0.5)
        norm = clip_norm_of(rules, sigma, 4, None)
        generator = Chosen([0, 1])  # of each rank's own units
        private, parameters = gradient(norm, units, generator, expected=4, ranks=ranks)
        told = private.step()
        torch.save((flat(parameters), norm.norm, told.records), f"{folder}/{name}{rank}")
    store.set(f"done{rank}", "")
    store.wait(["done0", "done1"])  # nobody leaves while another still reads
    os._exit(0)  # gloo's threads abort the process now and then when they are taken down


@pytest.mark.timeout(120)
def test_two_ranks_take_one_step_with_noise_added_once(tmp_path: Path) -> None:
    spawn(_rank, args=(str(tmp_path),), nprocs=2)

    def both(name: str) -> tuple[Tensor, Tensor, int]:
        (a, norm, ours), (b, same, theirs) = (torch.load(tmp_path / f"{name}{r}") for r in (0, 1))
        assert norm == same
        return a, b, ours + theirs

    # rank 0 has records 0, 2, 4, 6 and documents 0 and 2; rank 1 the others
    for name, units, chosen in (
        ("clipped", Records(torch.arange(7)), [0, 1, 2, 3]),
        ("documents", Documents(torch.arange(7), OWNERS, 9), [0, 1, 2, 3]),
    ):
        a, b, records = both(name)
        alone, parameters = gradient(ClipNorm(0.5, TINY), units, Chosen(chosen), expected=4)
        assert alone.step().records == records
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(a, flat(parameters), rtol=1e-4, atol=1e-6)
    a, b, _ = both("noise")
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    clean, _, _ = both("clipped")
    multiplier = clip_norm_of(Privacy(clipping="adaptive"), NOISY, 4, None).gradient_multiplier
    noise = (a - clean).double() * 4 / (multiplier * 0.5)
    assert abs(float(noise.mean())) < 6 / math.sqrt(len(noise))
    assert float(noise.var()) == pytest.approx(1.0, abs=6 * math.sqrt(2 / len(noise)))
