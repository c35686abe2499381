"""How a simulation shares one data set among sites, and how a site sets records aside.

Everything here works on record *indices*; what a record is, is the application's business. A partition is a list of
int64 index arrays, one for each site: sorted, non-empty, pairwise disjoint, and together all records.

    iid                       a random split into equal parts
    dirichlet:ALPHA[:FIELD]   label skew over FIELD (default: label), Hsu et al. 2019
    key:FIELD                 whole groups of records with the same FIELD go to one site
    files                     one file is one site
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sfl.core.rng import public
from sfl.errors import ConfigError, DataError, nearest

Indices: TypeAlias = NDArray[np.int64]
Kind: TypeAlias = Literal["iid", "dirichlet", "key", "files"]

_FORMS = "iid, dirichlet:ALPHA, dirichlet:ALPHA:FIELD, key:FIELD or files"
_ALPHA_RANGE = (1e-6, 1e9)  # beyond these, Dir(alpha p) is its limit to machine precision


@dataclass(frozen=True)
class PartitionSpec:
    """A partition as the user asked for it.

    Attributes:
        kind: iid, dirichlet, key or files.
        alpha: Concentration of a dirichlet partition: small is skewed, large is near-uniform. Else 0.
        field: The record field whose values are the labels or keys. Empty for iid and files.
    """

    kind: Kind
    alpha: float = 0.0
    field: str = ""

    def __str__(self) -> str:
        if self.kind == "dirichlet":
            return f"dirichlet:{self.alpha:g}:{self.field}"
        return f"key:{self.field}" if self.kind == "key" else self.kind


def parse_partition(text: str) -> PartitionSpec:
    """The partition that ``text`` names; ``dirichlet(0.5)`` and ``dirichlet:0.5`` are the same.

    Raises:
        ConfigError: ``text`` is none of the four forms.

    Example:
        >>> str(parse_partition("dirichlet(0.5)"))
        'dirichlet:0.5:label'
    """
    name, *arguments = _words(text)
    kind = name.lower()
    if kind == "iid" and not arguments:
        return PartitionSpec("iid")
    if kind == "files" and not arguments:
        return PartitionSpec("files")
    if kind == "key" and len(arguments) == 1 and arguments[0]:
        return PartitionSpec("key", field=arguments[0])
    if kind == "dirichlet" and len(arguments) in (1, 2) and all(arguments):
        return PartitionSpec("dirichlet", _alpha(arguments[0], text), arguments[1] if len(arguments) == 2 else "label")
    raise ConfigError(f"partition must be {_FORMS}, got {text!r}. {_remedy(kind)}")


def _words(text: str) -> list[str]:
    called = re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", text)
    if called:
        return [called[1], *(word.strip() for word in re.split(r"[,:]", called[2]))]
    return [word.strip() for word in text.split(":")]


def _remedy(kind: str) -> str:
    examples = {
        "iid": "iid takes no argument.",
        "files": "files takes no argument; name the files in the data option.",
        "key": "Write for instance key:organism.",
        "dirichlet": "Write for instance dirichlet:0.5.",
    }
    return examples.get(kind) or nearest(kind, examples)


def _alpha(word: str, text: str) -> float:
    try:
        alpha = float(word)
    except ValueError:
        alpha = math.nan
    if not (math.isfinite(alpha) and alpha > 0.0):
        raise ConfigError(
            f"partition must be dirichlet:ALPHA with a positive, finite ALPHA, got {text!r}. "
            "Use for instance 0.1 (skewed), 1 or 100 (near-uniform)."
        )
    return alpha


def partition_indices(
    spec: PartitionSpec,
    n: int,
    *,
    num_clients: int,
    seed: int,
    values: Sequence[str] | None = None,
    min_size: int = 1,
) -> list[Indices]:
    """The records of each site under ``spec``.

    Args:
        spec: The partition.
        n: Number of records.
        num_clients: Number of sites.
        seed: The run's seed; draws come from ``rng.public(seed, 0, "partition")``.
        values: One value for each record: the label (dirichlet), the key (key) or the file (files). Not for iid.
        min_size: Fewest records that a site may have.

    Raises:
        ConfigError: num_clients or ``values`` does not fit the partition.
        DataError: There are too few records or groups for that many sites.
    """
    if num_clients < 1:
        raise ConfigError(f"num_clients must be at least 1, got {num_clients}. Name how many sites share the data.")
    rng = public(seed, 0, "partition")
    if spec.kind == "iid":
        return iid(n, num_clients, rng, min_size=min_size)
    if values is None or len(values) != n:
        seen = "none" if values is None else f"{len(values)} values for {n} records"
        raise ConfigError(f"partition {spec} must be given one value a record, got {seen}. Pass values=.")
    if spec.kind == "dirichlet":
        return dirichlet(values, num_clients, spec.alpha, rng, min_size=min_size)
    if spec.kind == "key":
        return by_key(values, num_clients, min_size=min_size)
    return by_file(values, num_clients, min_size=min_size)


def iid(n: int, num_clients: int, rng: np.random.Generator, *, min_size: int = 1) -> list[Indices]:
    """A random split into parts whose sizes differ by one at most."""
    _require_enough(n, num_clients, min_size)
    return [np.sort(part) for part in np.array_split(rng.permutation(n).astype(np.int64), num_clients)]


def dirichlet(
    labels: Sequence[str], num_clients: int, alpha: float, rng: np.random.Generator, *, min_size: int = 1
) -> list[Indices]:
    """Label skew after Hsu, Qi and Brown 2019, section 3 (arXiv 1909.06335).

    Site k draws its label mix q_k ~ Dir(alpha p), p being the label shares of the whole data set, and then draws its
    records from q_k without replacement. All sites have the same size (to one record), so none is ever empty. Where a
    label runs out, q_k is renormalised over the labels that are left; the last sites therefore take what remains.

    Edge cases: alpha -> infinity gives the label shares of the whole set (up to sampling); alpha -> 0 gives one label
    a site for as long as it lasts; a single label is an iid split.
    """
    n = len(labels)
    _require_enough(n, num_clients, min_size)
    names, codes = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    order = rng.permutation(n)
    order = order[np.argsort(codes[order], kind="stable")]  # grouped by label, random within each
    left = np.bincount(codes, minlength=len(names))
    starts = np.cumsum(left) - left
    prior = left / n
    parts: list[Indices] = []
    for site in range(num_clients):
        size = n // num_clients + (site < n % num_clients)
        taken = _draw_counts(size, left, prior, float(np.clip(alpha, *_ALPHA_RANGE)), rng)
        chosen = [order[starts[label] : starts[label] + taken[label]] for label in np.flatnonzero(taken)]
        left, starts = left - taken, starts + taken
        parts.append(np.sort(np.concatenate(chosen)).astype(np.int64))
    return parts


def _draw_counts(
    size: int, left: Indices, prior: NDArray[np.float64], alpha: float, rng: np.random.Generator
) -> Indices:
    """How many of ``size`` draws fall on each label, never more than are ``left`` of it."""
    mix = _label_mix(alpha * prior * (left > 0), rng)
    taken = np.zeros_like(left)
    while (missing := size - int(taken.sum())) > 0:
        mix = np.where(taken < left, mix, 0.0)
        if mix.sum() <= 1e-12:  # all that q_k asked for is gone; Dir restricted to the labels left is Dir of those
            mix = _label_mix(alpha * prior * (taken < left), rng)
        drawn = rng.multinomial(missing, mix / mix.sum())
        taken = np.minimum(taken + drawn, left)
    return taken


def _label_mix(weights: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """One draw of Dir(weights) over the labels of positive weight; where it underflows, its limit: a single label."""
    live = np.flatnonzero(weights > 0.0)
    mix = np.zeros_like(weights)
    draw = rng.dirichlet(weights[live])
    if np.isfinite(draw).all() and draw.sum() > 0.5:
        mix[live] = draw
    else:
        mix[rng.choice(live, p=weights[live] / weights[live].sum())] = 1.0
    return mix


def by_key(keys: Sequence[str], num_clients: int, *, min_size: int = 1) -> list[Indices]:
    """Whole key groups to sites: the biggest group first, each to the site that has fewest records so far.

    Nothing is drawn. Records without a key (an empty string) are one group.
    """
    _require_enough(len(keys), num_clients, min_size)
    groups = _groups(keys)
    if len(groups) < num_clients:
        raise DataError(
            f"a key partition must have at least one key for each of {num_clients} sites, got {len(groups)} keys. "
            f"Lower num_clients to {len(groups)}, or choose another field."
        )
    loads = [(0, site) for site in range(num_clients)]
    sites: list[list[int]] = [[] for _ in range(num_clients)]
    for _, members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        load, site = heapq.heappop(loads)
        sites[site].extend(members)
        heapq.heappush(loads, (load + len(members), site))
    smallest = min(len(site) for site in sites)
    if smallest < min_size:
        raise DataError(
            f"each of {num_clients} sites must get at least {min_size} records, got {smallest} for the smallest: the "
            f"{len(groups)} keys are too uneven. Lower num_clients, or choose another field."
        )
    return [np.sort(np.array(site, dtype=np.int64)) for site in sites]


def by_file(files: Sequence[str], num_clients: int, *, min_size: int = 1) -> list[Indices]:
    """One file, one site; sites in the order in which the files first occur."""
    groups = _groups(files)
    if len(groups) != num_clients:
        raise ConfigError(
            f"num_clients must be the number of site files with partition files, got num_clients={num_clients} and "
            f"{len(groups)} files. Set num_clients to {len(groups)}, or name other files."
        )
    for name, members in groups.items():
        if len(members) < min_size:
            raise DataError(
                f"site file {name!r} must hold at least {min_size} records, got {len(members)}. "
                "Add records to it, or leave it out."
            )
    return [np.array(members, dtype=np.int64) for members in groups.values()]


def _groups(values: Sequence[str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for index, value in enumerate(values):
        groups.setdefault(value, []).append(index)
    return groups


def _require_enough(n: int, num_clients: int, min_size: int) -> None:
    needed = num_clients * max(1, min_size)
    if n < needed:
        raise DataError(
            f"{num_clients} sites of at least {max(1, min_size)} records must share {needed} or more records, got {n}. "
            "Lower num_clients, or give more data."
        )


def split_holdout(n: int, fraction: float, rng: np.random.Generator) -> tuple[Indices, Indices]:
    """A random (rest, held-out) split of n records; both sides have at least one.

    Returns:
        Sorted indices; the held-out side has ``fraction * n`` records, rounded.

    Raises:
        ConfigError: fraction is not in (0, 1).
        DataError: There are fewer than two records.
    """
    _require_splittable(n, fraction, "records")
    held = min(max(round(fraction * n), 1), n - 1)
    order = rng.permutation(n).astype(np.int64)
    return np.sort(order[held:]), np.sort(order[:held])


def split_holdout_groups(keys: Sequence[str], fraction: float, rng: np.random.Generator) -> tuple[Indices, Indices]:
    """The same, with whole groups of equal keys: groups are held out at random until ``fraction * n`` is reached.

    Raises:
        ConfigError: fraction is not in (0, 1).
        DataError: There are fewer than two groups.
    """
    groups = list(_groups(keys).values())
    _require_splittable(len(groups), fraction, "groups")
    held: list[int] = []
    for position in rng.permutation(len(groups))[:-1]:
        if held and len(held) >= round(fraction * len(keys)):
            break
        held.extend(groups[position])
    is_held = np.zeros(len(keys), dtype=bool)
    is_held[held] = True
    return np.flatnonzero(~is_held).astype(np.int64), np.flatnonzero(is_held).astype(np.int64)


def _require_splittable(n: int, fraction: float, unit: str) -> None:
    if not 0.0 < fraction < 1.0:
        raise ConfigError(f"the held-out fraction must be in (0, 1), got {fraction!r}. Use for instance 0.1.")
    if n < 2:
        raise DataError(
            f"a held-out split must have at least 2 {unit}, one for each side, got {n}. Give more data, or fewer sites."
        )


def check_disjoint(sets: Mapping[str, Iterable[Hashable]], *, what: str = "record") -> None:
    """Raise unless no item is in two of the named sets: what is tested on was never trained on.

    Raises:
        DataError: Two sets share an item; the message names the two and shows the first item.
    """
    owner: dict[Hashable, str] = {}
    for name, items in sets.items():
        for item in items:
            first = owner.setdefault(item, name)
            if first != name:
                shown = repr(item) if len(repr(item)) <= 40 else f"{repr(item)[:37]}...'"
                raise DataError(
                    f"{first!r} and {name!r} must share no {what}, got {shown} in both. "
                    "Remove duplicates before the data are split."
                )
