"""A site's half of secure aggregation, and what it refuses."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sfl.core.check import check_finite
from sfl.core.secure import SecureSite
from sfl.core.task import FIT, Task, Update
from sfl.errors import ProtocolError
from sfl.privacy.secagg.graph import arranged, neighbours
from sfl.privacy.secagg.identity import Identity
from sfl.privacy.secagg.memory import Memory
from sfl.privacy.secagg.messages import (
    AGREE,
    ALIVE,
    KEYS,
    OWN,
    SHARES,
    SITES,
    UNMASK,
    Bundle,
    as_array,
    as_bytes,
    digest_of,
    place_of,
    run_of,
)
from sfl.privacy.secagg.primitives import KEY, add_mask, agree, new_key, opened, public_of, sealed
from sfl.privacy.secagg.shamir import SHARE, shared
from sfl.types import Array, Parameters

if TYPE_CHECKING:
    from sfl.privacy.secagg.protocol import SecAgg

__all__ = ["SecAggSite", "mask_about", "mask_seed", "round_seed"]


class SecAggSite(SecureSite):
    """One site (Bell et al. 2020, Algorithm 2, and what a site must refuse lest a server learn more than the sum).

    Args:
        name: Its name.
        secure: As its job says it.
        identity: Who it is.
        memory: What it remembers.
    """

    def __init__(self, name: str, secure: SecAgg, identity: Identity, memory: Memory) -> None:
        self._name, self._secure = name, secure
        self._identity, self._memory = identity, memory

    def answer(self, task: Task) -> Update:
        """Make keys, share secrets out, or give shares back."""
        run = run_of(task)
        if task.name == KEYS:
            arrays = {"keys": as_array(self._begin(run, task.round).packed)}
        elif task.name == SHARES:
            arrays = self._share(run, task)
        elif task.name == AGREE:
            arrays = self._agree(run, task)
        elif task.name == UNMASK:
            arrays = self._unmask(run, task)
        else:
            raise ProtocolError(f"{self._name}: a step must be one of secure aggregation, got {task.name!r}.")
        return Update(self._name, arrays, 1.0)

    def _begin(self, run: str, round: int) -> Bundle:
        if self._identity.binding:
            pinned, last = self._memory.pinned(run), self._memory.last(FIT)
            self._require(pinned == run, "all rounds must be of the run that it was begun with, got another run")
            self._require(
                round > last,
                f"a round must be answered once, got round {round} again: two sums could differ by one site's update",
            )
        channel, masking, seed = new_key(), new_key(), secrets.token_bytes(KEY)
        keys = public_of(channel) + public_of(masking) + hashlib.sha256(seed).digest()
        signature = self._identity.sign(Bundle.signed_part(self._name, run, round, keys))
        bundle = Bundle(keys[:KEY], keys[KEY : 2 * KEY], keys[2 * KEY :], self._identity.certificate, signature)
        kept = {"channel": channel.hex(), "masking": masking.hex(), "seed": seed.hex(), "bundle": bundle.packed.hex()}
        self._memory.keep(run, round, kept)
        return bundle

    def _share(self, run: str, task: Task) -> Parameters:
        kept = self._memory.secrets(run, task.round)
        self._require("neighbours" not in kept, "shares of a round must be made once, got a second time")
        names = self._listed(task)
        own = Bundle.of(bytes.fromhex(kept["bundle"]))
        came = {other: Bundle.of(as_bytes(task.parameters, f"keys/{other}")) for other in names}
        self._require(came[self._name] == own, "the list of a round's sites must hold its own keys")
        for other, bundle in came.items():
            part = Bundle.signed_part(other, run, task.round, bundle.keys)
            self._identity.check(other, bundle.certificate, part, bundle.signature)
        seed = round_seed(run, task.round, b"".join(bundle.digest for bundle in came.values()))
        degree = self._secure.degree(len(names))
        around = neighbours(arranged(names, seed), self._name, degree.neighbours)
        places = [place_of(around, other) for other in around]
        parts = zip(
            shared(bytes.fromhex(kept["masking"]), degree.threshold, places),
            shared(bytes.fromhex(kept["seed"]), degree.threshold, places),
            strict=True,
        )
        channel, out = bytes.fromhex(kept["channel"]), dict[str, Array]()
        for other, pair in zip(around, parts, strict=True):
            key = agree(channel, came[other].channel, _pair(b"channel", run, task.round, self._name, other))
            out[f"to/{other}"] = as_array(sealed(key, b"".join(pair), _path(run, task.round, self._name, other)))
        keys = {other: came[other].keys.hex() for other in around}
        shown = {other: bundle.certificate.hex() for other, bundle in came.items()}
        listed = {"sites": "\n".join(names), "list": seed.hex(), "neighbours": keys, "certificates": shown}
        self._memory.keep(run, task.round, {**kept, **listed})
        return out

    def _listed(self, task: Task) -> list[str]:
        names = str(task.config.get(SITES, "")).split("\n")
        self._require(
            self._name in names and sorted(set(names)) == names and len(names) >= self._secure.least,
            f"a round must be of at least {self._secure.least} sites, each listed once and this one among them",
        )
        return names

    def opened(self, task: Task) -> Task:
        """The task without the protocol's own scalars.

        In a deployment a round is evaluated once, too: from the losses of many models of a server's choice it could
        work out what a site's training makes of one.
        """
        if task.name != FIT:
            if self._identity.binding:
                again = task.round <= self._memory.last(task.name)
                self._require(not again, f"a round must be evaluated once, got round {task.round} again")
                self._memory.note(task.name, task.round)
            return task
        kept = self._memory.secrets(run_of(task), task.round)
        self._require("neighbours" in kept and "alive" not in kept, "an update must be masked once, after the shares")
        self._alive(kept, task)  # refuses before the client has worked for nothing
        config = {name: value for name, value in task.config.items() if not name.startswith(OWN)}
        return replace(task, config=config)

    def _alive(self, kept: Mapping[str, Any], task: Task) -> list[str]:
        """Neighbours that have shared their secrets out.

        Raises:
            ProtocolError: If they are fewer than the threshold: then masks with those who pool what they know with the
                server could be all there are.
        """
        names = str(kept["sites"]).split("\n")
        alive = _marked(task, names)
        around = [other for other in kept["neighbours"] if other in alive]
        least = self._secure.degree(len(names)).threshold
        self._require(self._name in alive, "a site that is asked for its update must have shared its secrets out")
        self._require(len(around) >= least, f"at least {least} neighbours must take part, got {len(around)}")
        return around

    def closed(self, update: Update, task: Task, expected: Parameters) -> Update:
        """The update as words under masks."""
        run, round = run_of(task), task.round
        kept = self._memory.secrets(run, round)
        around = self._alive(kept, task)
        fixed = self._secure.fixed.of(len(str(kept["sites"]).split("\n")))
        weight = min(max(int(np.rint(update.weight)), 1), int(fixed.heaviest))
        check_finite(self._name, update.delta)
        words = fixed.encoded(update.delta, weight, expected)
        self._memory.keep(run, round, {**kept, "alive": "\n".join(around)})  # before it leaves: then never again
        self._memory.note(FIT, round)
        add_mask(words.both, bytes.fromhex(kept["seed"]))
        masking, digest = bytes.fromhex(kept["masking"]), digest_of(task)
        for other in around:
            public = bytes.fromhex(kept["neighbours"][other])[KEY : 2 * KEY]
            seed = mask_seed(masking, public, digest, mask_about(run, round, self._name, other))
            add_mask(words.both, seed, subtract=self._name > other)
        return replace(update, delta=fixed.packed(words), weight=1.0)

    def _agree(self, run: str, task: Task) -> Parameters:
        """Sign which sites a sum is of: once, and not of too few."""
        kept = self._memory.secrets(run, task.round)
        self._require(bool(kept.get("alive")) and "sum" not in kept, "a sum must be agreed on once, after the update")
        names = str(kept["sites"]).split("\n")
        summed, around = _marked(task, names), str(kept["alive"]).split("\n")
        staying = [other for other in around if other in summed]
        least, needed = self._secure.degree(len(names)).threshold, self._secure.needed(len(names))
        self._require(
            len(staying) >= least and self._name in summed,
            f"a sum must be of this site and at least {least} of its neighbours, got {len(staying)}",
        )
        self._require(len(summed) >= needed, f"a sum must be of at least {needed} sites, got {len(summed)}")
        marks = str(task.config[ALIVE])
        self._memory.keep(run, task.round, {**kept, "sum": marks})
        return {"agreed": as_array(self._identity.sign(_agreed(run, task.round, kept["list"], marks)))}

    def _unmask(self, run: str, task: Task) -> Parameters:
        kept = self._memory.secrets(run, task.round)
        self._require("sum" in kept, "shares must be given back once, after the sum was agreed on")
        marks = str(task.config.get(ALIVE))
        self._require(marks == kept["sum"], "shares must be given back for the sum that was agreed on, got another")
        names, around = str(kept["sites"]).split("\n"), str(kept["alive"]).split("\n")
        summed, needed = _marked(task, names), self._secure.needed(len(names))
        part = _agreed(run, task.round, kept["list"], marks)
        signers = [name for name in sorted(summed) if self._has_signed(name, kept, task, part)]
        self._require(
            len(signers) >= needed, f"at least {needed} sites must say that a sum is of the same, got {len(signers)}"
        )
        self._memory.keep(run, task.round, None)  # before anything leaves: one answer, and never both shares
        channel, out = bytes.fromhex(kept["channel"]), dict[str, Array]()
        for other in around:
            public = bytes.fromhex(kept["neighbours"][other])[:KEY]
            key = agree(channel, public, _pair(b"channel", run, task.round, self._name, other))
            came = as_bytes(task.parameters, f"from/{other}")
            try:
                both = opened(key, came, _path(run, task.round, other, self._name))
            except ProtocolError:  # its sender's fault, whom the others' shares may make up for
                continue
            out[f"of/{other}"] = as_array(both[SHARE:] if other in summed else both[:SHARE])
        return out

    def _has_signed(self, name: str, kept: Mapping[str, Any], task: Task, part: bytes) -> bool:
        try:
            signature = as_bytes(task.parameters, f"agreed/{name}")
            self._identity.check(name, bytes.fromhex(kept["certificates"][name]), part, signature)
        except ProtocolError:
            return False
        return True

    def ended(self) -> None:
        """Forget the secrets of a round that was not gone on with."""
        self._memory.forget()

    def _require(self, holds: bool, rule: str) -> None:
        if not holds:
            raise ProtocolError(f"{self._name}: {rule}. It sends nothing, as its server may be dishonest.")


def round_seed(run: str, round: int, digests: bytes) -> bytes:
    """What the graph of a round is drawn with: nobody can choose it who cannot choose all sites' keys."""
    return hashlib.sha256(_about(run, round) + digests).digest()


def mask_seed(private: bytes, public: bytes, digest: bytes, about: bytes) -> bytes:
    """The seed of the mask that two sites share for one task, whichever of the two asks.

    Args:
        private: One's masking key.
        public: The other's.
        digest: Of the task: of different ones the masks differ, too, and their sum says nothing.
        about: From ``mask_about``.
    """
    return agree(private, public, about + digest)


def mask_about(run: str, round: int, one: str, other: str) -> bytes:
    """Whose mask it is, of which round."""
    return _pair(b"mask", run, round, one, other)


def _pair(what: bytes, run: str, round: int, *pair: str) -> bytes:
    return b"sfl secagg " + what + b"\n" + _about(run, round) + "\n".join(sorted(pair)).encode()


def _path(run: str, round: int, source: str, target: str) -> bytes:
    return b"sfl secagg share\n" + _about(run, round) + f"{source}\n{target}".encode()


def _about(run: str, round: int) -> bytes:
    return f"{run}\n{round}\n".encode()


def _agreed(run: str, round: int, listed: str, marks: str) -> bytes:
    """What a site signs of a sum: which sites were listed, and which of them it is of."""
    return b"sfl secagg sum\n" + _about(run, round) + f"{listed}\n{marks}".encode()


def _marked(task: Task, names: Sequence[str]) -> set[str]:
    """Sites whose bit is set.

    Raises:
        ProtocolError: If there is not a bit for each.
    """
    try:
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(str(task.config[ALIVE])), np.uint8)).tolist()
        return {name for name, bit in zip(names, bits[: len(names)], strict=True) if bit}
    except (KeyError, ValueError) as error:
        raise ProtocolError(f"a step must mark which of {len(names)} sites it is about, got none: {error!r}.") from None
