"""Arrays in fewer bits, as what travels: codes, the scales of their blocks, and the shape that they are of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from sfl.core import arrays, sparse
from sfl.core.codes import BLOCKS, CODED, code_nbytes, decode, encode, encode_remembering
from sfl.core.sparse import WHERE
from sfl.errors import UpdateError
from sfl.types import Array, Parameters

__all__ = ["FLOAT32", "FORM", "SCALE", "SMALLEST", "is_packed", "nbytes", "packed", "remembering", "unpacked"]

FLOAT32: Final = "float32"
"""Arrays as they are, whatever they are."""

SCALE: Final = "\x1fscale"
"""What is added to an array's name for the scales of its blocks."""

FORM: Final = "\x1fform"
"""What is added to an array's name for what it was: bytes of an element, then its shape."""

SMALLEST: Final = 64
"""Arrays of fewer elements travel as they are: there is little to save, and biases and counts are among them."""

_SIDES = (SCALE, FORM)


def is_packed(arrays: object) -> bool:
    """Whether there are codes among them, whatever arrived."""
    return isinstance(arrays, dict) and any(str(name).endswith(_SIDES) for name in arrays)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


def packed(
    parameters: Mapping[str, Array],
    form: str,
    *,
    thin: bool = False,
    bounded: bool = False,
    smallest: int = SMALLEST,
) -> Parameters:
    """The same arrays, those of floats as codes.

    Whole numbers, statistics of BatchNorm (a variance may not become negative), arrays of fewer elements than
    ``smallest`` and floats that are no wider than the codes are not coded. Names and their order stay.

    Args:
        parameters: Named arrays of any shape.
        form: ``"bfloat16"``, ``"float16"``, ``"int8"`` or ``"nf4"``.
        thin: Whether zeros are left out first, where that is smaller: then blocks are of what is no zero.
        bounded: Whether no array's L2 norm may rise.
        smallest: See above.

    Raises:
        UpdateError: If an array that is coded holds NaN or inf.
    """
    out: Parameters = {}
    for name, value in parameters.items():
        if not _is_coded(name, value, form, smallest):
            out |= sparse.packed({name: value}) if thin else {name: value}
            continue
        rest: Array = value.reshape(-1)
        where: Array | None = None
        if thin:
            apart = sparse.packed({name: rest}, width=code_nbytes(rest.size, form) / rest.size)
            rest, where = apart[name], apart.get(name + WHERE)
        try:
            codes, scales = encode(rest, form, bounded=bounded)
        except UpdateError:
            raise _not_finite(name, form) from None
        out |= _named(name, value, codes, scales, where)
    return out


def unpacked(arrays: Mapping[str, Array], like: Mapping[str, Array] | None = None) -> Parameters:
    """What was packed, in new memory where there were codes.

    Args:
        arrays: What arrived. Nothing of it is trusted.
        like: What is expected: then shapes, dtypes and the memory taken are theirs. Without it they are what the arrays
            say of themselves, as long as there are codes for every element.

    Raises:
        UpdateError: If codes, scales and positions do not fit each other, or the array that is expected.
    """
    names = [name for name in arrays if not name.endswith((*_SIDES, WHERE))]
    coded = {name for name in names if name + FORM in arrays}
    sides = {name + side for name in coded for side in (*_SIDES, WHERE)}
    bare = {name: value for name, value in arrays.items() if name not in coded | sides}
    if stray := [name for name in bare if name.endswith((*_SIDES, *([] if like is not None else [WHERE])))]:
        raise UpdateError(f"scales, shapes and positions must come with codes, got none for {stray[0]!r}.")
    rest = bare if like is None else sparse.unpacked(bare, like)
    return {
        name: _whole(name, arrays, _expected(name, arrays[name + FORM], arrays[name], like))
        if name in coded
        else rest[name]
        for name in names
    }


def remembering(
    parameters: Mapping[str, Array],
    memory: Mapping[str, Array] | None,
    form: str,
    *,
    thin: bool = False,
    smallest: int = SMALLEST,
) -> tuple[Parameters, Parameters, Parameters]:
    """Pack arrays together with what rounding has left of those before: error feedback.

    With memory m, p = w + m; Q(p) leaves, and m becomes p − Q(p) (Seide et al., INTERSPEECH 2014; Stich, Cordonnier and
    Jaggi, NeurIPS 2018, Algorithm 1).

    Args:
        parameters: w.
        memory: m, by name; arrays that it does not name have none yet.
        form: As for ``packed``.
        thin: Likewise; then what is zero stays zero, and its memory waits for a value.
        smallest: Likewise.

    Returns:
        What travels, what it is for who receives it, and the new memory.

    Raises:
        UpdateError: If an array that is coded holds NaN or inf.
    """
    travels: Parameters = {}
    received: Parameters = {}
    left = dict(memory or {})
    for name, value in parameters.items():
        if not _is_coded(name, value, form, smallest):
            travels |= packed({name: value}, form, thin=thin, smallest=smallest)
            received[name] = value
            left.pop(name, None)
            continue
        before = left[name] if name in left else np.zeros_like(value)
        if thin and np.count_nonzero(value) < value.size:
            part, received[name], left[name] = _with_zeros(name, value, before, form, smallest)
        else:
            part, received[name], left[name] = _dense(name, value, before, form)
        travels |= part
    return travels, received, left


def _dense(name: str, value: Array, memory: Array, form: str) -> tuple[Parameters, Array, Array]:
    """What travels of one array, what that is for who receives it, and what is left."""
    try:
        codes, scales, decoded, left = encode_remembering(value.reshape(-1), memory.reshape(-1), form)
    except UpdateError:
        raise _not_finite(name, form) from None
    return _named(name, value, codes, scales), decoded.reshape(value.shape), left.reshape(value.shape)


def _with_zeros(name: str, value: Array, memory: Array, form: str, smallest: int) -> tuple[Parameters, Array, Array]:
    """Likewise; what is zero stays zero, and its memory waits for a value."""
    now = np.where(value != 0, memory, np.zeros((), value.dtype))
    whole = value + now
    part = packed({name: whole}, form, thin=True, smallest=smallest)
    received = unpacked(part, {name: whole})[name]
    return part, received, np.asarray(whole - received + (memory - now))


def nbytes(parameters: Mapping[str, Array], form: str, *, smallest: int = SMALLEST) -> int:
    """Bytes of what ``packed`` gives where no zeros are left out. It follows from names, shapes and dtypes alone.

    >>> model = {"w": np.broadcast_to(np.float32(0), (50_000, 20_000))}  # of 4 GB, and of no memory
    >>> [round(nbytes(model, form) / 4e9, 3) for form in ("bfloat16", "float16", "int8", "nf4")]
    [0.5, 0.5, 0.254, 0.141]
    """
    total = 0
    for name, value in parameters.items():
        is_coded = _is_coded(name, value, form, smallest)
        total += code_nbytes(value.size, form) + 8 * (1 + value.ndim) if is_coded else value.nbytes
    return total


def _is_coded(name: str, value: Array, form: str, smallest: int) -> bool:
    worth = value.size >= smallest and code_nbytes(value.size, form) < value.nbytes
    return worth and arrays.is_trained(name, value)


def _named(name: str, value: Array, codes: Array, scales: Array | None, where: Array | None = None) -> Parameters:
    """The codes of an array, and what goes with them."""
    sides = {SCALE: scales, WHERE: where, FORM: _form(value)}
    return {name: codes, **{name + side: found for side, found in sides.items() if found is not None}}


def _not_finite(name: str, form: str) -> UpdateError:
    return UpdateError(f"{name!r} must be finite to travel as {form}, got NaN or inf.")


def _form(value: Array) -> Array:
    return np.array([value.itemsize, *value.shape], np.int64)


def _expected(name: str, form: Array, codes: Array, like: Mapping[str, Array] | None) -> Array:
    """An array of the shape and dtype of what arrived: without memory of its own."""
    said = form.tolist() if form.dtype == np.int64 and form.ndim == 1 and 1 <= form.size <= 65 else [0]
    if like is not None:
        known = like.get(name)
        if known is None or known.dtype.kind != "f" or said[1:] != list(known.shape):
            raise UpdateError(f"{name!r} must be an array of the model, of its shape, got {said[1:]} of codes.")
        return known
    if said[0] not in (2, 4, 8) or min(said[1:], default=0) < 0 or math.prod(said[1:]) > 2 * codes.size:
        raise UpdateError(f"{name!r} must have a code for each element, got {codes.size} for {said}.")
    return np.broadcast_to(np.zeros((), f"f{said[0]}"), said[1:])


def _whole(name: str, got: Mapping[str, Array], like: Array) -> Array:
    """Of one array, checked."""
    codes, scales, where = got[name], got.get(name + SCALE), got.get(name + WHERE)
    count = like.size if where is None else _count(name, where, like.size)
    form = next((form for form, dtype in CODED.items() if codes.dtype == dtype), "")
    if codes.ndim != 1 or not form or codes.size != (-(-count // 2) if form == "nf4" else count):
        raise UpdateError(f"{name!r} must have a code for each of {count} elements, got {codes.dtype} {codes.shape}.")
    _check_scales(name, scales, -(-count // BLOCKS[form]) if form in BLOCKS else None)
    flat: np.ndarray[Any, Any] = np.empty(count, like.dtype)
    with np.errstate(over="ignore"):  # what is not finite then is refused as such
        decode(codes, scales, flat)
    if where is None:
        return flat.reshape(like.shape)
    return sparse.unpacked({name: flat, name + WHERE: where}, {name: like})[name]


def _check_scales(name: str, scales: Array | None, count: int | None) -> None:
    if count is None and scales is None:
        return
    fits = scales is not None and scales.dtype == np.float32 and scales.shape == (count,)
    if scales is None or not fits or not arrays.is_finite(scales) or (scales < 0).any():
        raise UpdateError(f"{name!r} must have a finite scale of 0 or more for each block of its codes.")


def _count(name: str, where: Array, size: int) -> int:
    """How many values stand at these positions; whether they are in order is looked at with the values."""
    if where.ndim == 1 and where.dtype == np.uint32 and where.size <= size:
        return where.size
    if where.ndim == 1 and where.dtype == np.uint8 and where.size == -(-size // 8):
        return int(np.bitwise_count(where).sum())
    raise UpdateError(f"the positions of {name!r} must be at most {size}, or a bit for each element.")
