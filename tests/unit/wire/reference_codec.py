"""The int codecs once more, slowly: numpy, one block and one value at a time, from the format."""

from __future__ import annotations

from typing import Any

import numpy as np

BLOCK = 128
F32 = np.float32
Values = np.ndarray[Any, Any]


def bits_of(name: str) -> int:
    return int(name.removeprefix("int"))


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


def round_up_to_f16(x: float) -> float:
    step = np.float16(min(x, 7e4)) if x < 65520 else np.float16(np.inf)
    if float(step) < x:
        step = np.nextafter(step, np.float16(np.inf))
    return float(step)


def block_step(name: str, block: Values, dither: int | None) -> float:
    bits = bits_of(name)
    levels = 2 ** (bits - 1) - 1
    largest = F32(np.abs(block).max())
    if bits == 2 and dither is None:
        return round_up_to_f16(float(largest * F32(0.5)))
    return round_up_to_f16(float(largest / F32(levels)))


def block_integers(
    name: str, block: Values, step: float, number: int, dither: int | None
) -> list[int]:
    bits = bits_of(name)
    integers = []
    for column, x in enumerate(block):
        scaled = F32(x) / F32(step or 1.0)
        if dither is None:
            k = int(np.rint(scaled))
        else:
            low = np.floor(scaled)
            k = int(low) + int(np.floor((scaled - low) + F32(uniform(dither, number, column))))
        if bits == 2:
            k = max(-1, min(1, k))
        integers.append(k)
    return integers


def encode(name: str, values: Values, dither: int | None = None) -> bytes:
    bits = bits_of(name)
    steps, codes = b"", b""
    for number in range(-(-len(values) // BLOCK)):
        block = values[number * BLOCK : (number + 1) * BLOCK]
        step = block_step(name, block, dither)
        integers = block_integers(name, block, step, number, dither)
        steps += np.float16(step).tobytes()
        m = -(-len(block) * bits // 8)
        for j in range(m):
            byte = 0
            for i, k in enumerate(integers[j::m]):
                byte |= (k % 2**bits) << (i * bits)
            codes += bytes([byte])
    return steps + codes


def decode(name: str, payload: bytes, n: int) -> Values:
    bits = bits_of(name)
    blocks = -(-n // BLOCK)
    steps = np.frombuffer(payload[: 2 * blocks], dtype="<f2").astype(F32)
    codes = payload[2 * blocks :]
    out = np.empty(n, dtype=F32)
    for number in range(blocks):
        start, end = number * BLOCK, min((number + 1) * BLOCK, n)
        m = -(-(end - start) * bits // 8)
        data, codes = codes[:m], codes[m:]
        for column in range(end - start):
            i, j = divmod(column, m)
            k = (data[j] >> (i * bits)) % 2**bits
            if k >= 2 ** (bits - 1):
                k -= 2**bits
            out[start + column] = F32(k) * steps[number]
    return out
