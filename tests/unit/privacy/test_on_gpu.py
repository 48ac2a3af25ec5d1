"""What private and plain steps do on a GPU alone, with a GPU that is pretended."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.pretend_cuda import CUDA, Largest, PretendCuda
from tests.unit.privacy.models import llama, record_losses, some_records
from tests.unit.privacy.test_blocks import RECORDS, ROWS, TOKENS, WIDTH, blocked, some
from tests.unit.privacy.test_mechanism import OFF, grads
from xpeer.privacy import blocks, noise, plain
from xpeer.privacy.blocks import kept_values
from xpeer.privacy.engine_memory import setting_of
from xpeer.privacy.noise import SecretGenerator
from xpeer.privacy.plain import OffMechanism
from xpeer.privacy.record_gradients import RecordGradients, squared_norms

MANY = 200_000


def test_the_pretended_gpu() -> None:
    with PretendCuda():
        tensor = torch.zeros(3, device=CUDA)
        assert tensor.device == CUDA
        assert (tensor + 1).to(CUDA).device.type == "cuda"
    assert tensor.device.type == "cpu"


def test_norms_are_added_up_in_float64() -> None:
    """5 M equal values: a sum in float32 would be off by 1e-4 and more."""
    values = torch.full((2, 5_000_000), 0.1)
    values[1] *= 2
    expected = math.sqrt(5_000_000) * 0.1 * torch.tensor([1.0, 2.0]).double()
    with PretendCuda():
        squares = squared_norms(values.view(2, 1000, 5000))
    assert squares.dtype == torch.float64
    torch.testing.assert_close(squares.sqrt(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(squares, squared_norms(values), rtol=1e-5, atol=0)


def test_blocks_of_a_gpu_are_larger_and_add_up_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_CPU_BLOCK", 4 * RECORDS * TOKENS)
    monkeypatch.setattr(blocks, "_DEVICE_BLOCK", 9 * RECORDS * TOKENS)
    rows, cols = some(RECORDS, TOKENS, ROWS), some(RECORDS, TOKENS, WIDTH)
    whole = torch.einsum("btp,btd->bpd", rows, cols)
    spans: list[list[tuple[int, int]]] = []

    def work() -> tuple[Tensor, Tensor]:
        part = blocked(rows, cols)
        spans.append(list(part.parts()))
        gradients = RecordGradients(nn.Parameter(torch.zeros(ROWS, WIDTH)), TOKENS)
        gradients.take(part)
        squares, total = torch.as_tensor(gradients.squares()), torch.zeros(ROWS, WIDTH)
        gradients.add_weighted(torch.ones(RECORDS), total)
        return squares, total

    here = work()
    with PretendCuda():
        there = work()
    assert [stop - start for start, stop in spans[0]] == [4, 4, 4, 4, 4, 3]
    assert [stop - start for start, stop in spans[1]] == [9, 9, 5]
    for squares, total in (here, there):
        torch.testing.assert_close(squares, whole.double().square().sum((1, 2)), rtol=1e-5, atol=0)
        torch.testing.assert_close(total, whole.sum(0), rtol=1e-5, atol=1e-5)


def test_a_gpu_keeps_fewer_logits() -> None:
    """Its memory is short, and it computes them again quickly."""
    assert kept_values(CUDA) < kept_values(torch.device("cpu"))
    assert kept_values(torch.device("meta")) == kept_values(CUDA)


def test_a_plain_step_is_one_pass_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "CPU_TOKENS", some_records().shape[1])
    passes: list[int] = []

    def losses(model: nn.Module, records: Tensor) -> tuple[Tensor, Tensor]:
        passes.append(len(records))
        return record_losses(model, records)

    found = []
    for gpu in (False, True):
        model = llama(tied=True)
        if gpu:
            with PretendCuda():
                mechanism = OffMechanism(OFF, model, some_records(3), losses)
                mechanism.step_gradient()
        else:
            mechanism = OffMechanism(OFF, model, some_records(3), losses)
            mechanism.step_gradient()
        found.append([g.clone() for g in grads(model)])
    assert passes == [1, 1, 1, 3]
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_a_choice_of_an_engine_is_for_one_kind_of_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model, records, name = llama(tied=True), some_records(), "card A"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: name)
    found = [setting_of(model, records)]
    with PretendCuda():
        found.append(setting_of(model, records))
        name = "card B"
        found.append(setting_of(model, records))
        name = "card A"
        assert setting_of(model, records) == found[1]
    assert len(set(found)) == 3


class Gpu:
    """Makes generators of a GPU; they are the CPU's own.

    Attributes:
        made: generators so far.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[torch.Generator] = []
        self._real = torch.Generator
        monkeypatch.setattr(torch, "Generator", self._make)

    def _make(self, device: torch.device) -> torch.Generator:
        assert device.type == "cuda"
        self.made.append(self._real())
        return self.made[-1]


def test_fast_noise_has_a_fresh_key_for_each_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    secret, keys, drawn = SecretGenerator("cuda"), [], []
    for _ in range(3):
        with PretendCuda():
            drawn.append(secret.gaussian_(torch.empty(MANY), 2.0).double() / 2)
        keys.append(gpu.made[0].initial_seed())
    assert len(gpu.made) == 1
    assert len(set(keys)) == 3
    assert max(keys) >= 1 << 33, "keys of 64 bits"
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert abs(float((drawn[a] * drawn[b]).mean())) < 6 / math.sqrt(MANY)
    for z in drawn:
        assert abs(float(z.mean())) < 6 / math.sqrt(MANY)
        assert abs(float(z.var()) - 1) < 6 * math.sqrt(2 / MANY)


@pytest.mark.parametrize("kind", ["fast", "cryptographic"])
def test_noise_is_added_in_pieces(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No second matrix is there, and one key is for all of it."""
    gpu = Gpu(monkeypatch)
    monkeypatch.setattr(noise, "_PHILOX_CHUNK", 64)
    monkeypatch.setattr(noise, "_DEVICE_CHUNK", 32)
    secret, total = SecretGenerator("cuda", kind), torch.full((70, 300), 5.0)
    with PretendCuda(), Largest(total) as seen:
        assert secret.add_gaussian_(total, 0.1) is total
    assert 0 < seen.values <= 64
    assert len(gpu.made) == (kind == "fast"), "with one key"
    noised = (total - 5.0) / 0.1
    assert noised.unique().numel() > 0.9 * noised.numel()
    assert abs(float(noised.mean())) < 6 / math.sqrt(noised.numel())
    assert abs(float(noised.var()) - 1) < 6 * math.sqrt(2 / noised.numel())


def test_noise_in_pieces_is_a_function_of_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Added to a matrix or filled in, it is the same; and each piece goes on with the stream."""
    Gpu(monkeypatch)
    monkeypatch.setattr(noise, "_PHILOX_CHUNK", 64)
    monkeypatch.setattr("os.urandom", lambda count: bytes(range(count)))
    secret = SecretGenerator("cuda")
    with PretendCuda():
        filled = secret.gaussian_(torch.empty(3, 100), 2.0)
        added = secret.add_gaussian_(torch.zeros(3, 100), 2.0)
    assert torch.equal(filled, added)
    assert filled.unique().numel() == 300


def test_fast_noise_is_drawn_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 normals would end at 5.8 standard deviations; it is rounded once, to the tensor's."""
    Gpu(monkeypatch)
    kinds: list[torch.dtype] = []
    real = torch.Tensor.normal_

    def noted(self: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        kinds.append(self.dtype)
        return real(self, *arguments, **keywords)

    monkeypatch.setattr(torch.Tensor, "normal_", noted)
    secret, tensor = SecretGenerator("cuda"), torch.empty(3, 5, dtype=torch.bfloat16)
    with PretendCuda():
        assert secret.gaussian_(tensor, 1.0) is tensor
    assert set(kinds) == {torch.float64}


@pytest.mark.parametrize("count", [1, 7, 64, 1001])
def test_cryptographic_noise_on_a_gpu_asks_no_generator(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream is made on the CPU, and copied in larger chunks than a CPU's caches hold."""
    gpu = Gpu(monkeypatch)
    monkeypatch.setattr(noise, "_DEVICE_CHUNK", 16)
    chunks: list[int] = []
    real = noise._box_muller

    def noted(bits: Tensor) -> Tensor:
        chunks.append(bits.shape[1])
        return real(bits)

    monkeypatch.setattr(noise, "_box_muller", noted)
    secret = SecretGenerator("cuda", "cryptographic")
    with PretendCuda():
        values = secret.gaussian_(torch.full((count,), math.nan), 3.0)
        other = secret.gaussian_(torch.full((count,), math.nan), 3.0)
    assert not gpu.made
    assert bool(torch.isfinite(values).all())
    assert not torch.equal(values, other)
    assert max(chunks) == min(16, -(-count // 2))
    assert sum(chunks) == 2 * -(-count // 2), "of the last chunk only what is needed"


def test_a_fast_generator_of_a_gpu_fills_other_devices_by_the_cipher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such as the noised count, which is on the CPU."""
    gpu = Gpu(monkeypatch)
    secret = SecretGenerator("cuda")
    seed = gpu.made[0].initial_seed()
    value = secret.gaussian_(torch.empty((), dtype=torch.float64), 1.0)
    assert math.isfinite(float(value))
    assert gpu.made[0].initial_seed() == seed
