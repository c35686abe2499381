"""Fixed point modulo 2^b: how real numbers are added up as words, and what rounding does to them.

A site's share of a mean is w δ, a sum's is Σ w δ. Each coordinate is clipped to [-c, c] and becomes the integer
rint(w δ s), with s the largest power of two for which the sum of n sites, each of weight W at most, cannot pass
2^(b-1): s (n W c) + n/2 < 2^(b-1). Then

    | Σ q / (s Σ w) - Σ w δ / Σ w |  ≤  n / (2 s Σ w)

for every coordinate within the clip: n² c / 2^(b-1) / n at most where all weigh the same. Integers are not rounded:
they travel in words of 64 bits, beside the weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from sfl.core.aggregator import sum_dtype
from sfl.errors import CompositionError, ProtocolError
from sfl.types import Array, Parameters

__all__ = ["CLIPPED", "FixedPoint", "Words"]

CLIPPED = "clipped_values"
"""The figure that says which share of all values of a round's updates was cut off."""
_WIDE = 2  # words of 64 bits that stand before a site's integers: its weight, and how many values were clipped
_BLOCK = 1 << 16


@dataclass(slots=True)
class Words:
    """What is masked: reals as words of b bits, and words of 64 bits.

    Attributes:
        narrow: Of 32 bits, or 64 if b is larger; only the last b of each count.
        wide: Of 64 bits: the weight, the number of clipped values, then integers.
    """

    narrow: Array
    wide: Array

    @property
    def both(self) -> tuple[Array, Array]:
        """In the order in which masks cover them."""
        return self.narrow, self.wide

    def add(self, other: Words) -> None:
        """Word by word, modulo their size."""
        np.add(self.narrow, other.narrow, out=self.narrow)
        np.add(self.wide, other.wide, out=self.wide)


@dataclass(frozen=True, slots=True)
class FixedPoint:
    """How the updates of one round become words, and their sum an update.

    Attributes:
        bits: b, of a word: a multiple of 8 from 16 to 48.
        clip: c.
        count: n: sites of the round.
        heaviest: W: the largest weight of a site.
        grid: Where noise has put values on multiples of a power of two, that: then nothing is rounded or clipped here,
            and what passes 2^(b-1) wraps. 0 elsewhere.
    """

    bits: int
    clip: float
    count: int
    heaviest: float = 1.0
    grid: float = 0.0

    @property
    def scale(self) -> float:
        """s: words for one.

        Raises:
            CompositionError: If so many sites leave no room in a word.
        """
        if self.grid:
            return 1.0 / self.grid
        room = 2.0 ** (self.bits - 1) - 1.0 - self.count / 2.0
        most = self.count * self.heaviest * self.clip
        if room <= self.count:
            raise CompositionError(
                f"secagg_bits must leave room for the sum of {self.count} sites, got {self.bits}. Set more."
            )
        return 2.0 ** math.floor(math.log2(room / most))

    @property
    def error(self) -> float:
        """The largest error that rounding makes in a coordinate of the mean, where all sites weigh ``heaviest``."""
        return 0.0 if self.grid else 0.5 / (self.scale * self.heaviest)

    @property
    def dtype(self) -> np.dtype[np.uint32] | np.dtype[np.uint64]:
        """Of the words in memory."""
        return np.dtype("<u4") if self.bits <= 32 else np.dtype("<u8")

    def zeros(self, expected: Parameters) -> Words:
        """The words of no update."""
        narrow = sum(value.size for value in expected.values() if value.dtype.kind == "f")
        wide = sum(value.size for value in expected.values() if value.dtype.kind != "f")
        return Words(np.zeros(narrow, self.dtype), np.zeros(_WIDE + wide, "<u8"))

    def encoded(self, delta: Parameters, weight: float, expected: Parameters) -> Words:
        """The words of one update; an array that it has left out counts as zeros.

        Args:
            delta: Finite real arrays.
            weight: A whole number from 1 to ``heaviest``.
            expected: All arrays that it may hold.
        """
        words = self.zeros(expected)
        at_narrow, at_wide, clipped = 0, _WIDE, 0
        for name, like in expected.items():
            value = delta.get(name)
            if like.dtype.kind == "f":
                if value is not None:
                    clipped += self._encode(value, weight, words.narrow[at_narrow : at_narrow + like.size])
                at_narrow += like.size
            else:
                if value is not None:
                    whole = np.rint(value).astype(np.int64).reshape(-1)
                    self._require_room(whole)
                    whole *= int(weight)
                    words.wide[at_wide : at_wide + like.size] = whole.view(np.uint64)
                at_wide += like.size
        words.wide[0], words.wide[1] = int(weight), clipped
        return words

    def _require_room(self, whole: Array) -> None:
        """Refuse whole numbers whose sum over all sites may not fit.

        Raises:
            ProtocolError: If one is too large.
        """
        largest = max(abs(int(whole.min(initial=0))), abs(int(whole.max(initial=0))))
        if largest * self.heaviest * self.count >= 2.0**63:
            raise ProtocolError(
                f"whole numbers of an update must fit a sum of 64 bits, got {largest}. It sends nothing."
            )

    def _encode(self, value: Array, weight: float, out: Array) -> int:
        flat, clipped = np.ascontiguousarray(value).reshape(-1), 0
        for start in range(0, flat.size, _BLOCK):
            block = flat[start : start + _BLOCK].astype(np.float64)
            if not self.grid:
                clipped += int(np.count_nonzero(np.abs(block) > self.clip))
                np.clip(block, -self.clip, self.clip, out=block)
            block *= weight * self.scale
            out[start : start + _BLOCK] = np.rint(block).astype(np.int64).view(np.uint64).astype(out.dtype)
        return clipped

    def packed(self, words: Words) -> Parameters:
        """As they travel: of each word the bytes that count."""
        narrow = words.narrow.reshape(-1, 1).view(np.uint8)[:, : self.bits // 8]
        return {"words": np.ascontiguousarray(narrow).reshape(-1), "wide": words.wide.view(np.uint8)}

    def unpacked(self, arrays: Parameters) -> Words:
        """What ``packed`` made."""
        size, came = self.bits // 8, np.ascontiguousarray(arrays["words"])
        wide = np.frombuffer(arrays["wide"].tobytes(), "<u8")
        if size == self.dtype.itemsize and came.ctypes.data % size == 0:
            return Words(came.view(self.dtype), wide)
        narrow = np.zeros((came.size // size, self.dtype.itemsize), np.uint8)
        narrow[:, :size] = came.reshape(-1, size)
        return Words(narrow.view(self.dtype).reshape(-1), wide)

    def sizes(self, expected: Parameters) -> Parameters:
        """Arrays like those that travel, of which nothing is allocated."""
        zeros = self.zeros({name: value for name, value in expected.items() if value.dtype.kind != "f"})
        narrow = sum(value.size for value in expected.values() if value.dtype.kind == "f")
        nothing = np.zeros(1, np.uint8)
        return {
            "words": np.broadcast_to(nothing, (narrow * (self.bits // 8),)),
            "wide": np.broadcast_to(nothing, (zeros.wide.nbytes,)),
        }

    def decoded(self, total: Words, expected: Parameters) -> tuple[Parameters, float, int]:
        """The weighted mean, Σ w, and how many values were clipped, of the words of a sum."""
        weight, clipped = float(total.wide[0]), int(total.wide[1])
        mean: Parameters = {}
        at_narrow, at_wide = 0, _WIDE
        for name, like in expected.items():
            out = np.empty(like.shape, sum_dtype(like))
            if like.dtype.kind == "f":
                self._decode(total.narrow[at_narrow : at_narrow + like.size], 1.0 / weight, out.reshape(-1))
                at_narrow += like.size
            else:
                whole = total.wide[at_wide : at_wide + like.size].view(np.int64)
                np.divide(whole.reshape(like.shape), weight, out=out)
                at_wide += like.size
            mean[name] = out
        return mean, weight, clipped

    def _decode(self, words: Array, factor: float, out: Array) -> None:
        shift = 8 * self.dtype.itemsize - self.bits
        signed = np.dtype(f"<i{self.dtype.itemsize}")
        for start in range(0, words.size, _BLOCK):
            block = words[start : start + _BLOCK]
            whole = (block << self.dtype.type(shift)).view(signed) >> signed.type(shift)
            values = whole.astype(np.float64)
            values /= self.scale
            values *= factor
            out[start : start + _BLOCK] = values

    def of(self, count: int) -> FixedPoint:
        """The same for so many sites."""
        return replace(self, count=count)
