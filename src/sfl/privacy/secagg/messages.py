"""What sites and server tell each other in a round of secure aggregation, as arrays of bytes and scalars."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from sfl.core.task import Task
from sfl.errors import ProtocolError
from sfl.privacy.secagg.primitives import KEY
from sfl.types import Array

__all__ = ["ALIVE", "Bundle", "KEYS", "SHARES", "UNMASK", "as_array", "as_bytes", "as_list", "place_of", "run_of"]  # noqa: RUF022 - plain order

KEYS: Final = "secagg-keys"
SHARES: Final = "secagg-shares"
UNMASK: Final = "secagg-unmask"
ALIVE: Final = "secagg_alive"
"""Under which a step says which sites it is about: one bit for each, as hexadecimal digits."""
RUN: Final = "secagg_run"
SITES: Final = "secagg_sites"
DIGEST: Final = 32
_HEAD = 3 * KEY


def as_array(data: bytes) -> Array:
    """Bytes as what engines carry."""
    return np.frombuffer(data, np.uint8)


def as_bytes(arrays: Mapping[str, Array], name: str, nbytes: int = 0) -> bytes:
    """Bytes that came under a name.

    Raises:
        ProtocolError: If there are none, or another number than ``nbytes``, where that is known.
    """
    value = arrays.get(name)
    if value is None or value.dtype != np.uint8 or value.ndim != 1 or (nbytes and value.size != nbytes):
        got = "none" if value is None else f"{value.dtype} of shape {value.shape}"
        raise ProtocolError(f"{name!r} must be {nbytes or 'some'} bytes, got {got}.")
    return value.tobytes()


def as_list(names: Sequence[str]) -> str:
    """Names as one scalar."""
    return "\n".join(names)


def place_of(names: Sequence[str], name: str) -> int:
    """Where a polynomial is read for one of a site's neighbours: its place among them, from 1."""
    return list(names).index(name) + 1


def run_of(task: Task) -> str:
    """Which run a step belongs to.

    Raises:
        ProtocolError: If it does not say.
    """
    run = task.config.get(RUN)
    if not isinstance(run, str) or not run:
        raise ProtocolError(f"a step of secure aggregation must say of which run it is, got {run!r}.")
    return run


@dataclass(frozen=True, slots=True)
class Bundle:
    """A site's keys of one round, signed.

    Attributes:
        channel: Public key with which shares are sealed for it.
        masking: Public key with which it and a neighbour agree on a mask.
        commitment: SHA-256 of the seed of its own mask.
        certificate: What it shows of itself.
        signature: Over the keys, the commitment, the run, the round and its name.
    """

    channel: bytes
    masking: bytes
    commitment: bytes
    certificate: bytes
    signature: bytes

    @staticmethod
    def signed_part(site: str, run: str, round: int, keys: bytes) -> bytes:
        """What a signature is over."""
        about = f"sfl secagg keys\n{run}\n{round}\n{site}\n".encode()
        return hashlib.sha256(about + keys).digest() + about + keys

    @property
    def keys(self) -> bytes:
        """Both keys and the commitment."""
        return self.channel + self.masking + self.commitment

    @property
    def packed(self) -> bytes:
        """As it travels."""
        return self.keys + len(self.certificate).to_bytes(4, "little") + self.certificate + self.signature

    @property
    def digest(self) -> bytes:
        """What the list of a round's sites says of it."""
        return hashlib.sha256(self.packed).digest()

    @classmethod
    def of(cls, data: bytes) -> Bundle:
        """What ``packed`` made.

        Raises:
            ProtocolError: If it is not whole.
        """
        size = int.from_bytes(data[_HEAD : _HEAD + 4], "little")
        end = _HEAD + 4 + size
        if len(data) <= end:
            raise ProtocolError(f"keys of a site must be whole, got {len(data)} bytes.")
        keys = [data[start : start + KEY] for start in range(0, _HEAD, KEY)]
        return cls(keys[0], keys[1], keys[2], data[_HEAD + 4 : end], data[end:])
