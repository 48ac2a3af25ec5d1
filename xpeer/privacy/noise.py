"""Noise and sampling that nobody can replay.

Every bit comes from the operating system, or from a cipher with a fresh key from the operating
system. A partner who could reproduce the noise would subtract it. So nothing here has a seed that
could be stored, checkpointed, logged or shared, and there is no state to copy. torch's own
generators won't do on a CPU: `manual_seed` keeps 32 of its 64 bits, which can be searched, the
Mersenne Twister is linear, and float32 normals end at 5.8 standard deviations.

Noise is the stream of AES-256 in counter mode, turned into normals in float64 (Box and Muller
1958). Every tensor has a fresh key of 256 bits. A value takes 9 ns on one CPU thread, 1 for the
cipher and 8 for logarithm and cosines, so 135 M parameters take 1.2 s. With every bit from the
kernel it was 58 ns. torch's own normals would take 4 ns, but a CPU offers nothing weaker than AES.
On CUDA the fast way is the device's Philox under a fresh key of 64 bits. The cryptographic way
makes the stream on the CPU and the normals on the device.

Precision: the radius has 63 random bits, so tails end at 9.3 standard deviations (a normal lies
beyond with a probability of 1e-20). The angle has 53. The result is rounded to the tensor's type.

What this module does not give: protection against an observer of the lowest bits of the sums
(Mironov 2012, "On significance of the least significant bits for differential privacy").
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, Final, Literal, NoReturn

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from xpeer.errors import LocalError
from xpeer.privacy.fitting import Shortage, until_it_fits

Generator = Literal["fast", "cryptographic"]

_CHUNK: Final = 1 << 15
"""Pairs of normals made at once on a CPU. Their temporaries stay in the processor's cache."""
_DEVICE_CHUNK: Final = 1 << 20
"""Pairs of normals made at once on an accelerator. Their random bits are copied to it at once."""
_PHILOX_CHUNK: Final = 1 << 22
"""Normals that the device's own generator makes at once: of a large matrix a part."""
_LEAST: Final = 1 << 10
"""Normals that are made at once where memory is shortest."""
_SHORT: Final = Shortage(
    "the noise of a private step does not fit into memory, a few kilobytes at a time",
    "end what else uses the device, or set training.device to cpu",
)
_MANTISSA: Final = 53
_BLOCK: Final = 16
"""Bytes of an AES block. The cipher needs so many bytes of room beyond its output."""


class SecretGenerator:
    """Gaussian noise and Poisson samples. It can be neither copied nor pickled.

    Args:
        device: device of the tensors to fill.
        kind: "fast" uses the device's own generator on CUDA, "cryptographic" never does. Elsewhere
            both are the same.
    """

    def __init__(self, device: torch.device | str = "cpu", kind: Generator = "fast") -> None:
        device = torch.device(device)
        own = device.type == "cuda" and kind == "fast"
        self._philox = torch.Generator(device) if own else None
        self._divisor = 1
        """Of the normals that are made at once; it grows where memory runs out."""

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled."""
        raise TypeError("a SecretGenerator can't be copied or stored: noise must not be repeated")

    def __copy__(self) -> NoReturn:
        """Refuse to be copied."""
        self.__reduce__()

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        """Refuse to be copied."""
        self.__reduce__()

    @torch.no_grad()
    def gaussian_(self, tensor: Tensor, std: float) -> Tensor:
        """Fill a floating tensor with independent N(0, std^2), and return it.

        Raises:
            LocalError: std is not a finite positive number.
        """
        where = _where(tensor)
        in_place = tensor.device == where and tensor.is_contiguous()
        flat = tensor if in_place else torch.empty(tensor.shape, dtype=tensor.dtype, device=where)
        for part, normals in self._parts(flat, std):
            part.copy_(normals)
        return tensor if in_place else tensor.copy_(flat)

    @torch.no_grad()
    def add_gaussian_(self, tensor: Tensor, std: float) -> Tensor:
        """Add independent N(0, std^2) to a floating tensor, and return it.

        As many values as the tensor has are never there at once. Where memory runs out, fewer are.

        Raises:
            LocalError: std is not a finite positive number.
            ShortOfMemoryError: not even a few normals fit. Parts of the tensor have their noise and
                others don't: it must not be used.
        """
        if tensor.device != _where(tensor) or not tensor.is_contiguous():
            return tensor.add_(self.gaussian_(torch.empty_like(tensor), std))
        for part, normals in self._parts(tensor, std):
            part.add_(normals)  # of the same type and place: this takes no memory
        return tensor

    def _parts(self, tensor: Tensor, std: float) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of all parts of a contiguous tensor, each with as many normals, rounded to its
        type. One key is for the whole tensor.

        Where memory runs out while a part's normals are made, they are dropped, and the stream goes
        on with others, fewer at a time. None was used, so none is used twice. No part comes twice.

        Raises:
            LocalError: std is not a finite positive number.
            ShortOfMemoryError: see `add_gaussian_`.
        """
        if not (math.isfinite(std) and std > 0):
            raise LocalError(f"privacy noise: standard deviation {std!r} is out of range")
        flat, at = tensor.view(-1), 0
        most, draw = self._source(tensor, std)

        def rounded() -> Tensor:
            at_once = max(most // self._divisor, min(most, _LEAST))
            return draw(min(at_once, len(flat) - at)).to(flat.dtype)

        def fewer() -> str:
            if most // self._divisor <= _LEAST:
                return ""
            self._divisor *= 2
            return "fewer values of noise at a time"

        while at < len(flat):
            normals = until_it_fits(rounded, fewer, _SHORT)
            yield flat[at : at + len(normals)], normals
            at += len(normals)

    def _source(self, tensor: Tensor, std: float) -> tuple[int, Callable[[int], Tensor]]:
        """A fresh key for a tensor: the normals to make at once, and what makes so many."""
        device, philox = tensor.device, self._philox
        if philox is not None and device.type == "cuda":
            philox.manual_seed(int.from_bytes(os.urandom(8), "little"))

            def of_device(count: int) -> Tensor:
                wide = torch.empty(count, dtype=torch.float64, device=device)
                return wide.normal_(0.0, std, generator=philox)

            return _PHILOX_CHUNK, of_device
        stream = _Stream()

        def of_cipher(count: int) -> Tensor:
            words = stream.next(-(-count // 2)).to(device)
            return _box_muller(words)[:count].mul_(std)

        return 2 * (_DEVICE_CHUNK if device.type == "cuda" else _CHUNK), of_cipher

    def poisson_sample(self, num_records: int, probability: float) -> Tensor:
        """Choose each record independently with this probability.

        Exact, but for rounding the probability down by less than 2^-64. Two random bytes decide
        most records. Six more decide the others.

        Args:
            num_records: number of records to choose from.
            probability: q, in [0, 1].

        Returns:
            Indices of the chosen records, ascending, (m,) int64, CPU; m may be 0.

        Raises:
            LocalError: a number is out of range.
        """
        if num_records < 0 or not 0.0 <= probability <= 1.0:
            raise LocalError(f"privacy sampling: q = {probability!r} of {num_records} records")
        threshold = math.floor(Fraction(probability) * 2**64)
        high, low = threshold >> 48, threshold & ((1 << 48) - 1)
        if num_records == 0 or high == 1 << 16:
            return torch.arange(num_records)
        draws = torch.frombuffer(bytearray(os.urandom(2 * num_records)), dtype=torch.int16)
        limit = high - (1 << 15)  # int16 counts from -2^15
        chosen = draws < limit
        for i in (draws == limit).nonzero().flatten().tolist():
            chosen[i] = int.from_bytes(os.urandom(6), "little") < low
        return chosen.nonzero().flatten()

    def ranks_within(self, groups: Tensor) -> Tensor:
        """Draw a uniformly random order of the elements of each group.

        Args:
            groups: the group of each element, (m,) int64, ascending.

        Returns:
            Each element's place in its group, from 0: (m,) int64, CPU.
        """
        order = self.shuffled(len(groups))
        order = order[groups[order].argsort(stable=True)]
        first = torch.searchsorted(groups, groups)  # where each element's group begins
        places = torch.empty_like(order)
        places[order] = torch.arange(len(groups))
        return places - first

    def shuffled(self, num_records: int) -> Tensor:
        """Draw a permutation, (n,) int64, CPU. Elements with equal 64-bit keys are not shuffled."""
        keys = torch.frombuffer(bytearray(os.urandom(8 * max(1, num_records))), dtype=torch.int64)
        return keys[:num_records].argsort()


def take_room(totals: Sequence[Tensor]) -> None:
    """Take for a moment the memory that `add_gaussian_` needs beside these, in an estimate."""
    most = min(_PHILOX_CHUNK, max(total.numel() for total in totals))
    wide = torch.empty(most, dtype=torch.float64, device=totals[0].device)
    wide.to(totals[0].dtype)


def _where(tensor: Tensor) -> torch.device:
    """Where its noise is made: other devices than these two may lack float64."""
    return tensor.device if tensor.device.type == "cuda" else torch.device("cpu")


class _Stream:
    """AES-256 in counter mode over zeros. The operating system makes the key, and only the cipher
    keeps it.
    """

    def __init__(self) -> None:
        cipher = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(bytes(_BLOCK)))
        self._cipher = cipher.encryptor()
        self._zeros = b""
        self._bytes = bytearray()

    def next(self, pairs: int) -> Tensor:
        """Make (2, pairs) int64 random words. They are valid until the next call."""
        if len(self._zeros) < 16 * pairs:
            self._zeros, self._bytes = bytes(16 * pairs), bytearray(16 * pairs + _BLOCK)
        self._cipher.update_into(memoryview(self._zeros)[: 16 * pairs], self._bytes)
        words = torch.frombuffer(self._bytes, dtype=torch.int64, count=2 * pairs)
        return words.view(2, pairs)


def _box_muller(bits: Tensor) -> Tensor:
    """Turn (2, n) int64 random words into (2n,) float64 standard normals (Box and Muller 1958)."""
    radius = (bits[0] & ((1 << 63) - 1)).double()
    radius.add_(1.0).mul_(2.0**-63).clamp_(max=1.0).log_().mul_(-2.0).sqrt_()
    angle = (bits[1] & ((1 << _MANTISSA) - 1)).double().mul_(2.0 * math.pi * 2.0**-_MANTISSA)
    return torch.cat([angle.cos().mul_(radius), angle.sin().mul_(radius)])
