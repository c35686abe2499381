"""The server's half of homomorphic encryption: a generator without I/O, which adds up what it cannot read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sfl.core import check
from sfl.core.aggregator import WeightedMean, sum_dtype
from sfl.core.secure import Exchanging, Step, Summing, Total
from sfl.core.task import SERVER, Task, Update
from sfl.errors import ProtocolError, RoundError
from sfl.privacy.he.cipher import Cipher
from sfl.privacy.he.packing import LAYOUT, Layout, framed, parts_of
from sfl.types import Array, Parameters

if TYPE_CHECKING:
    from sfl.privacy.he.protocol import CKKS

__all__ = ["OPEN", "summing"]

OPEN = "ckks-open"
"""The step in which a holder decrypts a sum."""
_ROOM = 1.0 + 2.0**-20  # for the noise on a mean


@dataclass
class _Sum:
    """Ciphertexts as they add up; in memory they are as large as they have come."""

    cipher: Cipher
    layout: Layout
    plain: Parameters
    scale_bits: int
    blocks: dict[str, list[Any]] = field(default_factory=dict[str, list[Any]])
    sites: list[str] = field(default_factory=list[str])

    def check(self, update: Update) -> None:
        """Whether an update can be added, all of it: half of one would spoil the sum."""
        delta, names = update.delta, set(self.layout.block_names)
        if not 0.0 < update.weight <= 1.0:
            raise ProtocolError(f"an update's weight must be a share of the largest, got {update.weight}.")
        if names - set(delta):
            raise ProtocolError(f"an update must hold {len(names)} arrays of ciphertexts, got others.")
        check.check_structure(update.site, self._plain(update), self.plain, partial=True)
        for block, name in enumerate(self.layout.block_names):
            for part in parts_of(delta[name], self.layout.rows(block)):
                self.cipher.loaded(part, self.scale_bits)

    def _plain(self, update: Update) -> Parameters:
        names = set(self.layout.block_names)
        return {name: value for name, value in update.delta.items() if name not in names}

    def taken(self, updates: Iterable[Update]) -> Iterator[Update]:
        """Add the ciphertexts of updates, and pass on what they hold beside them."""
        for update in updates:
            for block, name in enumerate(self.layout.block_names):
                totals, rows = self.blocks.setdefault(name, []), self.layout.rows(block)
                for row, part in enumerate(parts_of(update.delta[name], rows)):
                    loaded = self.cipher.loaded(part, self.scale_bits)
                    if row == len(totals):
                        totals.append(loaded)
                    else:
                        self.cipher.add(totals[row], loaded)
            self.sites.append(update.site)
            yield replace(update, delta=self._plain(update))
            del update

    def packed(self) -> Parameters:
        """The sum as it travels; each block is let go as soon as it is packed."""
        return {
            name: framed([self.cipher.packed(part) for part in self.blocks.pop(name)])
            for name in self.layout.block_names
        }


def summing(secure: CKKS, task: Task, cohort: Sequence[str], expected: Parameters) -> Summing:
    """See ``SecureSum.summing``."""
    layout = secure.layout(secure.like(dict(task.parameters)), expected)
    closed = {name for name, _, _ in layout.closed}
    plain = {name: value for name, value in expected.items() if name not in closed}
    total = _Sum(Cipher(secure.scheme), layout, plain, secure.scale_bits)
    number = task.round
    mean = WeightedMean().aggregate(total.taken((yield Step(dict.fromkeys(cohort, task), total.check))))
    del task
    if len(total.sites) < secure.least:
        raise RoundError(
            f"round {number} must be the sum of at least {secure.least} sites, got {len(total.sites)}: whoever "
            "decrypts it would see what one has sent."
        )
    sealed = {LAYOUT: layout.packed(), **total.packed()}
    opened = sealed if secure.seals else (yield from _opened(secure, layout, number, sealed))
    return Total(Update(SERVER, {**opened, **mean.delta}, mean.weight), tuple(total.sites))


def _opened(secure: CKKS, layout: Layout, round: int, sealed: Parameters) -> Exchanging[Parameters]:
    """The mean of what is encrypted, as the holder tells it.

    Raises:
        RoundError: If it does not.
    """
    mean: Parameters = {name: np.empty(shape, sum_dtype(np.empty(0, dtype))) for name, shape, dtype in layout.closed}
    sizes = {name: (layout.rows(block), layout.slots) for block, name in enumerate(layout.block_names)}

    def check_blocks(update: Update) -> None:
        like = {name: np.broadcast_to(np.zeros(()), shape) for name, shape in sizes.items()}
        check.check_structure(update.site, update.delta, like)
        largest = max(float(np.abs(value).max()) for value in update.delta.values())
        if not largest <= secure.clip * _ROOM:
            raise ProtocolError(f"a mean must be within he_clip = {secure.clip:g}, got {largest:g}.")

    def put(name: str, part: slice, values: Array) -> None:
        mean[name].reshape(-1)[part] = values

    answered = False
    for update in (yield Step({secure.holder: Task(OPEN, round, sealed)}, check_blocks)):
        for block, name in enumerate(layout.block_names):
            layout.spread(block, update.delta[name].reshape(-1), put)
        answered = True
        del update
    if not answered:
        raise RoundError(
            f"round {round} must have its sum decrypted by {secure.holder}, which has the secret key, got no answer."
        )
    return mean
