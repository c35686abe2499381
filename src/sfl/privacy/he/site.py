"""A site's half of homomorphic encryption."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sfl.core import arrays
from sfl.core.check import check_finite
from sfl.core.secure import Keeper, SecureSite
from sfl.core.task import FIT, Task, Update
from sfl.errors import ProtocolError, UpdateError
from sfl.privacy.he.cipher import Cipher
from sfl.privacy.he.crew import Crew, cores
from sfl.privacy.he.packing import HEAD, Layout, is_sealed
from sfl.privacy.he.scheme import FLOOD
from sfl.privacy.he.server import OPEN
from sfl.privacy.noise import add_multiples, secret
from sfl.types import Array, Parameters

if TYPE_CHECKING:
    from sfl.privacy.he.protocol import CKKS

__all__ = ["CkksSite", "opened_model"]

_GRID = 2.0**-20  # of that noise


class CkksSite(SecureSite):
    """One site.

    Args:
        name: Its name.
        secure: As its job says it.
        cipher: With the keys that it has.
        keeper: Where it keeps what it must remember.
        binding: Whether it is one of a deployment, where a round is opened once, and the machine is its own.
    """

    def __init__(self, name: str, secure: CKKS, cipher: Cipher, keeper: Keeper, *, binding: bool) -> None:
        self._name, self._secure, self._cipher = name, secure, cipher
        self._keeper, self._binding = keeper, binding
        self._size = max(secure.threads, cores() if binding else 1)
        self._model: Mapping[str, Array] = {}

    def answer(self, task: Task) -> Update:
        """Decrypt the sum of a round, as its holder."""
        if task.name != OPEN:
            raise ProtocolError(
                f"{self._name}: a step must be one of homomorphic encryption, got {task.name!r}. It sends nothing."
            )
        secure = self._secure
        self._require(
            secure.holder == self._name, f"sums must be decrypted by {secure.holder or 'each site for itself'}"
        )
        self._require(self._cipher.is_secret, "the holder's context must have the secret key")
        kept: Any = (self._keeper.load() if self._binding else None) or {}
        self._require(task.round > kept.get("opened", 0), f"a round must be opened once, got {task.round} again")
        layout = Layout.read(task.parameters)
        out: Parameters = {}
        weight = 1.0
        with Crew(self._cipher, self._size, layout.blocks) as crew:
            for name, numbers in zip(layout.block_names, crew.decrypted(_blocks(layout, task.parameters)), strict=True):
                if not out:
                    weight, count = layout.head_of(numbers)
                    self._require(count >= secure.least, f"a sum must be of at least {secure.least} sites, got {count}")
                    numbers[:HEAD] = 0.0
                out[name] = _flooded(numbers / weight, secure.clip).reshape(-1, layout.slots)
        if self._binding:
            self._keeper.save({"opened": task.round})  # before it leaves
        return Update(self._name, out, 1.0)

    def opened(self, task: Task) -> Task:
        """The task with the model in the clear."""
        if is_sealed(task.parameters):
            opened = opened_model(self._cipher, task.parameters, self._secure.least, self._size)
            task = replace(task, parameters=arrays.read_only(opened))
        if task.name == FIT:
            self._model = task.parameters
        return task

    def closed(self, update: Update, task: Task, expected: Parameters) -> Update:  # noqa: ARG002 - it was opened
        """The update, or the model that it makes, weighed and encrypted; what is not chosen goes as it is."""
        model, self._model = self._model, {}
        check_finite(self._name, update.delta)
        layout = self._secure.layout(model, expected)
        weight = self._secure.share(update.weight)
        whole = model if self._secure.seals else {}
        values = _weighed(whole, update.delta, weight)
        chosen = {name for name, _, _ in layout.closed}
        out = {name: value for name, value in update.delta.items() if name not in chosen}
        with Crew(self._cipher, self._size, layout.blocks) as crew:
            numbers = (self._filled(layout, block, weight, values) for block in range(layout.blocks))
            out.update(zip(layout.block_names, crew.encrypted(numbers, self._secure.scale_bits), strict=True))
        return replace(update, delta=out, weight=weight if len(chosen) < len(expected) else 1.0)

    def _filled(self, layout: Layout, block: int, weight: float, values: Callable[[str, slice], Array]) -> Array:
        try:
            return layout.filled(block, weight, values)
        except ValueError as error:
            raise UpdateError(
                f"{self._name}: numbers must be within he_clip = {self._secure.clip:g}, and whole ones within "
                "2^24, got one that is not. Set he_clip higher."
            ) from error

    def _require(self, holds: bool, rule: str) -> None:
        if not holds:
            raise ProtocolError(f"{self._name}: {rule}. It sends nothing.")


def _weighed(model: Mapping[str, Array], delta: Parameters, weight: float) -> Callable[[str, slice], Array]:
    """Parts of w (x + δ); an array that neither has counts as zeros."""

    def values(name: str, part: slice) -> Array:
        total = np.zeros(part.stop - part.start)
        for source in (model, delta):
            if name in source:
                total += source[name].reshape(-1)[part]
        total *= weight
        return total

    return values


def opened_model(cipher: Cipher, parameters: Mapping[str, Array], least: int = 1, size: int = 1) -> Parameters:
    """A sealed model in the clear: the sum of ciphertexts over the sum of weights that is among them.

    Args:
        cipher: With the sites' key.
        parameters: As the server keeps them.
        least: Sites of which it must be the sum.
        size: Processes that may compute at once.

    Raises:
        ProtocolError: If it was not sealed with the key that ``cipher`` has, or is the sum of fewer.
    """
    layout = Layout.read(parameters)
    closed: Parameters = {name: np.empty(shape, dtype) for name, shape, dtype in layout.closed}
    weight = 1.0

    def put(name: str, part: slice, numbers: Array) -> None:
        out = closed[name]
        numbers /= weight
        out.reshape(-1)[part] = numbers if out.dtype.kind == "f" else np.rint(numbers)

    with Crew(cipher, size, layout.blocks) as crew:
        for block, numbers in enumerate(crew.decrypted(_blocks(layout, parameters))):
            if block == 0:
                weight, count = layout.head_of(numbers)
                if count < least:
                    raise ProtocolError(f"a model must be the sum of at least {least} sites, got {count}.")
            layout.spread(block, numbers, put)
    return {name: closed[name] if name in closed else parameters[name] for name in layout.names}


def _blocks(layout: Layout, parameters: Mapping[str, Array]) -> Iterator[tuple[Array, int]]:
    """The blocks of a sealed model, each with the number of its ciphertexts."""
    for block, name in enumerate(layout.block_names):
        if name not in parameters:
            raise ProtocolError(f"a sealed model must hold all of its ciphertexts, got none named {name!r}.")
        yield parameters[name], layout.rows(block)


def _flooded(numbers: Array, clip: float) -> Array:
    """What may be told of a decrypted mean: with noise far above its error, in which the key would show.

    Who knows a ciphertext and all digits of what it decrypts to can work the key out (Li and Micciancio, EUROCRYPT
    2021), from the error e among them. With Gaussian noise of σ (Li, Micciancio, Schultz and Sorrell, CRYPTO 2022) what
    is told with e and without differ by |e| / σ at most, in total variation, for each number. Here |e| is 2^-74 or so
    for up to a thousand sites of the smallest weights, and σ = 2^-30 clip: a thousand million numbers tell of the key
    with an advantage below 2^-19. The grid is the same whatever the weights are.
    """
    sigma = FLOOD * clip
    grid = sigma * _GRID
    multiples = np.rint(secret().standard_normal(numbers.size) * (sigma / grid))
    out = np.empty_like(numbers)
    add_multiples(numbers, multiples, grid, out)
    return out
