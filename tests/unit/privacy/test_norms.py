from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from xpeer.errors import ConfigError
from xpeer.manifest.privacy import Privacy
from xpeer.privacy.norms import ClipNorm, clip_norm_of

SIGMA = 0.8


def adaptive(expected: int = 64, saved: float | None = None, **fields: Any) -> ClipNorm:
    return clip_norm_of(Privacy(clipping="adaptive", **fields), SIGMA, expected, saved)


@pytest.mark.parametrize(("expected", "count_std"), [(8, 1.6), (64, 3.2), (4096, 204.8)])
def test_a_step_costs_what_is_charged(expected: int, count_std: float) -> None:
    """Gradient and count, each divided by its noise, move together by 1 / sigma at most."""
    norm = adaptive(expected)
    assert norm.count_std == pytest.approx(count_std)
    moved = (1 / norm.gradient_multiplier) ** 2 + (0.5 / (norm.count_std or 0)) ** 2
    assert moved == pytest.approx(1 / SIGMA**2)
    assert SIGMA < norm.gradient_multiplier < 1.04 * SIGMA


def test_fixed_is_as_it_was() -> None:
    assert clip_norm_of(Privacy(clip_norm=0.3), SIGMA, 64, 7.0) == ClipNorm(0.3, SIGMA)


def test_it_finds_the_quantile() -> None:
    """Norms spread evenly over their logarithm from 1e-2 to 1e2."""
    norm = adaptive(100, clip_quantile=0.75, clip_norm=1e-3)
    for _ in range(600):
        share = min(max((math.log10(norm.norm) + 2) / 4, 0.0), 1.0)
        norm.follow(100 * (share - 0.5), 100)
    assert norm.norm == pytest.approx(10.0, rel=0.05)


def test_it_stays_within_bounds() -> None:
    norm = adaptive(clip_norm=2.0)
    for _ in range(3):
        norm.follow(-1e4, 64)
    assert norm.norm == pytest.approx(2e6)
    for _ in range(3):
        norm.follow(1e4, 64)
    assert norm.norm == pytest.approx(2e-6)


def test_it_goes_on_from_a_checkpoint() -> None:
    assert adaptive(saved=0.25).norm == 0.25
    assert adaptive(saved=0.25).start == 1.0
    assert adaptive(clip_norm=3.0).norm == 3.0


def test_a_count_that_costs_too_much_is_refused() -> None:
    with pytest.raises(ConfigError, match="clip_count_noise"):
        adaptive(clip_count_noise=0.4)
    assert adaptive(clip_count_noise=0.41).gradient_multiplier > 3 * SIGMA


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"document_records": 2}, "document_records"),
        ({"mode": "off", "clipping": "adaptive"}, "privacy.mode = off"),
        ({"clip_count_noise": 1.0}, "clip_count_noise"),
        ({"clip_quantile": 0.3}, "clip_quantile"),
        ({"clip_rate": 0.3}, "clip_rate"),
        (
            {"clipping": "adaptive", "clip_count_noise": 0.5, "noise_multiplier": 1.0},
            "above 0.5",
        ),
    ],
)
def test_manifests_that_make_no_sense(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Privacy(**fields).check(shared_corpus=False)


def test_documents_of_a_shared_corpus_are_refused() -> None:
    with pytest.raises(ValueError, match="pieces"):
        Privacy(unit="document").check(shared_corpus=True)


def test_older_manifests_mean_what_they_meant() -> None:
    old = msgspec.json.decode(b'{"mode": "record", "epsilon": 2.0}', type=Privacy)
    assert (old.unit, old.clipping, old.document_records) == ("record", "fixed", 1)
