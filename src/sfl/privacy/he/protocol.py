"""Homomorphic encryption as a job is given it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from sfl.core.secure import Keeper, SecureSum, Summing
from sfl.core.task import Task
from sfl.errors import CompositionError, ConfigError, check_rules, nearest
from sfl.privacy.he.cipher import Cipher
from sfl.privacy.he.contexts import CLIENT_CONTEXT, check_server_kit, kit_cipher, scheme_of, shared_out
from sfl.privacy.he.packing import LAYOUT, PREFIX, Layout, is_sealed
from sfl.privacy.he.scheme import FLOOD, Scheme
from sfl.types import Array, Parameters, StateTree

if TYPE_CHECKING:
    from sfl.privacy.he.site import CkksSite

__all__ = ["CKKS"]

_UNITS = 4096  # parts of the largest weight: in smaller ones, sums of small weights would not be told apart


@dataclass(frozen=True, kw_only=True)
class CKKS(SecureSum):
    """Sites encrypt what they send, and the server adds up ciphertexts (Cheon et al., ASIACRYPT 2017).

    Without a holder all sites share one secret key. Each sends its model, weighed, as ciphertexts; the server keeps
    their sum, which is the next global model, and never a number of it. Sites decrypt it when it comes.

    With a holder each site has a public key, and one of them the secret key to it. Sites send differences; the holder
    decrypts their sum and tells the server the mean, noised so that the key does not show in it.

    Attributes:
        layers: Which arrays are encrypted: all, those that are named, or those whose name a regular expression is found
            in. The others travel as they are.
        clip: Largest number that is encrypted, of the models without a holder, else of their differences.
        max_weight: Largest weight of a site; one that has more examples counts as if it had so many. Past 4096, weights
            are rounded to a 4096th of it, and are never less.
        holder: The site that has the secret key; empty if all have it.
        least: Sites below which the holder opens no sum.
        planned: Sites of a round; set by the job.
        threads: Processes in which a simulated site encrypts and decrypts a large model; set by the job. A deployed
            site takes a process for each core of its own, at most 8.

    Raises:
        ConfigError: If one of them is out of its range.
    """

    layers: str | tuple[str, ...] | None = None
    clip: float = 64.0
    max_weight: int = 1
    holder: str = ""
    least: int = 2
    planned: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        layers: object = self.layers
        if isinstance(layers, list):  # what reads a job back may have made a list of it
            object.__setattr__(self, "layers", tuple(layers))  # pyright: ignore[reportUnknownArgumentType]
        for name, value, kind, said in (
            ("he_clip", cast("object", self.clip), (int, float, np.floating), "a number"),
            ("he_max_weight", cast("object", self.max_weight), (int, np.integer), "a whole number"),
            ("he_holder", cast("object", self.holder), (str,), "a site's name, or empty"),
        ):
            if isinstance(value, bool) or not isinstance(value, kind):
                raise ConfigError(f"{name} must be {said}, got {value!r}.")
        object.__setattr__(self, "clip", float(self.clip))
        object.__setattr__(self, "max_weight", int(self.max_weight))
        check_rules(
            (
                ("he_clip", self.clip, 0.0 < self.clip < math.inf, "positive and finite"),
                ("he_max_weight", self.max_weight, 1 <= self.max_weight <= 2**31, "between 1 and 2**31"),
                ("encrypt_layers", self.layers, _are_layers(self.layers), "None, names, or a regular expression"),
            )
        )

    @property
    def heaviest(self) -> float:
        """See ``SecureSum.heaviest``."""
        return float(self.max_weight)

    @property
    def keyed(self) -> bool:
        """They have."""
        return True

    @property
    def seals(self) -> bool:
        """Without a holder."""
        return not self.holder

    @property
    def scheme(self) -> Scheme:
        """The parameters of the encryption."""
        return scheme_of(self.holder)

    @property
    def scale_bits(self) -> int:
        """log₂ Δ, which all sites must take alike."""
        return self._scale_bits(self.planned)

    def _scale_bits(self, cohort: int) -> int:
        return self.scheme.scale_bits(max(self.clip, 1.0) * max(cohort, 1))

    def share(self, weight: float) -> float:
        """A weight as it is encrypted: a part of the largest, in whole units."""
        return min(max(float(np.rint(weight / self.heaviest * self.units)), 1.0), float(self.units)) / self.units

    @property
    def units(self) -> int:
        """Into how many parts the largest weight is divided."""
        return min(self.max_weight, _UNITS)

    def chosen(self, names: Iterable[str]) -> list[str]:
        """Of the arrays that an update may hold, those that are encrypted."""
        if self.layers is None:
            return list(names)
        if isinstance(self.layers, str):
            pattern = re.compile(self.layers)
            return [name for name in names if pattern.search(name)]
        return [name for name in names if name in self.layers]

    def layout(self, model: Mapping[str, Array], names: Iterable[str]) -> Layout:
        """Where the numbers of ``model`` stand, of which updates may hold the arrays ``names``."""
        return Layout.of(model, self.chosen(names), self.scheme.slots, self.clip, self.units)

    def require(self, cohort: int) -> None:
        """See ``SecureSum.require``."""
        Cipher(self.scheme)  # asked for before a run needs it
        if cohort < 2:
            raise CompositionError(
                f"homomorphic encryption must have rounds of at least 2 sites, got {cohort}: the sum of one hides "
                "nothing. Raise num_clients or fraction_fit."
            )
        self._scale_bits(cohort)

    def among(self, least: int, planned: int, threads: int = 1) -> CKKS:
        """See ``SecureSum.among``."""
        return replace(self, least=max(least, 2), planned=planned, threads=threads)

    def begin(self, model: Parameters, sent: Parameters, sites: Sequence[str]) -> StateTree:
        """What a run must go on with: the holder, and what is encrypted."""
        taken = [name for name in model if name.startswith(PREFIX)]
        if taken:
            raise ConfigError(
                f"a model must have no array whose name starts with {PREFIX}, got {taken[0]!r}. Rename it."
            )
        if self.holder and self.holder not in sites:
            raise ConfigError(f"he_holder must be one of the sites, got {self.holder!r}. {nearest(self.holder, sites)}")
        strange = [name for name in self.layers if name not in sent] if isinstance(self.layers, tuple) else []
        if strange:
            raise ConfigError(
                f"encrypt_layers must name arrays that sites send, got {strange[0]!r}. "
                f"{nearest(strange[0], list(sent))}"
            )
        if not self.chosen(sent):
            raise ConfigError(
                f"encrypt_layers must choose at least one array that sites send, got {self.layers!r}, which chooses "
                f"none of {len(sent)}."
            )
        return self._begun

    @property
    def _begun(self) -> dict[str, StateTree]:
        return {"holder": self.holder, "layers": repr(self.layers), "clip": self.clip}

    def check_server(self, kit: Path) -> None:
        """See ``SecureSum.check_server``."""
        check_server_kit(kit)

    def sealed(self, arrays: Parameters) -> Parameters:
        """See ``SecureSum.sealed``."""
        if not is_sealed(arrays):
            return {}
        names = [LAYOUT, *Layout.read(arrays).block_names]
        return {name: arrays[name] for name in names}

    def bare(self, parameters: Parameters, sealed: Parameters) -> Parameters:
        """See ``SecureSum.bare``."""
        gone = {*self.sealed(parameters), *(name for name, _, _ in Layout.read(sealed).closed)}
        return {name: value for name, value in parameters.items() if name not in gone}

    def like(self, parameters: Parameters) -> Parameters:
        """See ``SecureSum.like``."""
        if not is_sealed(parameters):
            return parameters
        layout = Layout.read(parameters)
        closed = {name: np.broadcast_to(np.zeros((), dtype), shape) for name, shape, dtype in layout.closed}
        return {name: closed[name] if name in closed else parameters[name] for name in layout.names}

    def summing(self, task: Task, cohort: Sequence[str], expected: Parameters, memory: StateTree) -> Summing:
        """See ``SecureSum.summing``."""
        from sfl.privacy.he.server import summing

        if memory != self._begun:
            raise ConfigError(
                "a run must go on with homomorphic encryption as it was begun, got other options of it. Give the same, "
                "or start a new run."
            )
        if len(cohort) > self.planned:
            raise CompositionError(
                f"num_clients must count every site under homomorphic encryption, got a round of {len(cohort)} and "
                f"ciphertexts with room for {self.planned}. Set num_clients."
            )
        return summing(self, task, cohort, expected)

    def kits(self, sites: Sequence[str], keeper: Keeper) -> dict[str, dict[str, bytes]]:
        """See ``SecureSum.kits``."""
        cipher = self._simulated(keeper)
        return {site: {CLIENT_CONTEXT: data} for site, data in shared_out(cipher, sites, self.holder).items()}

    def key(self, keeper: Keeper) -> bytes | None:
        """See ``SecureSum.key``."""
        return keeper.seen(self._where) if self.seals else None

    @property
    def _where(self) -> str:
        return f"simulated_{self.scheme.degree}.tenseal"

    def _simulated(self, keeper: Keeper) -> Cipher:
        data = keeper.common(self._where, lambda: Cipher.fresh(self.scheme).exported(secret=True))
        return _cipher(data, self.scheme, self._where)

    def identity(self, name: str, kit: Path) -> Cipher:  # noqa: ARG002 - several sites may have one key
        """The cipher of its kit."""
        return kit_cipher(kit, self.scheme)

    def site(self, name: str, keeper: Keeper, identity: Cipher | None = None) -> CkksSite:
        """See ``SecureSum.site``."""
        from sfl.privacy.he.site import CkksSite

        if identity is not None:
            return CkksSite(name, self, identity, keeper, binding=True)
        return CkksSite(name, self, self._simulated(keeper), keeper, binding=False)

    def described(self, cohort: int) -> list[str]:
        """See ``SecureSum.described``."""
        error = self.scheme.error(self._scale_bits(cohort), cohort) / cohort
        error *= self.units  # where all weigh as little as a site may
        if not self.seals:
            error += 6.0 * FLOOD * self.clip
        if self.seals:
            keys = (
                "keys: all sites have the same secret key, the server has none: the server together with any one site "
                "could read every update",
                "the global model, too, is ciphertext on the server; it adds, and decrypts nothing",
            )
        else:
            keys = (
                f"keys: {self.holder} alone has the secret key, the other sites a public one, the server none: the "
                f"server together with {self.holder} could read every update",
                f"{self.holder} decrypts the sum of at least {self.least} sites, and tells the server their mean, "
                "noised so that the key stays its own; the server sees global models",
            )
        whole = [] if self.layers is None else [f"only the arrays chosen by {self.layers!r} are encrypted"]
        return [
            f"homomorphic encryption ({self.scheme}): the server never saw a site's update",
            *keys,
            *whole,
            f"it holds against a server that keeps to the protocol, and is no differential privacy; a mean of {cohort} "
            f"is right to {error:.2g}, whatever the weights",
        ]


@lru_cache(maxsize=4)
def _cipher(data: bytes, scheme: Scheme, where: str) -> Cipher:
    """One for all simulated sites of a process: it is some megabytes."""
    return Cipher.of(data, scheme, where)


def _are_layers(layers: object) -> bool:
    if isinstance(layers, str):
        try:
            return bool(layers) and bool(re.compile(layers))
        except re.error:
            return False
    if isinstance(layers, tuple):
        names: tuple[object, ...] = layers  # pyright: ignore[reportUnknownVariableType]
        return bool(names) and all(isinstance(name, str) for name in names)
    return layers is None
