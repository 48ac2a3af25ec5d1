"""Codecs: GB/s of float32 on one core, error and size, beside hivemind's fp16 codec.

Compiled and plain kernels, hivemind's codec among them, take turns, and medians are taken; so a
busy machine slows all of them alike. Every compiled payload is compared with the plain one.

hivemind's UNIFORM_8BIT and QUANTILE_8BIT are not measured: they crash with current numpy.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import torch
from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor
from hivemind.proto.runtime_pb2 import CompressionType

from benchmarks.common import RESULTS, emit, say, write_result
from xpeer.forms import Form
from xpeer.wire import kernels
from xpeer.wire.codec import FLOATS, NAMES, decode, encode_into
from xpeer.wire.merge import difference

mpl.use("Agg")
import matplotlib.pyplot as plt

NUM_VALUES = 1 << 24
"""64 MiB of float32: twice the third-level cache of most servers' cores."""
Cases = dict[str, Callable[[], object]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions; writes no result")
    quick = parser.parse_args().quick
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(NUM_VALUES, generator=generator) * 0.02
    # as far from ours as partners' values were in our runs: one hundredth, relative
    others = values + torch.randn(NUM_VALUES, generator=generator) * 2e-4
    codecs = ("int8", "int4") if quick else NAMES
    repetitions = 5 if quick else 15
    per_codec = {}
    for name in codecs:
        say(f"{name}: compiling")
        per_codec[name] = measure(name, values, others, repetitions)
        say(f"{name}: {per_codec[name]}")
    int8 = per_codec["int8"]
    ours, theirs = int8.get("compiled", int8["plain"]), int8["hivemind_fp16"]
    summary = {
        "quantise_gb_s": ours["quantise"],
        "dequantise_gb_s": ours["merge"],
        "stochastic_gb_s": ours["stochastic"],
        "vs_hivemind": round(_both(ours["quantise"], ours["dequantise"])
                             / _both(theirs["quantise"], theirs["dequantise"]), 2),
        "fallback_quantise_gb_s": int8["plain"]["quantise"],
        "fallback_dequantise_gb_s": int8["plain"]["merge"],
        "compiled": "compiled" in int8,
    }  # fmt: skip
    if not quick:
        details = {"num_values": NUM_VALUES, "repetitions": repetitions, "codecs": per_codec}
        write_result("codec", summary, details, "python -m benchmarks.codec")
        draw(per_codec)
    emit("codec", summary)


def measure(
    name: str, values: torch.Tensor, others: torch.Tensor, repetitions: int
) -> dict[str, Any]:
    """All figures of one codec, with hivemind's fp16 codec taking turns."""
    compiled = _cases(name, values, others, compiled=True)
    can_compile = kernels.compiling()
    plain = _cases(name, values, others, compiled=False)
    fp16 = serialize_torch_tensor(values, CompressionType.FLOAT16)
    hivemind: Cases = {
        "quantise": lambda: serialize_torch_tensor(values, CompressionType.FLOAT16),
        "dequantise": lambda: deserialize_torch_tensor(fp16),
    }
    groups = {"compiled": compiled, "plain": plain, "hivemind_fp16": hivemind}
    if name in FLOATS or not can_compile:
        del groups["compiled"]  # floats: torch converts in one pass
    flat = {(group, op): run for group, ops in groups.items() for op, run in ops.items()}
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in flat}
    for _ in range(repetitions):
        for key, run in flat.items():
            start = time.perf_counter()
            run()
            seconds[key].append(time.perf_counter() - start)
    speeds: dict[str, Any] = {group: {} for group in groups}
    for (group, op), times in seconds.items():
        speeds[group][op] = round(4 * NUM_VALUES / statistics.median(times) / 1e9, 2)
    bits = 8 * Form(name, NUM_VALUES).num_bytes / NUM_VALUES
    return {"bits_per_value": bits, **_errors(name, values, others), **speeds}


def _cases(name: str, values: torch.Tensor, others: torch.Tensor, *, compiled: bool) -> Cases:
    """Each operation, run once, so that nothing is compiled while the clock runs."""
    ours, theirs, rough = (bytearray(Form(name, NUM_VALUES).num_bytes) for _ in range(3))
    out = torch.empty(NUM_VALUES)
    kernels.configure(compile=compiled)
    encode_into(name, values, memoryview(ours))
    encode_into(name, others, memoryview(theirs))

    def switched(run: Callable[[], object]) -> Callable[[], object]:
        def case() -> object:
            kernels.configure(compile=compiled)
            return run()

        return case

    cases: Cases = {
        "quantise": lambda: encode_into(name, values, memoryview(ours)),
        "stochastic": lambda: encode_into(name, values, memoryview(rough), dither=1),
        "dequantise": lambda: decode(Form(name, NUM_VALUES), theirs, out=out),
        "merge": lambda: difference(Form(name, NUM_VALUES), ours, theirs, out=out),
    }
    if name in FLOATS:
        del cases["stochastic"]
    for run in cases.values():
        run()
    if compiled and kernels.compiling():
        _assert_same_bytes(name, values, (ours, rough))
    return {op: switched(run) for op, run in cases.items()}


def _assert_same_bytes(name: str, values: torch.Tensor, made: tuple[bytearray, bytearray]) -> None:
    kernels.configure(compile=False)
    for payload, dither in zip(made, _roundings(name), strict=False):
        plain = bytearray(len(payload))
        encode_into(name, values, memoryview(plain), dither=dither)
        if plain != payload:
            raise SystemExit(f"{name}: compiled and plain bytes differ")
    kernels.configure(compile=True)


def _roundings(name: str) -> tuple[int | None, ...]:
    """Dithers: None is to nearest."""
    return (None,) if name in FLOATS else (None, 1)


def _errors(name: str, values: torch.Tensor, others: torch.Tensor) -> dict[str, Any]:
    """Root mean square, relative to the values' (x) and to the distance of partners (z)."""
    found: dict[str, Any] = {}
    for dither in _roundings(name):
        rounding = "nearest" if dither is None else "stochastic"
        payload = bytearray(Form(name, NUM_VALUES).num_bytes)
        encode_into(name, values, memoryview(payload), dither=dither)
        error = decode(Form(name, NUM_VALUES), payload).sub_(values).norm()
        found[f"error_{rounding}"] = float(f"{float(error / values.norm()):.3g}")
        found[f"error_{rounding}_of_distance"] = float(
            f"{float(error / (values - others).norm()):.3g}"
        )
    return found


def _both(first: float, second: float) -> float:
    """Speed of one after the other."""
    return 1 / (1 / first + 1 / second)


def draw(per_codec: dict[str, Any]) -> None:
    ops = ("quantise", "stochastic", "dequantise", "merge")
    figure, axes = plt.subplots(1, len(ops), figsize=(14, 4), sharey=True)
    for axis, op in zip(axes, ops, strict=True):
        for offset, group in ((-0.2, "compiled"), (0.2, "plain")):
            speeds = [per_codec[n].get(group, {}).get(op, 0.0) for n in per_codec]
            rows = [i + offset for i in range(len(per_codec))]
            axis.barh(rows, speeds, height=0.4, label=group)
        reference = per_codec["int8"]["hivemind_fp16"].get(op)
        if reference:
            axis.axvline(reference, color="black", linestyle=":", label="hivemind fp16")
        axis.set_title(op)
        axis.set_xlabel("GB/s of float32, one core")
        axis.set_yticks(range(len(per_codec)), list(per_codec))
        axis.invert_yaxis()
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "codec.png", dpi=120)


if __name__ == "__main__":
    main()
