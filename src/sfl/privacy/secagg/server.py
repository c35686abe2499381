"""The server's half of secure aggregation: a generator without I/O."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from sfl.core import arrays
from sfl.core.secure import Exchanging, Step, Summing, Total
from sfl.core.task import SERVER, Task, Update
from sfl.errors import ProtocolError, RoundError
from sfl.privacy.secagg.fixed import CLIPPED, Words
from sfl.privacy.secagg.graph import arranged, neighbours
from sfl.privacy.secagg.messages import (
    AGREE,
    ALIVE,
    KEYS,
    LARGEST,
    RUN,
    SHARES,
    SITES,
    UNMASK,
    Bundle,
    as_array,
    as_bytes,
    as_list,
    digest_of,
    place_of,
    require_names,
)
from sfl.privacy.secagg.primitives import OVERHEAD, add_mask, public_of
from sfl.privacy.secagg.shamir import SHARE, recovered
from sfl.privacy.secagg.site import mask_about, mask_seed, round_seed
from sfl.types import Config, Parameters

if TYPE_CHECKING:
    from sfl.privacy.secagg.protocol import SecAgg

__all__ = ["summing"]


@dataclass(slots=True)
class _Round:
    """What the server knows of a round."""

    run: str
    number: int
    sites: list[str] = field(default_factory=list[str])
    bundles: dict[str, Bundle] = field(default_factory=dict[str, Bundle])
    around: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    alive: list[str] = field(default_factory=list[str])
    sealed: dict[str, Parameters] = field(default_factory=dict[str, Parameters])
    threshold: int = 0
    digest: bytes = b""

    def task(self, name: str, parameters: Parameters, config: Config | None = None) -> Task:
        return Task(name, self.number, parameters, {**(config or {}), RUN: self.run})

    def marks(self, names: Sequence[str]) -> str:
        """One bit for each site of the round."""
        chosen = set(names)
        return np.packbits(np.array([name in chosen for name in self.sites], np.uint8)).tobytes().hex()


def summing(task: Task, cohort: Sequence[str], expected: Parameters, secure: SecAgg, run: str) -> Summing:
    """One round (Bell et al. 2020, Algorithm 2, with the consistency check of Bonawitz et al. 2017).

    Raises:
        RoundError: If too few sites stay for their sum to be opened.
    """
    this = _Round(run, task.round)
    yield from _keys(this, cohort)
    yield from _shares(this, secure)
    fixed = secure.fixed.of(len(this.sites))
    total = fixed.zeros(expected)
    this.digest = digest_of(task)
    training = replace(task, config={**task.config, RUN: run, ALIVE: this.marks(this.alive)})
    del task
    summed: list[str] = []
    sizes = fixed.sizes(expected)

    def check(update: Update) -> None:
        require_names(update.delta, sizes)
        for name, like in sizes.items():
            as_bytes(update.delta, name, like.size)

    for update in (yield Step(dict.fromkeys(this.alive, training), check)):
        total.add(fixed.unpacked(update.delta))
        summed.append(update.site)
        del update
    del training
    needed = secure.needed(len(this.sites))
    _require_enough(this, summed, "sent a masked update", needed)
    agreed = yield from _agreeing(this, summed)
    _require_enough(this, list(agreed), "agreed on the sum", needed)
    shares = yield from _unmasking(this, summed, agreed)
    _unmask(this, total, summed, shares)
    mean, weight, clipped = fixed.decoded(total, expected)
    if not 0.0 < weight <= fixed.heaviest * len(summed):
        raise RoundError(
            f"round {this.number}: the masks must cancel, got a sum that weighs {weight:g}. A site has not kept to the "
            "protocol."
        )
    share = clipped / (len(summed) * max(total.narrow.size, 1))
    return Total(Update(SERVER, mean, weight), tuple(sorted(summed)), {} if fixed.grid else {CLIPPED: share})


def _keys(this: _Round, cohort: Sequence[str]) -> Exchanging[None]:
    request = this.task(KEYS, {})
    for update in (yield Step(dict.fromkeys(cohort, request), _bundle)):
        this.bundles[update.site] = _bundle(update)
    this.sites = sorted(this.bundles)
    if len(this.sites) < 2:
        raise RoundError(
            f"round {this.number} must have at least 2 sites for a sum to hide them, got {len(this.sites)} of "
            f"{len(cohort)} with keys."
        )


def _bundle(update: Update) -> Bundle:
    require_names(update.delta, ("keys",))
    came = as_bytes(update.delta, "keys")
    if len(came) > LARGEST:
        raise ProtocolError(f"keys of a site must be at most {LARGEST} bytes, got {len(came)}.")
    return Bundle.of(came)


def _shares(this: _Round, secure: SecAgg) -> Exchanging[None]:
    digests = b"".join(this.bundles[name].digest for name in this.sites)
    degree = secure.degree(len(this.sites))
    this.threshold = degree.threshold
    circle = arranged(this.sites, round_seed(this.run, this.number, digests))
    this.around = {name: neighbours(circle, name, degree.neighbours) for name in this.sites}
    keys = {f"keys/{name}": as_array(this.bundles[name].packed) for name in this.sites}
    request = this.task(SHARES, keys, {SITES: as_list(this.sites)})

    def check(update: Update) -> None:
        require_names(update.delta, [f"to/{other}" for other in this.around[update.site]])
        for name in update.delta:
            as_bytes(update.delta, name, 2 * SHARE + OVERHEAD)

    for update in (yield Step(dict.fromkeys(this.sites, request), check)):
        this.sealed[update.site] = arrays.copy(update.delta)
    this.alive = sorted(this.sealed)
    _require_enough(this, this.alive, "shared their secrets out", secure.needed(len(this.sites)))


def _require_enough(this: _Round, staying: Sequence[str], did: str, least: int) -> None:
    """Sites with too few neighbours left would refuse the next step."""
    there = set(staying)
    short = [name for name in staying if len(there.intersection(this.around[name])) < this.threshold]
    if short or len(staying) < least:
        raise RoundError(
            f"round {this.number} must keep at least {least} sites, and {this.threshold} neighbours of each, for a sum "
            f"that may be opened, got {len(staying)} of {len(this.sites)} that {did}. Mend those that dropped out."
        )


def _agreeing(this: _Round, summed: Sequence[str]) -> Exchanging[Parameters]:
    """Signatures over which sites the sum is of, by name."""

    def check(update: Update) -> None:
        require_names(update.delta, ("agreed",))
        if len(as_bytes(update.delta, "agreed")) > LARGEST:
            raise ProtocolError(f"a signature must be at most {LARGEST} bytes.")

    request = this.task(AGREE, {}, {ALIVE: this.marks(summed)})
    return {
        update.site: np.array(update.delta["agreed"]) for update in (yield Step(dict.fromkeys(summed, request), check))
    }


def _unmasking(this: _Round, summed: Sequence[str], agreed: Parameters) -> Exchanging[dict[str, dict[int, bytes]]]:
    marks, signed = this.marks(summed), {f"agreed/{name}": signature for name, signature in agreed.items()}
    tasks = {
        name: this.task(
            UNMASK,
            {
                **signed,
                **{
                    f"from/{other}": this.sealed[other][f"to/{name}"]
                    for other in this.around[name]
                    if other in this.sealed
                },
            },
            {ALIVE: marks},
        )
        for name in agreed
    }
    shares: dict[str, dict[int, bytes]] = {name: {} for name in this.alive}

    def given(update: Update) -> dict[str, bytes]:
        there = [other for other in this.around[update.site] if other in shares and f"of/{other}" in update.delta]
        require_names(update.delta, [f"of/{other}" for other in there])
        return {other: as_bytes(update.delta, f"of/{other}", SHARE) for other in there}

    for update in (yield Step(tasks, given)):
        for other, share in given(update).items():
            shares[other][place_of(this.around[other], update.site)] = share
    return shares


def _unmask(this: _Round, total: Words, summed: Sequence[str], shares: Mapping[str, Mapping[int, bytes]]) -> None:
    """Take off the sites' own masks, and the halves of masks with those that dropped out."""
    for name in this.alive:
        if len(shares[name]) < this.threshold:
            raise RoundError(
                f"round {this.number} must get {this.threshold} shares of the secrets of {name}, got "
                f"{len(shares[name])}: too many sites have dropped out."
            )
    there = set(summed)
    for name in this.alive:
        secret = _recovered(this, name, shares[name], stays=name in there)
        if name in there:
            add_mask(total.both, secret, subtract=True)
            continue
        for other in this.around[name]:
            if other in there:  # it had added the mask, or subtracted it, by whose name comes first
                public = this.bundles[other].masking
                seed = mask_seed(secret, public, this.digest, mask_about(this.run, this.number, name, other))
                add_mask(total.both, seed, subtract=other < name)


def _recovered(this: _Round, name: str, shares: Mapping[int, bytes], *, stays: bool) -> bytes:
    """A secret of a site: the seed of its mask, or its key for masks; what its bundle says of it is held against it."""
    chosen = dict(sorted(shares.items())[: this.threshold])
    bundle = this.bundles[name]
    try:
        secret = recovered(chosen)
    except ProtocolError as error:
        raise RoundError(f"round {this.number}: {error}") from error
    known = hashlib.sha256(secret).digest() if stays else public_of(secret)
    if not hmac.compare_digest(known, bundle.commitment if stays else bundle.masking):
        raise RoundError(
            f"round {this.number}: shares of the secrets of {name} must belong together, got some that do not. A site "
            "has changed one."
        )
    return secret
