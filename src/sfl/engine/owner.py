"""Whose a run on a federation of others is: of who has the key that it was begun with.

The run's id is made of the public key, so it leads to no other run's folder, and every order is signed: to know an id,
or to have seen an order for it, is not enough to give one. An order counts once; a copy of it is refused.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from sfl.errors import EngineError
from sfl.io.tree import write_text

KEY = "owner.key"
"""In the run's folder of whoever began it, readable by them alone: their private key."""

PROOF = "owner.json"
"""Beside what an order says: its moment, the digest of every file, the public key, the signature."""


@dataclass(frozen=True, slots=True)
class Order:
    """A signed order.

    Attributes:
        run: Id of the run that it is for: 32 hexadecimal digits.
        moment: When it was given, in nanoseconds since 1970 by the clock of who gave it.
    """

    run: str
    moment: int

    def take(self, note: Path, bearer: str) -> None:
        """Take the order up, once, and note that in a file.

        Args:
            note: What was taken up before.
            bearer: The engine's own name of the run or job that brings it; the same one may bring it again.

        Raises:
            EngineError: If it, or a later one, was taken up before.
        """
        last = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
        moment = int(last.get("moment", 0))
        if self.moment < moment or (self.moment == moment and bearer != last["bearer"]):
            raise EngineError(
                f"an order for the run {self.run} must be new, got a copy of one that was given before. "
                "Resume the run from the folder that it was begun in; the clock there must not go back."
            )
        write_text(note, json.dumps({"moment": self.moment, "bearer": bearer}) + "\n")


def new_key() -> bytes:
    """A private key."""
    return Ed25519PrivateKey.generate().private_bytes_raw()


def run_of(key: bytes) -> str:
    """The id of the run that a private key owns."""
    return _id(Ed25519PrivateKey.from_private_bytes(key).public_key().public_bytes_raw())


def sign(folder: Path, key: bytes, names: Sequence[str]) -> None:
    """Sign an order.

    Args:
        folder: Where it lies.
        key: The run's private key.
        names: The files of it that are signed.
    """
    private, moment = Ed25519PrivateKey.from_private_bytes(key), time.time_ns()
    digests = {name: _digest(folder / name) for name in names}
    proof = {
        "public": private.public_key().public_bytes_raw().hex(),
        "moment": moment,
        "digests": digests,
        "signature": private.sign(_said(moment, digests)).hex(),
    }
    (folder / PROOF).write_text(json.dumps(proof), encoding="utf-8")


def read_order(folder: Path, names: Sequence[str]) -> Order:
    """An order whose signature holds.

    Args:
        folder: Where it lies.
        names: The files that are to be trusted: all that were signed, or those of them that this machine is handed.

    Raises:
        EngineError: If the signature does not hold, or not for all of these files as they are.
    """
    try:
        proof = json.loads((folder / PROOF).read_text(encoding="utf-8"))
        public, moment = bytes.fromhex(proof["public"]), int(proof["moment"])
        digests = {str(name): str(digest) for name, digest in dict(proof["digests"]).items()}
        signed = bytes.fromhex(proof["signature"])
        Ed25519PublicKey.from_public_bytes(public).verify(signed, _said(moment, digests))
        changed = [name for name in names if _digest(folder / name) != digests[name]]
    except (OSError, ValueError, KeyError, TypeError, InvalidSignature) as error:
        raise _unsigned(f"{type(error).__name__}: {error}".rstrip(": ")) from error
    if changed:
        raise _unsigned(f"Changed since: {', '.join(changed)}")
    return Order(_id(public), moment)


def _unsigned(why: str) -> EngineError:
    return EngineError(f"an order must be signed with the key of its run, got one that is not. {why}")


def _id(public: bytes) -> str:
    return hashlib.sha256(b"sfl run" + public).hexdigest()[:32]


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _said(moment: int, digests: Mapping[str, str]) -> bytes:
    """What is signed: the moment, and every file by its name and digest."""
    return json.dumps(["sfl order", moment, sorted(digests.items())]).encode()
