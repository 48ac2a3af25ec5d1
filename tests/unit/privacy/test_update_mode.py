"""One noised release a window: its bound, its noise, its charge, its account."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from tests.unit.privacy.models import llama, record_losses, some_records
from xpeer.errors import ConfigError, LocalError
from xpeer.identity import blake2b
from xpeer.manifest import End, Manifest, Model, Optimiser, Privacy, PublicText, Round
from xpeer.privacy import accountant
from xpeer.privacy.accountant import Segment
from xpeer.privacy.ledger import Ledger
from xpeer.privacy.mechanism import build_mechanism
from xpeer.privacy.update_mode import UpdateMechanism, noise_multiplier, planned_windows
from xpeer.update import RawUpdate

CLIP, SIGMA = 0.5, 3.0
P = 40_000


def manifest(end: End | None = None, rules: Round | None = None, **privacy: Any) -> Manifest:
    fields: dict[str, Any] = {
        "mode": "update",
        "clip_norm": CLIP,
        "noise_multiplier": SIGMA,
        "epsilon": 8.0,
    }
    return Manifest(
        name="test",
        created_unix_s=0,
        model=Model(config={}, num_params=1, initial_digest=""),
        optimiser=Optimiser(batch_records=3),
        round=rules or Round(window_steps=4),
        privacy=Privacy(**(fields | privacy)),
        public_text=PublicText(digest=blake2b(b"x").hex(), text="x"),
        end=end or End(),
    )


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "ledger.sqlite") as opened:
        yield opened


def made(ledger: Ledger, records: Tensor | None = None, **privacy: Any) -> UpdateMechanism:
    shard = some_records() if records is None else records
    mechanism = build_mechanism(manifest(**privacy), llama(tied=True), shard, record_losses, ledger)
    assert isinstance(mechanism, UpdateMechanism)
    return mechanism


def charged(mechanism: UpdateMechanism) -> UpdateMechanism:
    assert mechanism.begin_window(4) == 4
    return mechanism


class Silent:
    """No noise, but how much there should have been."""

    def __init__(self) -> None:
        self.stds: list[float] = []

    def gaussian_(self, tensor: Tensor, std: float) -> Tensor:
        self.stds.append(std)
        return tensor.zero_()


@pytest.mark.parametrize("length", [0.0, 1e-3, CLIP, 7.0, 1e30])
def test_a_difference_is_never_longer_than_the_clipping_norm(ledger: Ledger, length: float) -> None:
    mechanism = charged(made(ledger))
    silent = mechanism._generator = Silent()  # type: ignore[assignment]
    direction = torch.nn.functional.normalize(torch.randn(P, dtype=torch.float64), dim=0)
    found = mechanism.privatise((direction * length).float())
    norm = float(torch.linalg.vector_norm(found, dtype=torch.float64))
    assert norm <= CLIP * (1 + 1e-12)
    assert norm == pytest.approx(min(length, CLIP), rel=1e-5)
    assert silent.stds == [SIGMA * CLIP]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_window_that_diverged_looks_like_one_that_learnt_nothing(
    ledger: Ledger, bad: float
) -> None:
    mechanism = charged(made(ledger))
    mechanism._generator = Silent()  # type: ignore[assignment]
    difference = torch.ones(P)
    difference[7] = bad
    assert not mechanism.privatise(difference).any()


def test_noise_has_the_variance_that_is_charged_for(ledger: Ledger) -> None:
    mechanism = made(ledger)
    released = []
    for _ in range(2):
        charged(mechanism)
        released.append(mechanism.privatise(torch.zeros(P)))
    for values in released:
        assert float(values.double().var()) == pytest.approx((SIGMA * CLIP) ** 2, rel=0.05)
    correlation = torch.corrcoef(torch.stack(released))[0, 1]
    assert abs(float(correlation)) < 5 / math.sqrt(P)
    assert ledger.segments() == [Segment(SIGMA, 1.0, 2)]


def test_every_release_is_charged_before_it_is_made(ledger: Ledger) -> None:
    mechanism = made(ledger)
    with pytest.raises(LocalError, match="begin_window comes first"):
        mechanism.privatise(torch.zeros(P))
    charged(mechanism)
    assert ledger.segments() == [Segment(SIGMA, 1.0, 1)]
    charged(mechanism)  # the same window: a joiner's is shorter than its steps
    assert ledger.counter == 1
    mechanism.privatise(torch.zeros(P))
    with pytest.raises(LocalError, match="begin_window comes first"):
        mechanism.privatise(torch.zeros(P))
    mechanism.prepare_window(4)
    assert ledger.counter == 1


def test_windows_end_with_the_budget(ledger: Ledger) -> None:
    """At sigma 3 and delta 1e-5, 8 is spent after so many windows, whatever the accountant."""
    mechanism = made(ledger)
    windows = 0
    while mechanism.begin_window(4):
        mechanism.privatise(torch.zeros(8))
        windows += 1
    assert gdp_epsilon(math.sqrt(windows) / SIGMA, 1e-5) <= 8.0
    assert gdp_epsilon(math.sqrt(windows + 1) / SIGMA, 1e-5) > 8.0
    spent = mechanism.spent()
    assert (spent.mode, spent.steps_charged, spent.steps_left) == ("update", windows, 0)
    assert 7.0 < spent.epsilon_spent <= 8.0
    stamp = mechanism.stamp(RawUpdate(torch.zeros(2), 3)).stamp
    assert (stamp.mode, stamp.steps_charged) == ("update", windows)
    mechanism.close()


def gdp_epsilon(mu: float, delta: float) -> float:
    """Dong et al. 2019, corollary 1, solved for epsilon."""

    def delta_of(epsilon: float) -> float:
        normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
        low = normal.cdf(torch.tensor(-epsilon / mu - mu / 2, dtype=torch.float64))
        high = normal.cdf(torch.tensor(-epsilon / mu + mu / 2, dtype=torch.float64))
        return float(high - math.exp(epsilon) * low)

    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle) > delta else (low, middle)
    return high


@pytest.mark.parametrize(("sigma", "windows"), [(3.0, 1), (3.0, 10), (8.0, 20), (20.0, 200)])
def test_the_account_is_that_of_gaussian_differential_privacy(sigma: float, windows: int) -> None:
    """mu = sqrt(R) / sigma; the accountant bounds it from above, and closely."""
    exact = gdp_epsilon(math.sqrt(windows) / sigma, 1e-5)
    accounted = accountant.epsilon([Segment(sigma, 1.0, windows)], 1e-5)
    assert exact * (1 - 1e-6) <= accounted <= exact * 1.01


def test_sigma_follows_from_the_manifest_alone(ledger: Ledger) -> None:
    """Nothing public may depend on the shard, not even on its size."""
    rules = manifest(end=End(steps=38), noise_multiplier=None)
    assert planned_windows(rules) == 10
    sigma = noise_multiplier(rules, 1e-5)
    assert gdp_epsilon(math.sqrt(10) / sigma, 1e-5) <= 8.0
    assert gdp_epsilon(math.sqrt(10) / (sigma - 0.01), 1e-5) > 8.0
    spent = []
    for records in (some_records(3), some_records(40)):
        mechanism = made(ledger, records, end=End(steps=38), noise_multiplier=None)
        spent.append(mechanism.spent())
        mechanism.close()
    assert spent[0] == spent[1]
    assert spent[0].steps_left == 10
    assert planned_windows(manifest(end=End(steps=38, rounds=3))) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rules": Round(rule="gradient", fragments=1, group=0)}, "round.rule = gradient"),
        ({"rules": Round(window_s=5.0)}, "round.window_s"),
        ({"noise_multiplier": None}, "sigma can't be calibrated"),
    ],
)
def test_combinations_that_would_show_more_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        manifest(**changes)


@pytest.mark.parametrize("mode", ["record", "off"])
def test_only_under_its_own_manifest(ledger: Ledger, mode: str) -> None:
    rules = msgspec.structs.replace(manifest(), privacy=Privacy(mode=mode, noise_multiplier=1.0))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not protected"):
        UpdateMechanism(rules, llama(tied=True), some_records(), record_losses, ledger)
