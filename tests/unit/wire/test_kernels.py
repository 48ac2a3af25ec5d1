"""Compiled kernels give the plain code's bytes, and nothing depends on them."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from xpeer.forms import BLOCK, Form
from xpeer.wire import kernels
from xpeer.wire.codec import decode, encode
from xpeer.wire.merge import difference, prepare

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch, on itself

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler"
)


@pytest.fixture(autouse=True)
def own_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_state", kernels._State(allowed=True))
    monkeypatch.setattr(kernels, "_compiled", {})


@pytest.fixture(scope="module")
def small_chunks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile from two blocks on, into a folder of our own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        patch.setattr(kernels, "ROWS", 5)
        patch.setattr(kernels, "PLAIN_ROWS", 3)
        yield


def everything(name: str, n: int, seed: int, dither: int | None) -> list[Any]:
    """What the kernels do, on values that need every branch."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.randint(-9, 3, (-(-n // BLOCK),), generator=generator)
    values = torch.randn(n, generator=generator) * sizes.repeat_interleave(BLOCK)[:n]
    values *= torch.rand(n, generator=generator) < 0.9
    others = values * (1 + 0.5 * torch.rand(n, generator=generator))
    payload, theirs = encode(name, values, dither=dither), encode(name, others, dither=dither)
    own = decode(Form(name, n), payload)
    if name == "int4":
        return [payload, theirs, own]
    z, _ = difference(Form(name, n), own if name == "int2" else payload, theirs)
    return [payload, theirs, own, z]


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


@needs_compiler
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("name", "stochastic"), [("int8", False), ("int4", True), ("int2", False)])
def test_compiled_and_plain_give_the_same_bytes(name: str, stochastic: bool) -> None:
    """Three of six, as each kernel takes seconds to compile; the benchmark checks them all."""
    outputs = 0
    for seed in range(20):
        n = (5 + seed) * BLOCK + (37 * seed) % BLOCK
        dither = seed if stochastic else None
        kernels.configure(compile=True)
        compiled = everything(name, n, seed, dither)
        assert kernels.compiling(), "it fell back"
        kernels.configure(compile=False)
        plain = everything(name, n, seed, dither)
        assert all(same(a, b) for a, b in zip(compiled, plain, strict=True))
        outputs = len(compiled)
    assert len(kernels._compiled) == outputs - 1  # once each, whatever the sizes


@needs_compiler
@pytest.mark.timeout(120)
@pytest.mark.usefixtures("small_chunks")
def test_values_that_are_not_finite_are_refused_compiled_too() -> None:
    for bad in (float("nan"), float("inf")):
        values = torch.ones(10 * BLOCK)
        values[700] = bad
        with pytest.raises(Exception, match="diverged"):
            encode("int8", values)
    assert kernels.compiling()


def test_without_a_compiler_it_is_said_once_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernels, "ROWS", 5)
    values = torch.randn(20 * BLOCK)
    kernels.configure(compile=False)
    plain = encode("int8", values)
    kernels.configure(compile=True)
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch, "compile", _no_compiler)
    with caplog.at_level(logging.WARNING, logger="xpeer.codec"):
        assert encode("int8", values) == plain
        assert torch.equal(
            decode(Form("int8", len(values)), plain), decode(Form("int8", len(values)), plain)
        )
    assert [r.getMessage() for r in caplog.records] == [
        "codec kernels are not compiled, so the codec is slower: RuntimeError: no compiler found"
    ]
    assert not kernels.compiling()


def _no_compiler(*_: Any, **__: Any) -> Any:
    def fails(*_: Any) -> None:
        raise RuntimeError("no compiler found\nand a long story")

    return fails


def test_a_process_that_was_not_told_to_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that exports a checkpoint would take seconds longer."""
    monkeypatch.setattr(kernels, "_state", kernels._State())
    monkeypatch.setattr(torch, "compile", _no_compiler)
    encode("int8", torch.ones(kernels.ROWS * BLOCK))
    assert not kernels._compiled


def test_small_inputs_and_a_process_that_may_not_compile_stay_plain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", _no_compiler)
    encode("int8", torch.ones((kernels.ROWS - 1) * BLOCK))
    assert kernels.compiling()
    kernels.configure(compile=False)
    encode("int8", torch.ones(kernels.ROWS * BLOCK))
    assert not kernels._compiled


@pytest.mark.parametrize(
    ("name", "stochastic", "decoded"),
    [("int8", False, False), ("int4", True, False), ("int8", False, True)],
)
def test_what_was_prepared_is_not_compiled_again(
    monkeypatch: pytest.MonkeyPatch, name: str, stochastic: bool, decoded: bool
) -> None:
    monkeypatch.setattr(kernels, "ROWS", 5)
    monkeypatch.setattr(torch, "compile", lambda kernel, **_: kernel)
    prepare(Form(name, 10 * BLOCK), stochastic=stochastic, decoded=decoded)
    prepared = set(kernels._compiled)
    assert prepared
    values = torch.randn(10 * BLOCK)
    dither = 7 if stochastic else None
    payload = encode(name, values, dither=dither)
    own = decode(Form(name, len(values)), payload) if decoded else payload
    difference(Form(name, len(values)), own, payload)
    assert set(kernels._compiled) == prepared


def test_nothing_is_prepared_where_nothing_may_be_compiled() -> None:
    kernels.configure(compile=False)
    prepare(Form("int8", 1 << 30))
    assert not kernels._compiled
    kernels.configure(compile=True)
    prepare(Form("float32", 1 << 30))
    prepare(Form("int8", 100))
    assert not kernels._compiled
