"""How parameter values become bytes, and back.

    float32, bfloat16      as they are, or rounded
    int8, int4, int2       blockwise quantised (see `blockwise`)

A payload's size follows only from its form (`forms.Form`: codec and number of values). The
receiver knows the form from its own manifest, so nothing is allocated by a length that a peer
claims. All integers and floats are little endian. Every result is the same bits on every machine.

Rounding is to nearest and deterministic, unless a `dither` seeds stochastic rounding, which is
unbiased. Either way a payload decodes to the same values at both ends. Both sides of an exchange
must know Q(own) exactly, so each decodes its own payload, too.

What a codec does not give: privacy. `compress` accepts only values that the privacy mechanism
stamped, and dither is no privacy noise.
"""

from __future__ import annotations

import math
from typing import Final

import torch

from xpeer import forms
from xpeer.errors import LocalError, PeerError, Reason
from xpeer.forms import Form
from xpeer.update import CompressedUpdate, PrivateUpdate
from xpeer.wire import int_payload as blocks
from xpeer.wire.blockwise import Blocks

_CHUNK_VALUES: Final = 1 << 17
"""512 KiB of float32: temporaries stay in the second-level cache."""
FLOATS: Final[dict[str, torch.dtype]] = {name: getattr(torch, name) for name in forms.FLOATS}
INTS: Final = {"int8": Blocks(8), "int4": Blocks(4), "int2": Blocks(2)}
NAMES: Final = (*FLOATS, *INTS)
Payload = bytes | bytearray | memoryview


def compress(
    update: PrivateUpdate,
    codec: str,
    *,
    dither: int | None = None,
    out: torch.Tensor | None = None,
) -> CompressedUpdate:
    """Encode private values. Values can leave the trainer in no other way.

    Args:
        update: stamped by the privacy mechanism.
        codec: one of `NAMES`.
        dither: as for `encode`.
        out: (bytes of the form,) uint8, receives the payload; None = new memory.

    Raises:
        TypeError: `update` is not a `PrivateUpdate`.
        LocalError: as `encode`.
    """
    if not isinstance(update, PrivateUpdate):
        raise TypeError("only a PrivateUpdate may be compressed: stamp it first")
    form = Form(codec, update.values.numel())
    if out is None:
        out = torch.empty(form.num_bytes, dtype=torch.uint8)
    payload = view(out)
    encode_into(codec, update.values, payload, dither=dither)
    return CompressedUpdate(payload, form, update.step, update.stamp)


def encode(
    name: str,
    values: torch.Tensor,
    *,
    dither: int | None = None,
) -> bytes:
    """Values as bytes.

    Args:
        name: codec.
        values: (n,) float32, CPU.
        dither: None = round to nearest. An integer seeds stochastic rounding (int codecs only):
            E[Q(x)] = x over seeds. Use another one for every payload. It is no secret, and hides
            nothing.

    Raises:
        LocalError: values are not finite or too large for the codec, so the model diverged; or an
            argument does not fit the codec.
    """
    out = bytearray(Form(name, values.numel()).num_bytes)
    encode_into(name, values, memoryview(out), dither=dither)
    return bytes(out)


def encode_into(
    name: str,
    values: torch.Tensor,
    out: memoryview,
    *,
    dither: int | None = None,
) -> None:
    """`encode` into a writable buffer of exactly `Form(name, n).num_bytes` bytes.

    Raises:
        LocalError: as `encode`; or the buffer has another size.
    """
    if values.dtype != torch.float32 or values.dim() != 1 or values.device.type != "cpu":
        raise LocalError("a codec takes flat float32 values on the CPU")
    _require_known(name)
    if out.nbytes != Form(name, values.numel()).num_bytes:
        raise LocalError(f"the buffer has {out.nbytes} bytes, wrong for {values.numel()} {name}")
    if dither is not None and name in FLOATS:
        raise LocalError(f"codec {name} rounds to nearest: it takes no dither")
    if values.numel() == 0:
        return
    values = values.detach().contiguous()
    raw = torch.frombuffer(out, dtype=torch.uint8)
    if name in INTS:
        blocks.encode(INTS[name], values, raw, dither=dither)
        return
    target = raw.view(FLOATS[name])
    target.copy_(values)
    if not _all_finite(target):
        raise forms.diverged()


def decode(form: Form, payload: Payload, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Decode a partner's bytes. Nothing is allocated before their size was checked.

    Args:
        form: from our own manifest, never from the partner.
        payload: as received.
        out: (num_values,) float32, receives the values; undefined after an error.

    Returns:
        (num_values,) float32, CPU.

    Raises:
        PeerError: the size is wrong (MALFORMED, OVERSIZE), a scale is negative or there are codes
            beyond the last value (MALFORMED), or a value or scale is not finite (NOT_FINITE).
        LocalError: an argument does not fit the codec.
    """
    raw = raw_payload(form, payload)
    check_flat(out, form.num_values)
    if out is None:
        out = torch.empty(form.num_values, dtype=torch.float32)
    return _read(form, raw, 0, out)


def decode_part(form: Form, payload: Payload, start: int, out: torch.Tensor) -> torch.Tensor:
    """Decode some of a payload's values; only these are checked.

    Args:
        form: of the payload.
        payload: as received.
        start: number of the first value.
        out: (n,) float32, receives the values; they must all be there.

    Raises:
        PeerError, LocalError: as `decode`.
    """
    raw, count = raw_payload(form, payload), out.numel()
    check_flat(out, count)
    if not 0 <= start <= form.num_values - count:
        raise LocalError(f"values {start} to {start + count} of {form.num_values} are not there")
    return _read(form, raw, start, out)


def _read(form: Form, raw: torch.Tensor, start: int, out: torch.Tensor) -> torch.Tensor:
    if not (count := out.numel()):
        return out
    if form.codec in INTS:
        blocks.decode(INTS[form.codec], raw, form.num_values, start, out)
        return out
    out.copy_(raw.view(FLOATS[form.codec])[start : start + count])
    if not _all_finite(out):
        raise PeerError(Reason.NOT_FINITE, "a value is not finite")
    return out


def raw_payload(form: Form, payload: Payload) -> torch.Tensor:
    """A payload as (bytes,) uint8, without a copy if it is writable.

    Raises:
        PeerError: the size is wrong (MALFORMED, OVERSIZE).
        LocalError: the codec is unknown.
    """
    _require_known(form.codec)
    size, expected = memoryview(payload).nbytes, form.num_bytes
    if size != expected:
        reason = Reason.OVERSIZE if size > expected else Reason.MALFORMED
        raise PeerError(reason, f"payload of {size} bytes, {expected} expected")
    if expected == 0:
        return torch.empty(0, dtype=torch.uint8)
    # torch wants a writable buffer; production payloads lie in shared memory and are not copied
    writable = bytearray(payload) if memoryview(payload).readonly else payload
    return torch.frombuffer(writable, dtype=torch.uint8)


def view(raw: torch.Tensor) -> memoryview:
    """The memory of a (bytes,) uint8 tensor on the CPU."""
    return memoryview(raw.numpy())  # type: ignore[arg-type]  # an array is a buffer


def check_flat(values: torch.Tensor | None, num_values: int) -> None:
    """Check that a tensor is contiguous (num_values,) float32 on the CPU; None passes.

    Raises:
        LocalError: it is not.
    """
    if values is None:
        return
    if values.shape != (num_values,) or values.dtype != torch.float32:
        raise LocalError(f"{tuple(values.shape)} {values.dtype} given, ({num_values},) needed")
    if values.device.type != "cpu" or not values.is_contiguous():
        raise LocalError("a codec works on contiguous values on the CPU")


def _all_finite(values: torch.Tensor) -> bool:
    """Whether all values are finite.

    Minimum and maximum show every infinity and NaN, and need no second array of the same size.
    """
    chunks = torch.split(values, _CHUNK_VALUES)
    return all(math.isfinite(float(x)) for chunk in chunks for x in chunk.aminmax())


def _require_known(name: str) -> None:
    if name not in NAMES:
        raise LocalError(f"codec {name!r} is unknown", f"valid: {', '.join(NAMES)}")
