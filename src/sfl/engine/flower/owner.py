"""Whose a run on a SuperLink of others is: of who has the key that it was begun with.

The run's id is made of the public key, so it leads to no other run's folder, and every order is signed: to know an id,
or to have seen an order for it, is not enough to give one. An order counts once; a copy of it is refused.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from sfl.errors import EngineError
from sfl.io.tree import write_text

KEY = "owner.key"
"""In the run's folder of whoever began it, readable by them alone: their private key."""

SIGNED = ("launch.json", "program.json", "recipe.json")
_PROOF = "owner.json"


@dataclass(frozen=True, slots=True)
class Order:
    """A signed order.

    Attributes:
        run: Id of the run that it is for: 32 hexadecimal digits.
        moment: When it was given, in nanoseconds since 1970 by the clock of who gave it.
    """

    run: str
    moment: int

    def take(self, note: Path, flower: int) -> None:
        """Take the order up, once, and note that in a file.

        Args:
            note: What was taken up before.
            flower: Flower's number of the run that brings it; the same one may bring it again.

        Raises:
            EngineError: If it, or a later one, was taken up before.
        """
        last = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {"moment": 0, "flower": flower}
        if self.moment < last["moment"] or (self.moment == last["moment"] and flower != last["flower"]):
            raise EngineError(
                f"an order for the run {self.run} must be new, got a copy of one that was given before. "
                "Resume the run from the folder that it was begun in; the clock there must not go back."
            )
        write_text(note, json.dumps({"moment": self.moment, "flower": flower}) + "\n")


def new_key() -> bytes:
    """A private key."""
    return Ed25519PrivateKey.generate().private_bytes_raw()


def run_of(key: bytes) -> str:
    """The id of the run that a private key owns."""
    return _id(Ed25519PrivateKey.from_private_bytes(key).public_key().public_bytes_raw())


def sign(folder: Path, key: bytes) -> None:
    """Sign the order in a folder."""
    private, moment = Ed25519PrivateKey.from_private_bytes(key), time.time_ns()
    proof = {
        "public": private.public_key().public_bytes_raw().hex(),
        "moment": moment,
        "signature": private.sign(_said(folder, moment)).hex(),
    }
    (folder / _PROOF).write_text(json.dumps(proof), encoding="utf-8")


def read_order(folder: Path) -> Order:
    """The order in a folder.

    Raises:
        EngineError: If its signature does not hold.
    """
    try:
        proof = json.loads((folder / _PROOF).read_text(encoding="utf-8"))
        public, moment = bytes.fromhex(proof["public"]), int(proof["moment"])
        signed = bytes.fromhex(proof["signature"])
        Ed25519PublicKey.from_public_bytes(public).verify(signed, _said(folder, moment))
    except (OSError, ValueError, KeyError, TypeError, InvalidSignature) as error:
        why = f"{type(error).__name__}: {error}".rstrip(": ")
        raise EngineError(f"an order must be signed with the key of its run, got one that is not. {why}") from error
    return Order(_id(public), moment)


def _id(public: bytes) -> str:
    return hashlib.sha256(b"sfl run" + public).hexdigest()[:32]


def _said(folder: Path, moment: int) -> bytes:
    """What is signed: the moment, and every file by its name and digest."""
    digests = [[name, hashlib.sha256((folder / name).read_bytes()).hexdigest()] for name in SIGNED]
    return json.dumps(["sfl order", moment, digests]).encode()
