from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

from tests.factories import privacy_stamp
from tests.unit.accounts.ledgers import open_declared
from tests.unit.privacy.models import by_autograd, llama, record_losses, some_records
from xpeer.accounts import accountant
from xpeer.accounts.accountant import Segment
from xpeer.accounts.budget import coarse_size
from xpeer.accounts.ledger import Ledger
from xpeer.errors import ConfigError, LocalError
from xpeer.identity import blake2b
from xpeer.manifest import End, Manifest, Optimiser, PublicText
from xpeer.manifest.model import Model
from xpeer.manifest.privacy import Privacy
from xpeer.privacy.clipping import BookKeepingEngine, Bound, Clipped, Engine, MicrobatchEngine
from xpeer.privacy.mechanism import OffMechanism, RecordMechanism, build_mechanism
from xpeer.privacy.options import Options
from xpeer.privacy.passes import Passes
from xpeer.privacy.steps import FULL, Precision
from xpeer.update import PrivacyStamp, RawUpdate

SIGMA, CLIP = 4.0, 0.5
STEPS = 50
"""That fit 8.6 with sigma 4 and q = 1 (the accountant's reference table)."""


def manifest(*, batch: int = 100, end: End | None = None, **privacy: Any) -> Manifest:
    fields: dict[str, Any] = {
        "epsilon": 8.6,
        "delta": 1e-5,
        "clip_norm": CLIP,
        "noise_multiplier": SIGMA,
    }
    return Manifest(
        name="test",
        created_unix_s=0,
        model=Model(config={}, num_params=1, initial_digest=""),
        optimiser=Optimiser(batch_records=batch, gradient_clip=0.0),
        privacy=Privacy(**(fields | privacy)),
        public_text=PublicText(digest=blake2b(b"x").hex(), text="x"),
        end=end or End(),
    )


OFF = manifest(mode="off", batch=3)
RAW = RawUpdate(values=torch.zeros(2), step=0)


class Scripted:
    """In place of the secret generator: says what is sampled, and adds a constant as noise."""

    def __init__(self, chosen: list[int]) -> None:
        self.chosen = chosen
        self.asked: list[tuple[int, float]] = []
        self.stds: list[float] = []

    def poisson_sample(self, num_records: int, probability: float) -> Tensor:
        self.asked.append((num_records, probability))
        return torch.tensor(self.chosen, dtype=torch.int64)

    def gaussian_(self, tensor: Tensor, std: float) -> Tensor:
        self.stds.append(std)
        return tensor.fill_(0.125)

    def add_gaussian_(self, tensor: Tensor, std: float) -> Tensor:
        self.stds.append(std)
        return tensor.add_(0.125)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with open_declared(tmp_path / "ledger.sqlite") as opened:
        yield opened


def record(
    ledger: Ledger,
    model: nn.Module,
    *,
    rules: Manifest | None = None,
    records: Tensor | None = None,
    engine: Engine | None = None,
) -> RecordMechanism:
    return RecordMechanism(
        rules or manifest(),
        model,
        some_records() if records is None else records,
        record_losses,
        ledger,
        Options(engine=engine or BookKeepingEngine(model, record_losses)),
    )


def scripted(mechanism: RecordMechanism, chosen: list[int]) -> Scripted:
    generator = Scripted(chosen)
    mechanism._gradient.generator = generator  # type: ignore[assignment]
    return generator


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_the_gradient_is_the_clipped_sum_plus_noise_over_the_expected_batch(
    ledger: Ledger,
) -> None:
    model = llama(tied=True)
    mechanism = record(ledger, model, rules=manifest(batch=2))
    generator = scripted(mechanism, [0, 1, 4, 6])  # more than expected: none is left out
    _, sums = by_autograd(model, some_records()[[0, 1, 4, 6]], CLIP)
    mechanism.charge_until(2)
    mechanism.step_gradient()
    result = mechanism.step_gradient()  # nothing of one step is left in the next
    for got, total in zip(grads(model), sums, strict=True):
        torch.testing.assert_close(got, (total + 0.125) / 2, rtol=1e-4, atol=1e-6)
    assert generator.asked == [(7, 2 / 7)] * 2
    assert set(generator.stds) == {SIGMA * CLIP}
    assert (result.records, result.tokens, result.zeroed) == (4, 11 + 6 + 1 + 11, 0)
    with torch.no_grad():
        losses, tokens = record_losses(model, some_records()[[0, 1, 4, 6]])
    assert result.loss == pytest.approx(float(losses.sum() / tokens.sum()))


@pytest.mark.parametrize(("records", "batch"), [(7, 2), (7, 7), (6, 100), (3, 1), (700, 33)])
def test_what_the_ledger_says_is_what_the_sampler_and_the_noise_are_told(
    ledger: Ledger, records: int, batch: int
) -> None:
    """An epsilon accounted for other numbers than those drawn with is none."""
    model = llama(tied=False)
    some = some_records()
    shard = some.repeat(records // len(some) + 1, 1)[:records]
    mechanism = record(ledger, model, rules=manifest(batch=batch), records=shard)
    generator = scripted(mechanism, [0])
    assert mechanism.charge_until(2) == 2
    for _ in range(2):
        mechanism.step_gradient()
    (charged,) = ledger.segments()
    assert generator.asked == [(records, charged.sampling_probability)] * 2
    assert set(generator.stds) == {charged.noise_multiplier * CLIP}
    assert charged.steps == 2


def test_an_empty_batch_is_a_step_of_pure_noise(ledger: Ledger) -> None:
    model = llama(tied=False)
    mechanism = record(ledger, model, rules=manifest(batch=2))
    scripted(mechanism, [])
    mechanism.charge_until(1)
    result = mechanism.step_gradient()
    assert (result.loss, result.records, result.tokens) == (None, 0, 0)
    found = grads(model)
    assert len(found) == len(list(model.parameters()))
    assert all(torch.all(g == 0.125 / 2) for g in found)
    with pytest.raises(LocalError, match="none is charged"):
        mechanism.step_gradient()


def test_real_noise_has_the_size_that_was_accounted_for(ledger: Ledger) -> None:
    model = llama(tied=False, hidden_size=64)
    mechanism = record(ledger, model, rules=manifest(batch=7, clip_norm=1e-6))
    mechanism.charge_until(2)
    mechanism.step_gradient()
    one = torch.cat([g.flatten() for g in grads(model)]).double()
    mechanism.step_gradient()
    two = torch.cat([g.flatten() for g in grads(model)]).double()
    expected = SIGMA * 1e-6 / 7
    for noise in (one, two):
        assert float(noise.std()) == pytest.approx(expected, rel=6 / math.sqrt(len(one)))
    assert abs(float(torch.corrcoef(torch.stack([one, two]))[0, 1])) < 6 / math.sqrt(len(one))


def test_two_starts_never_repeat_noise(ledger: Ledger) -> None:
    found = []
    for _ in range(2):
        model = llama(tied=False)
        mechanism = record(ledger, model)
        mechanism.charge_until(1)
        mechanism.step_gradient()
        found.append(torch.cat([g.flatten() for g in grads(model)]))
        mechanism.close()
    assert not torch.any(found[0] == found[1])


def test_no_step_without_a_charge(ledger: Ledger) -> None:
    model = llama(tied=False)
    mechanism = record(ledger, model)
    with pytest.raises(LocalError, match="none is charged"):
        mechanism.step_gradient()
    assert not grads(model)
    assert mechanism.charge_until(1) == 1
    mechanism.step_gradient()
    with pytest.raises(LocalError, match="none is charged"):
        mechanism.step_gradient()
    assert mechanism.stamp(RAW).stamp == privacy_stamp("record", 1)


def test_the_budget_ends(ledger: Ledger) -> None:
    mechanism = record(ledger, llama(tied=False))
    assert mechanism.spent().steps_left == STEPS
    assert mechanism.charge_until(STEPS - 2) == STEPS - 2
    mechanism.close()
    again = record(ledger, llama(tied=False))  # what was not used is lost
    assert again.charge_until(20) == 2
    again.step_gradient()
    again.step_gradient()
    assert again.charge_until(20) == 0
    with pytest.raises(LocalError, match="none is charged"):
        again.step_gradient()
    spent = again.spent()
    assert spent.epsilon_spent <= spent.epsilon_target == 8.6
    assert spent.epsilon_spent > 8.5
    assert (spent.steps_left, spent.steps_charged) == (0, STEPS)
    assert (spent.noise_multiplier, spent.delta, spent.engine) == (SIGMA, 1e-5, "book-keeping")
    assert again.stamp(RAW).stamp.steps_charged == STEPS  # mixing and serving go on
    again.close()


def test_a_window_is_charged_while_the_one_before_runs(ledger: Ledger) -> None:
    mechanism = record(ledger, llama(tied=False))
    mechanism.charge_until(1)
    mechanism.charge_ahead(2)
    mechanism.step_gradient()
    assert mechanism.charge_until(2) == 2
    assert ledger.counter == 2
    mechanism.charge_ahead(4)
    mechanism.close()  # never used, never refunded
    assert ledger.steps_charged == 7


def test_sigma_is_calibrated_once(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = manifest(noise_multiplier=None, end=End(steps=20))
    first = record(ledger, llama(tied=False), rules=rules)
    sigma = first.spent().noise_multiplier
    assert accountant.epsilon([Segment(sigma, 1.0, 20)], 1e-5) <= 8.6
    assert (first.spent().steps_left or 0) >= 20
    first.charge_until(5)
    first.close()
    # a larger shard: another q, the same sigma, the same account
    monkeypatch.setattr(accountant, "calibrate", None)
    records = some_records().repeat(2, 1)
    more = record(ledger, llama(tied=False), rules=msgspec_batch(rules, 7), records=records)
    more.charge_until(3)
    assert ledger.segments() == [Segment(sigma, 1.0, 5), Segment(sigma, 0.5, 3)]
    spent = more.spent()
    assert spent.epsilon_spent == pytest.approx(accountant.epsilon(ledger.segments(), 1e-5))
    assert (spent.steps_left or 0) > 15
    more.close()


def msgspec_batch(rules: Manifest, batch: int) -> Manifest:
    optimiser = msgspec.structs.replace(rules.optimiser, batch_records=batch)
    return msgspec.structs.replace(rules, optimiser=optimiser)


def test_delta_follows_the_shard_unless_the_manifest_sets_it(ledger: Ledger) -> None:
    records = some_records().repeat(10_000, 1)  # 70,000^-1.1 < 1e-5
    rules = manifest(delta=None, batch=70_000)
    mechanism = record(ledger, llama(tied=False), rules=rules, records=records)
    assert mechanism.spent().delta == accountant.default_delta(coarse_size(70_000)) < 1e-5
    mechanism.close()


class Failing(MicrobatchEngine):
    """Runs out of memory after it has added something up."""

    def accumulate(self, records: Tensor, clip_norm: Bound, sums: Sequence[Tensor]) -> Clipped:
        super().accumulate(records, clip_norm, sums)
        raise MemoryError


def test_a_step_that_breaks_off_leaves_nothing_and_stops_stamps(ledger: Ledger) -> None:
    model = llama(tied=False)
    mechanism = record(ledger, model, engine=Failing(model, record_losses))
    mechanism.charge_until(2)
    mechanism.stamp(RAW)
    with pytest.raises(LocalError, match="single record"):
        mechanism.step_gradient()
    assert not grads(model)
    with pytest.raises(LocalError, match="broke off"):
        mechanism.stamp(RAW)
    mechanism._gradient.engine = BookKeepingEngine(model, record_losses)
    mechanism.step_gradient()
    with pytest.raises(LocalError, match="broke off"):
        mechanism.stamp(RAW)


def test_no_stamp_for_a_step_that_was_not_charged(ledger: Ledger) -> None:
    mechanism = record(ledger, llama(tied=False))
    mechanism.charge_until(1)
    mechanism._budget._permitted = 2  # a mistake of ours
    mechanism.step_gradient()
    mechanism.stamp(RAW)
    mechanism.step_gradient()
    with pytest.raises(LocalError, match="not charged"):
        mechanism.stamp(RAW)


def test_stamps_come_from_nowhere_else() -> None:
    with pytest.raises(TypeError, match="mechanism only"):
        PrivacyStamp(mode="record", steps_charged=1, issuer=object())


def test_losses_that_are_not_finite(ledger: Ledger) -> None:
    def broken(model: nn.Module, records: Tensor) -> tuple[Tensor, Tensor]:
        losses, tokens = record_losses(model, records)
        return losses / (records[:, 0] != 3), tokens

    model, records = llama(tied=False), some_records()
    records[:, 0] = torch.tensor([3, 1, 1, 1, 1, 1, 1])
    mechanism = record(ledger, model, records=records, engine=MicrobatchEngine(model, broken))
    scripted(mechanism, [0, 1])
    mechanism.charge_until(2)
    result = mechanism.step_gradient()
    assert (result.records, result.zeroed) == (2, 1)
    assert result.loss is not None
    assert math.isfinite(result.loss)
    assert all(torch.isfinite(g).all() for g in grads(model))
    scripted(mechanism, [0])
    result = mechanism.step_gradient()
    assert result.loss is not None
    assert math.isnan(result.loss)
    assert all(torch.isfinite(g).all() for g in grads(model))


def test_the_mode_is_the_manifests(ledger: Ledger) -> None:
    model, records = llama(tied=False), some_records()
    with pytest.raises(ConfigError, match="without privacy is refused"):
        OffMechanism(manifest(), model, records, record_losses)
    with pytest.raises(ConfigError, match="not protected"):
        RecordMechanism(OFF, model, records, record_losses, ledger)
    assert isinstance(build_mechanism(OFF, model, records, record_losses, ledger), OffMechanism)
    made = build_mechanism(manifest(), model, records, record_losses, ledger)
    assert isinstance(made, RecordMechanism)
    assert made.engine in {"book-keeping", "vmap", "microbatch"}  # whatever is faster
    assert made.notes[0].startswith(f"private gradients by {made.engine}: 8 records take ")
    assert made.spent().engine_reason in made.notes[0]
    made.close()
    for rules in (OFF, manifest()):
        with pytest.raises(ConfigError, match="no records"):
            build_mechanism(rules, model, records[:0], record_losses, ledger)


def test_off_is_plain_training(ledger: Ledger) -> None:
    model, records = llama(tied=True), some_records()
    mechanism = OffMechanism(OFF, model, records, record_losses, Options(micro_batch=2))
    assert mechanism.charge_until(5) == 5
    mechanism.charge_ahead(5)
    order = torch.tensor([4, 2, 0, 1, 3, 5, 6])
    mechanism._passes._order = order
    result = mechanism.step_gradient()
    got = grads(model)
    model.zero_grad()
    losses, tokens = record_losses(model, records[[4, 2, 0]])
    (losses.sum() / tokens.sum()).backward()
    for a, b in zip(got, grads(model), strict=True):
        torch.testing.assert_close(a, b)
    assert result.loss == pytest.approx(float(losses.detach().sum() / tokens.sum()))
    assert (result.records, result.tokens) == (3, int(tokens.sum()))
    assert mechanism.stamp(RAW).stamp.mode == "off"
    assert mechanism.spent().mode == "off"
    assert mechanism.spent().steps_left is None
    assert ledger.counter == 0
    mechanism.close()


def test_a_pass_goes_on_with_what_was_not_seen_when_the_shard_changes() -> None:
    records = torch.randint(0, 259, (200, 12), generator=torch.Generator().manual_seed(0))
    passes = Passes(records[:150])
    first = passes.take(60)
    assert len(passes.seen) == 60
    changed = Passes(records[50:], passes.seen)  # 50 records went, 50 came
    kept = {i - 50 for i in first.tolist() if i >= 50}
    rest = changed.take(150 - len(kept)).tolist()
    assert sorted([*rest, *kept]) == list(range(150))
    assert len(changed.seen) == 150
    assert sorted(changed.take(150).tolist()) == list(range(150))  # the next pass


def test_off_sees_every_record_once_an_epoch_and_clips_the_batch() -> None:
    model, records = llama(tied=False), torch.arange(7).repeat_interleave(12).view(7, 12)
    seen: list[int] = []

    def noting(model: nn.Module, part: Tensor) -> tuple[Tensor, Tensor]:
        seen.extend(part[:, 0].tolist())
        return record_losses(model, part)

    optimiser = msgspec.structs.replace(OFF.optimiser, gradient_clip=1e-3)
    rules = msgspec.structs.replace(OFF, optimiser=optimiser)
    mechanism = OffMechanism(rules, model, records, noting)
    for _ in range(7):
        mechanism.step_gradient()
        norm = torch.cat([g.flatten() for g in grads(model)]).norm()
        assert float(norm) == pytest.approx(1e-3, rel=1e-3)
    assert sorted(seen) == sorted(list(range(7)) * 3)
    for epoch in range(3):
        assert sorted(seen[7 * epoch : 7 * epoch + 7]) == list(range(7))


HALF = Precision("bfloat16", partial(torch.autocast, "cpu", torch.bfloat16))


@pytest.mark.parametrize("mode", ["record", "off"])
def test_forward_passes_in_less_precision(ledger: Ledger, mode: str) -> None:
    found = []
    for low in (False, True):
        model = llama(tied=False)
        mechanism = build_mechanism(
            manifest(mode=mode),
            model,
            some_records(),
            record_losses,
            ledger,
            Options(precision=HALF if low else FULL),
        )
        if isinstance(mechanism, RecordMechanism):
            assert "refused" not in mechanism.notes[0]
            scripted(mechanism, [0, 1, 2, 5])
        mechanism.charge_until(1)
        mechanism.step_gradient()
        found.append(torch.cat([g.flatten() for g in grads(model)]))
        mechanism.close()
    assert found[1].dtype == torch.float32
    assert 0.0 < float((found[0] - found[1]).norm() / found[0].norm()) < 0.05
