"""What sites and server tell each other in a round of secure aggregation, as arrays of bytes and scalars."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from sfl.core.task import Task
from sfl.errors import ProtocolError
from sfl.privacy.secagg.primitives import KEY
from sfl.types import Array

__all__ = [  # noqa: RUF022 - plain order
    "AGREE",
    "ALIVE",
    "Bundle",
    "KEYS",
    "LARGEST",
    "OWN",
    "SHARES",
    "UNMASK",
    "as_array",
    "as_bytes",
    "as_list",
    "digest_of",
    "place_of",
    "require_names",
    "run_of",
]

KEYS: Final = "secagg-keys"
SHARES: Final = "secagg-shares"
AGREE: Final = "secagg-agree"
UNMASK: Final = "secagg-unmask"
ALIVE: Final = "secagg_alive"
"""Under which a step says which sites it is about: one bit for each, as hexadecimal digits."""
OWN: Final = "secagg_"
"""What the names of the protocol's own scalars begin with."""
RUN: Final = "secagg_run"
SITES: Final = "secagg_sites"
LARGEST: Final = 1 << 14
"""Bytes of a site's keys with its certificate, at most."""
_HEAD = 3 * KEY


def as_array(data: bytes) -> Array:
    """Bytes as what engines carry."""
    return np.frombuffer(data, np.uint8)


def as_bytes(arrays: Mapping[str, Array], name: str, nbytes: int | None = None) -> bytes:
    """Bytes that came under a name.

    Raises:
        ProtocolError: If there are none, or another number than ``nbytes``, where that is known.
    """
    value = arrays.get(name)
    if (
        value is None
        or value.dtype != np.uint8
        or value.ndim != 1
        or value.size != (value.size if nbytes is None else nbytes)
    ):
        got = "none" if value is None else f"{value.dtype} of shape {value.shape}"
        raise ProtocolError(f"{name!r} must be {'some' if nbytes is None else nbytes} bytes, got {got}.")
    return value.tobytes()


def as_list(names: Sequence[str]) -> str:
    """Names as one scalar."""
    return "\n".join(names)


def require_names(arrays: Mapping[str, Array], names: Collection[str]) -> None:
    """Refuse an answer that holds anything else than what was asked for.

    Raises:
        ProtocolError: If it does.
    """
    if set(arrays) != set(names):
        strange = sorted(set(arrays).symmetric_difference(names))
        raise ProtocolError(f"an answer must hold what was asked for, got {strange[0]!r:.80} missing or beyond it.")


def digest_of(task: Task) -> bytes:
    """What a task to train is: its model and its scalars. Sites that were sent others share no masks."""
    digest = hashlib.sha256()
    scalars = {name: value for name, value in task.config.items() if not name.startswith(OWN)}
    digest.update(json.dumps([task.round, scalars], sort_keys=True).encode())
    for name in sorted(task.parameters):
        value = task.parameters[name]
        little = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
        digest.update(json.dumps([name, little.dtype.str, list(value.shape)]).encode())
        digest.update(little.reshape(-1).view(np.uint8).data)
    return digest.digest()


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
        return f"sfl secagg keys\n{run}\n{round}\n{site}\n".encode() + keys

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
