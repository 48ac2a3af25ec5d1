"""How parameter values become bytes: float32, bfloat16 or blockwise int8.

The size of a payload follows from the codec and the number of values alone, both of which the
receiver knows from its own manifest; so nothing is ever allocated by a length that a peer claims.
All integers and floats are little endian. Decoding is one IEEE multiplication per value, so every
machine gets the same bits.

int8: blocks of 128 values share one float16 scale; the payload holds all scales, then all values.
Rounding is to nearest and deterministic: both sides of an exchange must know Q(own) exactly.

What a codec does not give: privacy. `compress` takes only what the privacy mechanism stamped.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import torch

from xpeer.errors import LocalError, PeerError, Reason
from xpeer.update import CompressedUpdate, PrivateUpdate

BLOCK: Final = 128
_CHUNK_VALUES: Final = 256 * BLOCK
"""128 KiB of float32: stays in the second-level cache, and below torch's threading threshold."""
_SCALE_BYTES: Final = 2
_VALUE_BYTES: Final = {"float32": 4, "bfloat16": 2, "int8": 1}
_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NAMES: Final = tuple(_VALUE_BYTES)


def encoded_bytes(name: str, num_values: int) -> int:
    """Exact payload size in bytes; a receiver checks it before it reads or allocates.

    Raises:
        LocalError: unknown codec.
    """
    return num_values * _value_bytes(name) + _SCALE_BYTES * _num_blocks(name, num_values)


def compress(update: PrivateUpdate, codec: str) -> CompressedUpdate:
    """The only way from values to bytes that leave the trainer.

    Raises:
        TypeError: not a `PrivateUpdate`.
        LocalError: as `encode`.
    """
    if not isinstance(update, PrivateUpdate):
        raise TypeError("only a PrivateUpdate may be compressed: stamp it first")
    return CompressedUpdate(
        payload=encode(codec, update.values),
        codec=codec,
        num_values=update.values.numel(),
        step=update.step,
        stamp=update.stamp,
    )


def encode(name: str, values: torch.Tensor) -> bytes:
    """Values as bytes.

    Args:
        name: codec.
        values: (n,) float32, CPU.

    Raises:
        LocalError: values that are not finite, or too large for the codec: the model diverged.
    """
    out = bytearray(encoded_bytes(name, values.numel()))
    encode_into(name, values, memoryview(out))
    return bytes(out)


def encode_into(name: str, values: torch.Tensor, out: memoryview) -> None:
    """`encode` into a writable buffer of exactly `encoded_bytes(name, n)` bytes.

    Raises:
        LocalError: as `encode`; also a buffer of the wrong size.
    """
    if values.dtype != torch.float32 or values.dim() != 1 or values.device.type != "cpu":
        raise LocalError("a codec takes flat float32 values on the CPU")
    if out.nbytes != encoded_bytes(name, values.numel()):
        raise LocalError(f"the buffer has {out.nbytes} bytes, wrong for {values.numel()} {name}")
    if values.numel() == 0:
        return
    values = values.detach()
    raw = torch.frombuffer(out, dtype=torch.uint8)
    if name == "int8":
        _encode_int8(values, raw)
        return
    target = raw.view(_DTYPES[name])
    target.copy_(values)
    if not _all_finite(target):
        raise _diverged()


def decode(name: str, payload: bytes | bytearray | memoryview, num_values: int) -> torch.Tensor:
    """Bytes from a partner as values; nothing is allocated before the size was checked.

    Args:
        name: codec.
        payload: as received.
        num_values: what our own manifest says, never what the partner says.

    Returns:
        (num_values,) float32, CPU.

    Raises:
        PeerError: wrong size (MALFORMED, OVERSIZE), a negative scale (MALFORMED), or a value or
            scale that is not finite (NOT_FINITE).
    """
    expected = encoded_bytes(name, num_values)
    size = memoryview(payload).nbytes
    if size != expected:
        reason = Reason.OVERSIZE if size > expected else Reason.MALFORMED
        raise PeerError(reason, f"payload of {size} bytes, {expected} expected")
    if num_values == 0:
        return torch.empty(0, dtype=torch.float32)
    # torch wants a writable buffer; production payloads lie in shared memory and are not copied
    writable = bytearray(payload) if memoryview(payload).readonly else payload
    raw = torch.frombuffer(writable, dtype=torch.uint8)
    if name == "int8":
        return _decode_int8(raw, num_values)
    values = raw.view(_DTYPES[name]).to(torch.float32, copy=True)
    if not _all_finite(values):
        raise PeerError(Reason.NOT_FINITE, "a value is not finite")
    return values


def _encode_int8(values: torch.Tensor, raw: torch.Tensor) -> None:
    """One pass in chunks; the last, short block goes alone."""
    n = values.numel()
    num_blocks = _num_blocks("int8", n)
    scales = raw[: num_blocks * _SCALE_BYTES].view(torch.float16)
    quantised = raw[num_blocks * _SCALE_BYTES :].view(torch.int8)
    whole = n - n % BLOCK
    scratch = torch.empty(min(n, _CHUNK_VALUES), dtype=torch.float32)
    for start in range(0, whole, _CHUNK_VALUES):
        end = min(start + _CHUNK_VALUES, whole)
        _encode_blocks(
            values[start:end].view(-1, BLOCK),
            scales[start // BLOCK : end // BLOCK],
            quantised[start:end].view(-1, BLOCK),
            scratch[: end - start].view(-1, BLOCK),
        )
    if whole < n:
        _encode_blocks(
            values[whole:].view(1, -1),
            scales[-1:],
            quantised[whole:].view(1, -1),
            scratch[: n - whole].view(1, -1),
        )


def _encode_blocks(
    values: torch.Tensor,  # (blocks, width) float32
    scales: torch.Tensor,  # (blocks,) float16, written
    quantised: torch.Tensor,  # (blocks, width) int8, written
    scratch: torch.Tensor,  # (blocks, width) float32
) -> None:
    """A scale is max|x| / 127, rounded *up* to float16, so that no value needs clamping and the
    error stays within half a scale, among the subnormals too.
    """
    # a NaN survives amax; the norm that does the same in one call is 15 times slower
    exact = torch.abs(values, out=scratch).amax(dim=1).div_(127.0)
    rounded = exact.to(torch.float16)
    too_small = rounded.to(torch.float32) < exact
    # positive floats order like their bits: adding one to them is the next larger float16
    rounded = (rounded.view(torch.int16) + too_small).view(torch.float16)
    if not bool(torch.isfinite(rounded).all()):
        raise _diverged()
    scales.copy_(rounded)
    divisor = rounded.to(torch.float32)
    divisor.masked_fill_(divisor == 0, 1.0)  # a block of zeros
    torch.div(values, divisor.unsqueeze(1), out=scratch)
    quantised.copy_(scratch.round_())


def _decode_int8(raw: torch.Tensor, num_values: int) -> torch.Tensor:
    num_blocks = _num_blocks("int8", num_values)
    head = num_blocks * _SCALE_BYTES
    # a copy: a sender that still writes to the buffer can't change scales that were checked
    scales = torch.from_numpy(raw[:head].numpy().view(np.float16).astype(np.float32))
    if not bool(torch.isfinite(scales).all()):
        raise PeerError(Reason.NOT_FINITE, "a scale is not finite")
    if bool((scales < 0).any()):
        raise PeerError(Reason.MALFORMED, "a scale is negative")
    quantised = raw[head:].view(torch.int8)
    out = torch.empty(num_values, dtype=torch.float32)
    whole = num_values - num_values % BLOCK
    for start in range(0, whole, _CHUNK_VALUES):
        end = min(start + _CHUNK_VALUES, whole)
        chunk = out[start:end].view(-1, BLOCK)
        chunk.copy_(quantised[start:end].view(-1, BLOCK))
        chunk.mul_(scales[start // BLOCK : end // BLOCK].unsqueeze(1))
    if whole < num_values:
        torch.mul(quantised[whole:], scales[-1], out=out[whole:])
    return out


def _all_finite(values: torch.Tensor) -> bool:
    """Without a second array of the values' size: extremes carry every infinity and NaN."""
    chunks = torch.split(values, _CHUNK_VALUES)
    return all(math.isfinite(float(x)) for chunk in chunks for x in chunk.aminmax())


def _value_bytes(name: str) -> int:
    try:
        return _VALUE_BYTES[name]
    except KeyError:
        raise LocalError(f"codec {name!r} is unknown", f"valid: {', '.join(NAMES)}") from None


def _num_blocks(name: str, num_values: int) -> int:
    return -(-num_values // BLOCK) if name == "int8" else 0


def _diverged() -> LocalError:
    return LocalError(
        "the parameters are not finite or too large to be sent: training diverged",
        "restart from an older checkpoint with a smaller learning rate",
    )
