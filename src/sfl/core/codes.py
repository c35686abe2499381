"""Numbers in fewer bits: blocks of floats as codes, and back. Everything is done in pieces that stay in the cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from sfl.core.arrays import BLOCK
from sfl.errors import UpdateError
from sfl.types import Array

__all__ = ["BLOCKS", "CODED", "LEVELS", "code_nbytes", "decode", "encode", "encode_remembering"]

CODED: Final[dict[str, np.dtype[Any]]] = {
    "bfloat16": np.dtype(np.uint16),
    "float16": np.dtype(np.float16),
    "int8": np.dtype(np.int8),
    "nf4": np.dtype(np.uint8),
}
"""The dtype of the codes, by format; of nf4 each holds two. It says which format arrived."""

BLOCKS: Final = {"int8": 256, "nf4": 64}
"""Elements that share a scale."""

LEVELS: Final = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=np.float32,
)
"""NormalFloat of 4 bits (Dettmers et al., NeurIPS 2023, Appendix E)."""

_MIDDLES = ((LEVELS[1:].astype(np.float64) + LEVELS[:-1]) / 2.0).astype(np.float32)
_PAIRS = np.stack([LEVELS[np.arange(256) >> 4], LEVELS[np.arange(256) & 15]], axis=1).view(np.complex64)[:, 0]
_LEAST = np.float32(2.0**-100)  # a block of smaller numbers is zeros: its products would lose bits
_MOST = np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0))  # 127 of it are finite
_MARGIN = 1.0 - 2.0**-20  # as a clip's: rounding cannot leave what is scaled past its norm


def code_nbytes(count: int, form: str) -> int:
    """Bytes of the codes and scales of ``count`` numbers."""
    codes = -(-count // 2) if form == "nf4" else count * CODED[form].itemsize
    return codes + (4 * -(-count // BLOCKS[form]) if form in BLOCKS else 0)


def encode(flat: Array, form: str, *, bounded: bool = False) -> tuple[Array, Array | None]:
    """One row of floats as codes, and the scale of each block where the format has them.

    Args:
        flat: Of shape (n,), any float dtype.
        form: One of ``CODED``.
        bounded: Whether the decoded row's L2 norm may not exceed this one's, in float arithmetic too.

    Raises:
        UpdateError: If a number is NaN or inf.

    | input | decoded |
    |---|---|
    | past the largest bfloat16 or float16 | that largest |
    | a block of int8 or nf4 with nothing above 2⁻¹⁰⁰ | zeros |
    | subnormal numbers, as bfloat16 or float16 | to the nearest, as others |
    | no numbers | none |
    """
    width = BLOCKS.get(form, 1)
    codes, scales = _room(flat.size, form)
    for start in range(0, flat.size, BLOCK):
        piece = _single(flat[start : start + BLOCK])
        if scales is None:
            _refuse_not_finite(np.abs(piece).max())
            codes[start : start + BLOCK] = _HALVES[form](piece, bounded)
            continue
        rows = _rows(piece, width)
        here = scales[start // width : start // width + len(rows)]
        here[:] = _scales(rows, form)
        found = _ROWS[form](rows, here)
        target = codes[start // 2 : (start + BLOCK) // 2] if form == "nf4" else codes[start : start + BLOCK]
        target[:] = found[: target.size]
        if bounded:
            here *= _shrinking(rows, found, here)
    return codes, scales


def encode_remembering(flat: Array, memory: Array, form: str) -> tuple[Array, Array | None, Array, Array]:
    """One row of floats together with what was left of the one before, in one pass.

    Args:
        flat: Of shape (n,), float32 or float64.
        memory: Likewise, of the same dtype.
        form: One of ``CODED``.

    Returns:
        Codes and scales of ``flat + memory``, as ``encode`` gives them; what they decode to; and what is left.

    Raises:
        UpdateError: If a number is NaN or inf.
    """
    width = BLOCKS.get(form, 1)
    codes, scales = _room(flat.size, form)
    decoded, left = np.empty_like(flat), np.empty_like(flat)
    for start in range(0, flat.size, BLOCK):
        part = slice(start, start + BLOCK)
        whole = flat[part] + memory[part]
        found, here = encode(whole, form)
        at = start // 2 if form == "nf4" else start
        codes[at : at + found.size] = found
        if scales is not None and here is not None:
            scales[start // width : start // width + here.size] = here
        decode(found, here, decoded[part])
        np.subtract(whole, decoded[part], out=left[part])
    return codes, scales, decoded, left


def decode(codes: Array, scales: Array | None, out: Array) -> None:
    """Write what the codes stand for into ``out``, of shape (n,) and any float dtype.

    Args:
        codes: As ``encode`` gives them, of a dtype of ``CODED``.
        scales: Likewise.
        out: As long as what was encoded.
    """
    for start in range(0, out.size, BLOCK):
        target = out[start : start + BLOCK]
        if scales is None:
            _put(_wide(codes[start : start + BLOCK]), target)
        elif codes.dtype == np.int8:
            _scaled(codes[start : start + BLOCK], scales[start // BLOCKS["int8"] :], BLOCKS["int8"], target)
        else:
            parts = np.take(_PAIRS, codes[start // 2 : (start + BLOCK) // 2]).view(np.float32)[: target.size]
            _scaled(parts, scales[start // BLOCKS["nf4"] :], BLOCKS["nf4"], target)


def _room(count: int, form: str) -> tuple[Array, Array | None]:
    """For the codes and the scales of so many numbers."""
    codes = np.empty(-(-count // 2) if form == "nf4" else count, CODED[form])
    return codes, np.empty(-(-count // BLOCKS[form]), np.float32) if form in BLOCKS else None


def _refuse_not_finite(largest: np.floating[Any]) -> None:
    if not math.isfinite(float(largest)):
        raise UpdateError("what is quantised must be finite, got NaN or inf.")


def _single(piece: Array) -> Array:
    """In float32, never larger than it was: what is wider is rounded toward zero."""
    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(piece, dtype=np.float32)
    if piece.dtype.itemsize > 4:
        single.view(np.uint32)[np.abs(single) > np.abs(piece)] -= np.uint32(1)
    return single


def _bfloat16(piece: Array, bounded: bool) -> Array:
    bits = piece.view(np.uint32)
    if not bounded:
        bits = bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))  # to nearest, of two the even one
    codes = (bits >> np.uint32(16)).astype(np.uint16)
    codes -= (codes & np.uint16(0x7FFF)) == np.uint16(0x7F80)
    return codes


def _float16(piece: Array, bounded: bool) -> Array:
    with np.errstate(over="ignore", under="ignore"):
        codes = piece.astype(np.float16)
    bits = codes.view(np.uint16)
    if bounded:
        bits -= np.abs(codes.astype(np.float32)) > np.abs(piece)
    else:
        bits -= (bits & np.uint16(0x7FFF)) == np.uint16(0x7C00)
    return codes


_HALVES: Final[dict[str, Callable[[Array, bool], Array]]] = {"bfloat16": _bfloat16, "float16": _float16}


def _rows(piece: Array, width: int) -> Array:
    """One row a block; the last is filled up with zeros."""
    if piece.size % width:
        piece = np.concatenate([piece, np.zeros(-piece.size % width, np.float32)])
    return piece.reshape(-1, width)


def _scales(rows: Array, form: str) -> Array:
    largest = np.maximum.reduceat(np.abs(rows.reshape(-1)), np.arange(0, rows.size, rows.shape[1]))
    _refuse_not_finite(largest.max())
    scales = np.minimum(largest / np.float32(127), _MOST) if form == "int8" else largest
    scales[largest < _LEAST] = 0.0
    return scales


def _inverse(scales: Array) -> Array:
    return np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)[:, None]


def _int8(rows: Array, scales: Array) -> Array:
    product = rows * _inverse(scales)
    return np.rint(product, out=product).astype(np.int8).reshape(-1)


def _nf4(rows: Array, scales: Array) -> Array:
    """Two codes a byte: how many middles between levels lie below a number is its level's place."""
    product = rows * _inverse(scales)
    places, above = np.zeros(rows.shape, np.uint8), np.empty(rows.shape, np.bool_)
    for middle in _MIDDLES:
        places += np.greater(product, middle, out=above).view(np.uint8)
    flat = places.reshape(-1)
    return (flat[0::2] << np.uint8(4)) | flat[1::2]


_ROWS: Final[dict[str, Callable[[Array, Array], Array]]] = {"int8": _int8, "nf4": _nf4}


def _shrinking(rows: Array, found: Array, scales: Array) -> np.float32:
    """What the scales are multiplied with, so that the norm is no larger than it was."""
    decoded = np.empty(rows.size, np.float32)
    decode(found, scales, decoded)
    wide = [part.reshape(-1).astype(np.float64) for part in (rows, decoded)]
    before, after = (math.sqrt(float(np.square(part, out=part).sum())) for part in wide)
    return np.float32(1.0 if after <= before * _MARGIN else before / after * _MARGIN)


def _wide(codes: Array) -> Array:
    if codes.dtype == np.float16:
        return codes.astype(np.float32)
    return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _scaled(parts: Array, scales: Array, width: int, target: Array) -> None:
    """``target = parts * scales``, each scale for the ``width`` numbers that share it; the last may be for fewer."""
    count = parts.size // width
    whole = count * width
    product = np.multiply(parts[:whole].reshape(-1, width), scales[:count, None], dtype=np.float32)
    _put(product.reshape(-1), target[:whole])
    if whole < parts.size:
        _put(np.multiply(parts[whole:], scales[count], dtype=np.float32), target[whole:])


def _put(values: Array, target: Array) -> None:
    """In the target's dtype, never larger than they are: what a clip has bounded stays within it in half precision."""
    target[:] = values if target.dtype.itemsize >= 4 else _float16(np.asarray(values, np.float32), bounded=True)
