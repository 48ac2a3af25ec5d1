"""A step's memory, found without taking it."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from xpeer.estimate.live import Rehearsal
from xpeer.estimate.step import Step, memory_of
from xpeer.founding_model import PRESETS
from xpeer.manifest.model import Lora
from xpeer.privacy import blocks
from xpeer.privacy.at_once import kind_of
from xpeer.training.model import build, num_params

STEP = Step(config=PRESETS["tiny"], sequence_tokens=32, micro_batch=2, private=False)
ADAPTERS = Lora(4, 8.0, 1, "")


def test_tensors_are_counted_while_they_live():
    with Rehearsal() as memory:
        kept = torch.ones(1000)
        view = kept[:10]
        assert memory.live_bytes == 4000
        sums = (kept + 1).sum()  # the temporary is gone behind this line
        assert memory.live_bytes == 4000 + sums.nbytes
        assert memory.peak_bytes >= 8000
        memory.begin()
        del kept
        assert memory.live_bytes == 4000 + sums.nbytes, "a view keeps all of it"
        del view
        assert memory.live_bytes == sums.nbytes
        assert memory.peak_bytes == 4000 + sums.nbytes


def test_code_that_asks_for_values_gets_some():
    with Rehearsal():
        numbers = torch.rand(3)
        assert bool(torch.isfinite(numbers).all())
        assert float(numbers.sum()) == 1.0
        assert int(torch.arange(3).max()) == 1


def test_what_fails_is_an_error_and_no_page_of_log(caplog: pytest.LogCaptureFixture):
    with pytest.raises(RuntimeError, match="broadcast"), Rehearsal():
        torch.ones(2) + torch.ones(3)
    assert caplog.text == ""


@pytest.mark.parametrize("private", [False, True])
def test_what_is_kept_between_steps_is_known_exactly(private: bool):
    memory = memory_of(replace(STEP, private=private))
    count = num_params(build(PRESETS["tiny"]))
    assert (memory.num_trained, memory.num_frozen) == (count, 0)
    assert 4 * count <= memory.weights < 4 * count + 4096, "buffers are small"
    assert 8 * count <= memory.moments < 8 * count + 4096
    assert memory.working > 4 * count, "gradients, and what the step computes with"


def test_adapters_on_a_base_in_bfloat16():
    wide = Lora(4, 8.0, 1, "")
    whole = memory_of(replace(STEP, lora=wide))
    half = memory_of(replace(STEP, lora=wide, base_dtype="bfloat16"))
    assert whole.num_frozen == num_params(build(PRESETS["tiny"]))
    assert half.num_trained == whole.num_trained < whole.num_frozen
    assert half.weights < 0.7 * whole.weights
    assert half.moments == whole.moments < 9 * whole.num_trained


def test_a_base_in_8_or_4_bits_is_estimated_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    wide = {**PRESETS["tiny"], "hidden_size": 256, "intermediate_size": 1024}
    step = replace(STEP, config=wide, lora=ADAPTERS, private=True)
    half, eight, four = (
        memory_of(replace(step, base_dtype=dtype)) for dtype in ("bfloat16", "int8", "nf4")
    )
    assert half.num_frozen == eight.num_frozen == four.num_frozen
    assert four.weights < 0.6 * eight.weights < 0.4 * half.weights
    assert four.source == eight.source == half.source == half.weights


@pytest.mark.parametrize("private", [False, True])
def test_more_records_need_more_and_layers_computed_again_less(private: bool):
    config = {**PRESETS["tiny"], "num_hidden_layers": 8}
    step = replace(STEP, config=config, sequence_tokens=128, micro_batch=8, private=private)
    plain = memory_of(step)
    assert memory_of(replace(step, micro_batch=16)).working > 1.5 * plain.working
    assert memory_of(replace(step, recompute=True)).working < 0.7 * plain.working
    assert memory_of(replace(step, precision="bfloat16")).working < plain.working


def test_nothing_of_the_model_is_ever_there():
    """A model of 7 B is rehearsed in a process that could never hold it."""
    seven = {
        **PRESETS["tiny"],
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 2,  # of 32: enough to see it, and quick
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 128256,
        "max_position_embeddings": 2048,
    }
    step = replace(STEP, config=seven, lora=ADAPTERS, base_dtype="bfloat16", private=True)
    memory = memory_of(replace(step, sequence_tokens=1024, micro_batch=1, recompute=True))
    assert memory.num_frozen > 900_000_000
    assert memory.weights < 2.1 * memory.num_frozen


def test_a_trained_output_layer_needs_no_more_with_privacy_than_a_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The gradients of all logits of 8 records are 200 MB. They are not kept, and it is seen."""
    config = {**PRESETS["tiny"], "vocab_size": 50_000, "max_position_embeddings": 128}
    step = replace(STEP, config=config, sequence_tokens=128, micro_batch=8, private=True)
    factors = 4 * 8 * 127 * 50_000
    monkeypatch.setattr(blocks, "_CPU_KEPT", 1 << 40)
    kept = memory_of(step)
    monkeypatch.setattr(blocks, "_CPU_KEPT", 1 << 25)
    computed = memory_of(step)
    assert computed.working < kept.working - factors
    more = memory_of(replace(step, micro_batch=32))
    assert more.working < computed.working + 0.5 * factors, "a block is a block"
    assert computed.least == kept.least


@pytest.mark.parametrize("lora", [ADAPTERS, None], ids=["adapters", "whole"])
def test_a_gpu_has_more_logits_at_once_and_it_is_seen(lora: Lora | None) -> None:
    """Of 150,000 tokens: half a gigabyte in float32, and once more in less precision."""
    config = {**PRESETS["tiny"], "vocab_size": 150_000, "max_position_embeddings": 2048}
    step = replace(STEP, config=config, lora=lora, sequence_tokens=2048, micro_batch=1)
    step = replace(step, private=True, precision="bfloat16")
    if lora is not None:
        step = replace(step, base_dtype="bfloat16")
    here, there = memory_of(step), memory_of(replace(step, device="cuda"))
    assert here.least == there.least
    assert 1 << 29 < there.working - here.working < 3 << 29
    assert kind_of(torch.device("cpu")) == "cpu", "only while it is rehearsed"
