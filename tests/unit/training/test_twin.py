"""A twin measures other values beside a model that trains, and neither disturbs the other."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.families.models import FAMILIES, VOCABULARY
from tests.pretend_cuda import PretendCuda, pretend_there_is_one
from tests.unit.training.homes import make_homes
from tests.unit.training.loops import trainer_with
from xpeer.errors import LocalError, PeerError, Reason
from xpeer.founding_model import LoraOptions
from xpeer.manifest.model import Lora
from xpeer.privacy import products
from xpeer.trainer.build import assemble
from xpeer.trainer.evaluating import BESIDE_RECORDS, PUBLIC_RECORDS, Public, any_tokens
from xpeer.training.adapters import adapt
from xpeer.training.flat import read_flat, write_flat
from xpeer.training.held import hold
from xpeer.training.losses import choose_losses, evaluate
from xpeer.training.measuring import Evaluation
from xpeer.training.model import build
from xpeer.training.quantised import Shapes, quantise
from xpeer.training.twin import Twin, pass_bytes

RECORDS = torch.randint(0, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(3))
LORA = Lora(rank=2, alpha=4.0, seed=5, base_digest="")
MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    family: lambda family=family: build(FAMILIES[family], seed=1)  # type: ignore[misc]
    for family in ("llama", "qwen3", "gemma2", "gemma3, text", "gpt2", "opt", "mixtral")
}
MODELS["adapters"] = lambda: adapt(build(FAMILIES["llama"], seed=1), LORA)
MODELS["adapters of a base in bfloat16"] = lambda: adapt(
    hold(build(FAMILIES["gemma2"], seed=1), torch.bfloat16), LORA
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def loss_of(model: torch.nn.Module) -> float:
    return evaluate(model, RECORDS, losses_of_records=choose_losses(model)[0])


@pytest.mark.parametrize("name", MODELS)
def test_it_computes_with_the_values_that_it_is_lent(name: str) -> None:
    model = MODELS[name]()
    own, before = read_flat(model), loss_of(model)
    twin, lent = Twin(model), own + 0.05 * torch.randn(len(own), generator=torch.Generator())
    for layer in model.modules():  # what comes later is not the twin's
        layer.register_forward_hook(lambda *_: pytest.fail("the model was called"))
    with twin.with_values(lent):
        found = loss_of(twin.model)
    for layer in model.modules():
        layer._forward_hooks.clear()
    assert torch.equal(read_flat(model), own)
    assert loss_of(model) == before != found
    write_flat(model, lent)
    assert loss_of(model) == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize("quantised", [False, True])
def test_it_takes_no_memory_for_what_is_not_trained(quantised: bool) -> None:
    model = hold(build(FAMILIES["llama"], seed=1), torch.bfloat16)
    if quantised:
        model = quantise(model, "nf4", 64, Shapes())
    model = adapt(model, LORA)
    twin = Twin(model)
    tensors = [*model.parameters(), *model.buffers()]
    ours = {each.data_ptr() for each in tensors}
    of_twin = [*twin.model.parameters(), *twin.model.buffers()]
    assert len(of_twin) == len(tensors)
    assert sum(each.nbytes for each in of_twin if each.data_ptr() not in ours) == 0
    values = read_flat(model)
    with twin.with_values(values):
        inside = [p for p in twin.model.parameters() if p.data_ptr() not in ours]
        assert min(p.data_ptr() for p in inside) == values.data_ptr()
    assert all(p.nbytes == 0 for p in twin.model.parameters() if p.data_ptr() not in ours)


@pytest.mark.parametrize("lora", [None, LoraOptions(2)], ids=["full", "adapters"])
@pytest.mark.parametrize("privacy", ["off", "record"])
def test_training_is_not_changed_by_measurements_beside_it(
    tmp_path: Path, lora: Any, privacy: Any
) -> None:
    """Neither its steps nor its evaluations, with all that is hooked onto the model."""
    changes = ("privacy.noise_multiplier=0.5", "end.steps=100") if privacy == "record" else ()
    (setup,) = make_homes(
        tmp_path, 1, privacy=privacy, changes=changes, lora=lora, checkpoint_activations="on"
    )
    made = assemble(setup)
    loop, stop = made.trainer, threading.Event()
    start, losses = loop.parameters.read(), list[float]()

    def measure() -> None:
        while not stop.is_set():
            losses.append(loop.measurements.public_of_copy(start))

    beside = threading.Thread(target=measure)
    beside.start()
    try:
        loop.run(6)
        public = loop.measure()[0]
    finally:
        stop.set()
        beside.join()
    moved = loop.parameters.read()
    assert loop.counters.step == 6
    assert losses
    assert losses == pytest.approx([losses[0]] * len(losses), rel=0.02)
    assert public != losses[0]
    assert loop.measurements.public_of_copy(moved) == pytest.approx(public, rel=1e-5)
    made.close()


def test_private_steps_beside_it_do_not_take_bits_from_what_it_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tables of positions are products of float32, whatever the precision."""
    setting, seen = SimpleNamespace(fp32_precision="as before"), list[str]()
    monkeypatch.setattr(products, "_SETTING", setting)
    multiply = torch.bmm

    def noting(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        seen.append(setting.fp32_precision)
        return multiply(one, two)

    monkeypatch.setattr(torch, "bmm", noting)
    factor, model = torch.ones(1, 80, 80, dtype=torch.bfloat16), build(FAMILIES["llama"], seed=1)
    with Twin(model).with_values(read_flat(model)):
        products.bmm(factor, factor)
    products.bmm(factor, factor)
    assert seen == ["as before", "bf16"]


def test_without_memory_for_it_the_loss_measured_last_is_offered() -> None:
    """And training goes on with all the memory that it has."""
    loop = trainer_with()
    values = loop.parameters.read()

    def of_copy(_: torch.Tensor) -> float:
        raise errors.pop(0)

    evaluation = Evaluation(public=lambda: 2.5, of_copy=of_copy)
    loop.measurements._evaluation = evaluation
    errors: list[Exception] = [MemoryError("the device is full")]
    with pytest.raises(PeerError) as nothing_yet:
        loop.measurements.public_of_copy(values)
    assert nothing_yet.value.reason == Reason.NOT_READY
    loop.measure()
    errors += [torch.OutOfMemoryError("full"), LocalError("a single record does not fit")]
    assert [loop.measurements.public_of_copy(values) for _ in range(2)] == [2.5, 2.5]
    errors.append(RuntimeError("a fault of ours"))
    with pytest.raises(RuntimeError, match="of ours"):
        loop.measurements.public_of_copy(values)


class Card:
    """A GPU that is pretended.

    Attributes:
        free: bytes.
        queues: that were made.
        log: the queue that was entered, and when memory was given back.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pretend_there_is_one(monkeypatch)
        self.free, self.queues, self.log = 1 << 40, 0, list[Any]()
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (self.free, 1 << 40))
        monkeypatch.setattr(torch.cuda, "Stream", self._make)
        monkeypatch.setattr(torch.cuda, "stream", self._enter)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: self.log.append("given back"))

    def _make(self, _device: torch.device) -> int:
        self.queues += 1
        return self.queues

    @contextlib.contextmanager
    def _enter(self, queue: int) -> Iterator[None]:
        self.log.append(queue)
        yield


def test_a_device_keeps_room_for_training_and_for_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, card = build(FAMILIES["llama"], seed=1), Card(monkeypatch)
    values, twin = read_flat(model), Twin(model, 24)
    tokens = twin.records * 24
    assert tokens > 900, "short records are measured together"
    layer = tokens * FAMILIES["llama"]["intermediate_size"]
    of_pass = pass_bytes(twin.model, tokens)
    assert of_pass >= 4 * (tokens * VOCABULARY + layer), "its logits, and a layer's values"
    card.free = 2 * values.nbytes + of_pass - 1
    with PretendCuda():
        with pytest.raises(MemoryError), twin.with_values(values):
            pass
        card.free += 1
        with twin.with_values(values):
            pass


def test_a_device_gets_its_memory_back_after_each_measurement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The allocator keeps what was freed for each queue that there was. Training would lack it."""
    model, card = build(FAMILIES["llama"], seed=1), Card(monkeypatch)
    values, twin = read_flat(model), Twin(model, 24)
    with PretendCuda():
        for _ in range(3):
            with twin.with_values(values):
                card.log.append("measured")
        assert all(p.numel() == 0 for p in twin._own)
    assert card.queues == 1
    assert card.log == [1, "measured", "given back"] * 3


def test_a_pass_of_a_large_vocabulary_has_a_piece_of_its_logits_at_once() -> None:
    """As codes, and with adapters, too."""
    config = {**FAMILIES["llama"], "vocab_size": 150_000}
    model = quantise(hold(build(config, seed=1), torch.bfloat16), "nf4", 64, Shapes())
    few, many = (pass_bytes(adapt(model, LORA), tokens) for tokens in (64, 2048))
    assert few > 4 * 64 * 150_000
    assert 4 << 27 < many < 4 << 29


def test_long_records_are_measured_one_by_one() -> None:
    model = build(FAMILIES["llama"], seed=1)
    assert [Twin(model, tokens).records for tokens in (2048, 1024, 600, 32)] == [1, 1, 1, 32]


def computing_in(records: int) -> Any:
    return SimpleNamespace(precision=None, measured_records=records)


def test_a_few_records_tell_of_all() -> None:
    """Once all were measured with values that are not far away."""
    model, computing = build(FAMILIES["llama"], seed=1), computing_in(7)
    generator = torch.Generator().manual_seed(5)
    records = torch.randint(0, VOCABULARY, (30, 24), generator=generator)
    records[::3, 12:] = -1  # filled up: means are by token
    losses, passed = choose_losses(model)[0], list[tuple[int, int]]()
    public = Public(records, computing, lambda: None, beside=2)
    real = evaluate

    def counted(model: Any, some: torch.Tensor, size: int, **more: Any) -> float:
        passed.append((len(some), size))
        return real(model, some, size, **more)

    public._evaluate = partial(counted)
    assert public.of_few(model, losses) == pytest.approx(real(model, records))
    assert passed == [(BESIDE_RECORDS, 2), (30 - BESIDE_RECORDS, 2)], "beside a step"
    write_flat(model, read_flat(model) * 1.05)
    assert public.of_few(model, losses) == pytest.approx(real(model, records), rel=0.01)
    assert passed[2:] == [(BESIDE_RECORDS, 2)]
    public.of_all(model, losses)
    assert passed[3:] == [(BESIDE_RECORDS, 7), (30 - BESIDE_RECORDS, 7)]
    one = Public(records[:1], computing, lambda: None)
    assert one.of_own(model, losses) == one.of_few(model, losses)


def test_a_donor_that_is_refused_does_not_change_what_we_offer() -> None:
    """Its parameters may be much worse on the few records than on all, or the other way round."""
    model = build(FAMILIES["llama"], seed=1)
    records = torch.randint(0, VOCABULARY, (30, 24), generator=torch.Generator().manual_seed(5))
    losses = choose_losses(model)[0]
    public = Public(records, computing_in(7), lambda: None)
    public.of_own(model, losses)
    offered = public.of_few(model, losses)
    real = public._evaluate
    public._evaluate = partial(
        lambda _m, some, *_, **__: 1.0 if len(some) > BESIDE_RECORDS else 9.0
    )
    public.of_all(model, losses)
    public._evaluate = real
    assert public.of_few(model, losses) == offered


def test_what_was_begun_before_our_own_measurement_does_not_replace_its_ratio() -> None:
    """A first measurement beside training takes long: training may measure before it ends."""
    model, other = (build(FAMILIES["llama"], seed=seed) for seed in (1, 2))
    records = torch.randint(0, VOCABULARY, (30, 24), generator=torch.Generator().manual_seed(5))
    losses = choose_losses(model)[0]
    public = Public(records, computing_in(7), lambda: None)
    real = public._evaluate

    def overtaken(of: torch.nn.Module, *some: Any, **more: Any) -> float:
        public._evaluate = real
        public.of_own(model, losses)
        return real(of, *some, **more)

    public._evaluate = partial(overtaken)
    public.of_few(other, choose_losses(other)[0])
    assert public.of_few(model, losses) == pytest.approx(public.of_all(model, losses))


@pytest.mark.parametrize(("vocabulary", "records"), [(100, 5), (10**6, PUBLIC_RECORDS)])
def test_records_of_any_tokens_read_as_many_as_the_public_text_costs(
    vocabulary: int, records: int
) -> None:
    """Each id once, in an order that nobody knows; training goes on as before."""
    state = torch.random.get_rng_state()
    one, other = (any_tokens(vocabulary, 24) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.shape == (records, 24)
    assert not torch.equal(one, other)
    assert (int(one.min()) >= 0, int(one.max()) < vocabulary) == (True, True)
    assert len(one.unique()) == min(vocabulary, records * 24)
