"""The int codecs once more, slowly: numpy, one block and one value at a time, from the format."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

BLOCK = 128
F32 = np.float32
Values = np.ndarray[Any, Any]


def parse(name: str) -> tuple[int, bool]:
    """Bits, and whether modulo."""
    bits, _, modulo = name.removeprefix("int").partition("-")
    return int(bits), bool(modulo)


def lowbias32(x: int) -> int:
    x &= 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def splitmix64(x: int) -> int:
    mask = 2**64 - 1
    z = (x + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def uniform(seed: int, block: int, column: int) -> float:
    words = splitmix64(seed)
    key = lowbias32(lowbias32(block + (words & 0xFFFFFFFF)) + (words >> 32))
    return (lowbias32(key + column) >> 8) * 2.0**-24


def weights(width: int) -> list[int]:
    return [2 * i + 1 for i in sorted(range(1024), key=splitmix64)[:width]]


def round_up_to_f16(x: float) -> float:
    step = np.float16(min(x, 7e4)) if x < 65520 else np.float16(np.inf)
    if float(step) < x:
        step = np.nextafter(step, np.float16(np.inf))
    return float(step)


def block_step(name: str, block: Values, dither: int | None, reach: float | None) -> float:
    bits, modulo = parse(name)
    levels = 2 ** (bits - 1) - 1
    largest = F32(np.abs(block).max())
    if not modulo:
        if bits == 2 and dither is None:
            return round_up_to_f16(float(largest * F32(0.5)))
        return round_up_to_f16(float(largest / F32(levels)))
    wanted = largest * F32(0.25) if reach is None else F32(reach)
    least = max(float(largest) * 2.0**-17, 2.0**-24)
    return round_up_to_f16(max(float(wanted / F32(levels)), least))


def block_integers(
    name: str, block: Values, step: float, number: int, dither: int | None
) -> list[int]:
    bits, modulo = parse(name)
    integers = []
    for column, x in enumerate(block):
        scaled = F32(x) / F32(step or 1.0)
        if dither is None:
            k = int(np.rint(scaled))
        else:
            low = np.floor(scaled)
            k = int(low) + int(np.floor((scaled - low) + F32(uniform(dither, number, column))))
        if not modulo and bits == 2:
            k = max(-1, min(1, k))
        integers.append(k)
    return integers


def encode(
    name: str, values: Values, dither: int | None = None, reach: Values | None = None
) -> bytes:
    bits, modulo = parse(name)
    steps, checks, codes = b"", b"", b""
    for number in range(-(-len(values) // BLOCK)):
        block = values[number * BLOCK : (number + 1) * BLOCK]
        step = block_step(name, block, dither, None if reach is None else float(reach[number]))
        integers = block_integers(name, block, step, number, dither)
        steps += np.float16(step).tobytes()
        if modulo:
            turns = [(k + 2 ** (bits - 1)) // 2**bits for k in integers]
            low = [t - 64 * round(t / 64) for t in turns]  # half to even, like the codec
            total = sum(w * t for w, t in zip(weights(len(low)), low, strict=True))
            checks += struct.pack("<H", total % 2**16)
        m = -(-len(block) * bits // 8)
        for j in range(m):
            byte = 0
            for i, k in enumerate(integers[j::m]):
                byte |= (k % 2**bits) << (i * bits)
            codes += bytes([byte])
    return steps + checks + codes


def decode(name: str, payload: bytes, n: int, near: Values | None = None) -> Values:
    bits, modulo = parse(name)
    blocks = -(-n // BLOCK)
    steps = np.frombuffer(payload[: 2 * blocks], dtype="<f2").astype(F32)
    head = 2 * blocks
    checks = struct.unpack(f"<{blocks}H", payload[head : head + 2 * blocks]) if modulo else ()
    codes = payload[head + (2 * blocks if modulo else 0) :]
    out = np.empty(n, dtype=F32)
    for number in range(blocks):
        start, end = number * BLOCK, min((number + 1) * BLOCK, n)
        m = -(-(end - start) * bits // 8)
        data, codes = codes[:m], codes[m:]
        turns = []
        for column in range(end - start):
            i, j = divmod(column, m)
            k = (data[j] >> (i * bits)) % 2**bits
            if k >= 2 ** (bits - 1):
                k -= 2**bits
            if near is not None:
                expected = F32(near[start + column]) * (F32(1) / steps[number])
                turn = int(np.rint((expected - F32(k)) / F32(2**bits)))
                turns.append(turn)
                k += turn * 2**bits
            out[start + column] = F32(k) * steps[number]
        low = [t - 64 * round(t / 64) for t in turns]
        total = sum(w * t for w, t in zip(weights(len(low)), low, strict=True))
        if near is not None and total % 2**16 != checks[number]:
            out[start:end] = near[start:end]
    return out
