"""Documents as the unit of privacy, and adaptive clipping, in a real trainer across a restart."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.training.homes import make_homes
from xpeer.accounts import accountant
from xpeer.errors import ConfigError
from xpeer.trainer.build import assemble

OPTIONS = (
    "privacy.unit=document",
    "privacy.document_records=2",
    "privacy.clipping=adaptive",
    "privacy.clip_norm=0.01",
    "privacy.clip_rate=1.0",
    "optimiser.batch_records=6",
    "end.steps=100",
)


def test_documents_are_counted_and_the_norm_survives(tmp_path: Path) -> None:
    (setup,) = make_homes(tmp_path, 1, privacy="record", changes=OPTIONS)
    first = assemble(setup)
    assert first.beginning.text.num_records > 20  # of 12 documents less those held out
    first.trainer.run(6)
    spent = first.mechanism.spent()
    assert spent.unit == "document"
    assert spent.clip_norm == first.trainer.counters.clip_norm != 0.01
    assert "8 records take" in spent.engine_reason
    (segment,) = first.ledger.segments()
    documents = 6 / segment.sampling_probability
    assert documents == pytest.approx(round(documents))
    assert 8 <= documents <= 11
    assert spent.delta == accountant.default_delta(round(documents))
    assert segment.noise_multiplier == spent.noise_multiplier  # no more than with a fixed norm
    first.checkpoints.copy()()
    first.close()
    again = assemble(setup)
    assert again.mechanism.spent().clip_norm == spent.clip_norm
    again.trainer.run(1)
    assert again.trainer.counters.clip_norm != spent.clip_norm
    again.close()


def test_documents_of_a_shared_corpus_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pieces of one document"):
        make_homes(
            tmp_path,
            1,
            privacy="record",
            changes=("privacy.unit=document", "end.steps=10", "shared_corpus.name=x"),
        )
