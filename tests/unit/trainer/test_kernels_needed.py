"""A trainer compiles the codec's kernels if its payloads are large."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.trainer.processes import with_config
from tests.unit.training.homes import make_homes
from xpeer.config import Home
from xpeer.forms import BLOCK
from xpeer.manifest.signed import SignedManifest
from xpeer.mixing.cut import largest
from xpeer.trainer.build import assemble
from xpeer.wire import kernels


@pytest.mark.parametrize("large", [True, False])
def test_a_small_payload_is_no_reason_to_load_a_compiler(
    large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is larger than a payload, so it alone would bring the compiler in."""
    monkeypatch.setattr(kernels, "_state", kernels._State())
    (setup,) = make_homes(tmp_path, 1)
    manifest = SignedManifest.load(Home(Path(setup.home)).manifest).open()
    blocks = largest(manifest.model.num_params, manifest.round.fragments) // BLOCK
    monkeypatch.setattr(kernels, "ROWS", blocks if large else blocks + 1)
    assert manifest.model.num_params // BLOCK > kernels.ROWS
    assemble(with_config(setup, "training", compile_codec=True)).close()
    assert kernels.compiling() is large
