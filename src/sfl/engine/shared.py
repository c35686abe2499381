"""Arrays in memory that parent and workers share: anonymous files, so nothing is left behind by ``kill -9``."""

from __future__ import annotations

import math
import mmap
import os
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sfl.types import Array, Parameters

_ALIGN = 64
_LARGE = 1 << 28  # bytes; below, to map pages anew would take longer than it is worth


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each array of a ``Parameters`` lies in a buffer: (name, dtype, shape, offset)."""

    entries: tuple[tuple[str, str, tuple[int, ...], int], ...]
    nbytes: int

    @classmethod
    def of(cls, parameters: Mapping[str, Array]) -> Layout:
        """Arrays one after the other, each on a cache line of its own."""
        return cls.at([(name, value.dtype.str, value.shape) for name, value in parameters.items()])

    @classmethod
    def at(cls, specs: Sequence[tuple[str, str, tuple[int, ...]]]) -> Layout:
        """The same, of arrays that are said by name, dtype and shape."""
        entries: list[tuple[str, str, tuple[int, ...], int]] = []
        offset = 0
        for name, dtype, shape in specs:
            entries.append((name, dtype, shape, offset))
            offset += -(-math.prod(shape) * np.dtype(dtype).itemsize // _ALIGN) * _ALIGN
        return cls(tuple(entries), max(offset, _ALIGN))

    @property
    def slot_nbytes(self) -> int:
        """Room for any delta of these shapes, whatever its dtype. Pages that are never written cost nothing."""
        return sum(-(-math.prod(shape) * 8 // _ALIGN) * _ALIGN for _, _, shape, _ in self.entries) or _ALIGN

    def views(self, buffer: mmap.mmap | memoryview, *, writeable: bool) -> Parameters:
        """The arrays inside ``buffer``, without a copy."""
        views: Parameters = {}
        for name, dtype, shape, offset in self.entries:
            count = int(np.prod(shape, dtype=np.int64))
            array = np.frombuffer(buffer, dtype=np.dtype(dtype), count=count, offset=offset).reshape(shape)
            array.flags.writeable = writeable
            views[name] = array
        return views


def open_anonymous(nbytes: int) -> int:
    """A file descriptor over ``nbytes`` of memory that has no name and goes with its last user."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("sfl", os.MFD_CLOEXEC)
    else:  # macOS: an unlinked file in the temporary folder serves as well
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, nbytes)
    return descriptor


def write(views: Mapping[str, Array], values: Mapping[str, Array]) -> None:
    """Copy ``values`` into a buffer's views."""
    for name, value in values.items():
        np.copyto(views[name], value)


def leave(buffer: mmap.mmap) -> None:
    """Take large shared memory off this process's account. What lies in it stays, and is there when it is looked at."""
    if len(buffer) >= _LARGE and sys.platform == "linux":
        buffer.madvise(mmap.MADV_DONTNEED)


class Published:
    """Parameters in memory that other processes map. It is let go with the last reference to it.

    Args:
        layout: What lies in it.

    Attributes:
        descriptor: To hand to who maps it.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout, self.descriptor = layout, open_anonymous(layout.nbytes)
        weakref.finalize(self, os.close, self.descriptor)
        self._buffer = mmap.mmap(self.descriptor, layout.nbytes)
        self._views = layout.views(self._buffer, writeable=True)

    def write(self, parameters: Mapping[str, Array]) -> None:
        """Put ``parameters``, of this layout, in place of what was there."""
        write(self._views, parameters)
        leave(self._buffer)
