"""Records shared among sites, with held-out ones on every level and a check that none of them leaks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from sfl.core.rng import public
from sfl.errors import ConfigError, DataError, nearest
from sfl.train.partition import PartitionSpec, check_disjoint, parse_partition, partition_indices, split_holdout

__all__ = ["Federated", "R", "Record", "Shares", "SiteRecords", "check_leakage", "federate", "most_frequent"]

_MIN_SITE = 2  # one record to train on, one held out


class Record(Protocol):
    """What can be shared out."""

    @property
    def key(self) -> str:
        """What makes it the same as another record: its content."""
        ...

    def value(self, name: str) -> str:
        """The field of this name; empty if it has none."""
        ...

    def names(self) -> Iterable[str]:
        """The fields that it may have."""
        ...


R = TypeVar("R", bound=Record)


@dataclass(frozen=True, slots=True)
class SiteRecords(Generic[R]):
    """What one site has.

    Attributes:
        name: The site's name.
        train: Records that it trains on; at least one.
        held_out: Its own records that it never trains on; at least one.
    """

    name: str
    train: tuple[R, ...]
    held_out: tuple[R, ...]


@dataclass(frozen=True, slots=True)
class Federated(Generic[R]):
    """A data set shared among sites. No content is in two of its parts.

    Attributes:
        sites: One for each site, in order of client id.
        held_out: Records that no site has; empty if ``global_fraction`` is 0.
        partition: How the data were shared.
        duplicates: Records that were left out as their content was already in an earlier one.
    """

    sites: tuple[SiteRecords[R], ...]
    held_out: tuple[R, ...]
    partition: PartitionSpec
    duplicates: int = 0

    def describe(self, figures: Callable[[Sequence[R]], dict[str, Any]]) -> dict[str, Any]:
        """Sizes for the report, of JSON types: each part's number of records, and what ``figures`` says of it."""

        def part(records: Sequence[R]) -> dict[str, Any]:
            return {"records": len(records), **figures(records)}

        return {
            "partition": str(self.partition),
            "duplicates_dropped": self.duplicates,
            "sites": [
                {"site": site.name, "train": part(site.train), "held_out": part(site.held_out)} for site in self.sites
            ],
            "held_out": part(self.held_out),
        }


def most_frequent(values: Iterable[str], count: int = 5) -> list[tuple[str, int]]:
    """The values that occur most often, ``unknown`` for an empty one; ties in alphabetical order.

    Example:
        >>> most_frequent(["b", "a", "b", ""], 2)
        [('b', 2), ('a', 1)]
    """
    counted = Counter(value or "unknown" for value in values)
    return sorted(counted.items(), key=lambda item: (-item[1], item[0]))[:count]


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How a data set is shared out.

    Attributes:
        partition: iid, dirichlet:ALPHA[:FIELD], key:FIELD or files.
        num_clients: Number of sites; with ``files`` the number of files.
        seed: The run's seed: the same seed gives the same sites.
        eval_fraction: Share of a site's records that it holds out, in (0, 1).
        global_fraction: Share of all records that no site gets, in [0, 1); with ``files``, of each file's.
    """

    partition: str
    num_clients: int
    seed: int
    eval_fraction: float = 0.1
    global_fraction: float = 0.1


def check_leakage(data: Federated[R], *, what: str = "record") -> None:
    """Raise unless every two parts (each site's two sides, the global held-out set) share no content.

    Raises:
        DataError: Two parts share one; the message names them.
    """
    parts = {"the global held-out set": data.held_out}
    for site in data.sites:
        parts[f"{site.name} (train)"] = site.train
        parts[f"{site.name} (held out)"] = site.held_out
    check_disjoint({name: (r.key for r in part) for name, part in parts.items()}, what=what)


def federate(
    records: Sequence[R] | Mapping[str, Sequence[R]],
    shares: Shares,
    *,
    what: str = "record",
    hint: str = "",
) -> Federated[R]:
    """Share ``records`` among sites and hold some out: first globally, then at each site.

    What occurs more than once is dropped but for the first (with site files: the first file keeps it).

    Args:
        records: All records, or those of each site file by its name.
        shares: How.
        what: How messages call a record's content.
        hint: What to say where a field has no value in any record.

    Raises:
        ConfigError: The partition, the number of sites or a fraction is wrong.
        DataError: There are too few records, or an example would be on both sides.
    """
    spec = parse_partition(shares.partition)
    _require_fractions(shares.eval_fraction, shares.global_fraction)
    pool, files, duplicates = _pool(records)
    by_file, count, seed = spec.kind == "files", shares.num_clients, shares.seed
    if by_file:
        _require_site_files(records, files, count)
    values = files if by_file else _values(spec, pool, hint)
    held = _global_held_out(values if by_file else [""] * len(pool), shares.global_fraction, seed, count)
    rest = np.setdiff1d(np.arange(len(pool), dtype=np.int64), held)
    names = list(dict.fromkeys(files)) if by_file else [f"site-{k + 1}" for k in range(count)]
    kept = [values[i] for i in rest] if values else None
    parts = partition_indices(spec, len(rest), num_clients=count, seed=seed, values=kept, min_size=_MIN_SITE)
    sites = tuple(
        _site(name, [pool[i] for i in rest[part]], shares.eval_fraction, seed)
        for name, part in zip(names, parts, strict=True)
    )
    data = Federated(sites, tuple(pool[i] for i in held), spec, duplicates)
    check_leakage(data, what=what)
    return data


def _require_fractions(eval_fraction: float, global_fraction: float) -> None:
    if not 0.0 < eval_fraction < 1.0:
        raise ConfigError(f"eval_fraction must be in (0, 1), got {eval_fraction!r}. Use for instance 0.1.")
    if not 0.0 <= global_fraction < 1.0:
        raise ConfigError(f"global_fraction must be in [0, 1), got {global_fraction!r}. Use for instance 0.1.")


def _pool(
    records: Sequence[R] | Mapping[str, Sequence[R]],
) -> tuple[list[R], list[str], int]:
    """Records with distinct contents, the site file of each (empty for a plain list), and how many were dropped."""
    named = records if isinstance(records, Mapping) else {"": records}
    first: dict[str, tuple[R, str]] = {}
    for name, part in named.items():
        for record in part:
            first.setdefault(record.key, (record, name))
    dropped = sum(len(part) for part in named.values()) - len(first)
    return [record for record, _ in first.values()], [name for _, name in first.values()], dropped


def _require_site_files(records: object, files: Sequence[str], num_clients: int) -> None:
    if not isinstance(records, Mapping):
        raise ConfigError(
            "partition must be iid, dirichlet:ALPHA or key:FIELD for one data set, got 'files'. "
            "Name one data file for each site: a folder, a comma list or a pattern."
        )
    if len(records) != num_clients:
        raise ConfigError(
            f"num_clients must be the number of site files with partition files, got num_clients={num_clients} and "
            f"{len(records)} files. Set num_clients to {len(records)}, or name other files."
        )
    sizes = Counter(files)
    for name in records:
        if sizes[str(name)] < _MIN_SITE:
            raise DataError(
                f"site {name!r} must have at least {_MIN_SITE} records of its own, one to train on and one to hold "
                f"out, got {sizes[str(name)]} that no earlier file has. Add records to it, or leave it out."
            )


def _values(spec: PartitionSpec, pool: Sequence[R], hint: str) -> list[str]:
    """The partition field of each record; empty for a partition that needs none."""
    if not spec.field:
        return []
    values = [record.value(spec.field) for record in pool]
    if any(values):
        return values
    known = {name for record in pool for name in record.names()}
    if spec.field not in known:
        raise ConfigError(f"partition field must be a field of the data, got {spec}. {nearest(spec.field, known)}")
    raise DataError(
        f"partition field {spec.field!r} must have a value in some record, got none in {len(pool)} records. "
        f"Use another field, or iid{hint and '; '}{hint}."
    )


def _global_held_out(strata: Sequence[str], fraction: float, seed: int, num_clients: int) -> NDArray[np.int64]:
    """Sorted indices of the global held-out set: ``fraction`` of each stratum, but leave enough for its sites."""
    if fraction == 0.0:
        return np.empty(0, dtype=np.int64)
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(strata):
        groups.setdefault(name, []).append(index)
    keep = _MIN_SITE * (num_clients if len(groups) == 1 else 1)
    rng = public(seed, 0, "partition", "global")
    held: list[int] = []
    for members in groups.values():
        count = max(0, min(max(1, round(fraction * len(members))), len(members) - keep))
        held.extend(rng.permutation(members)[:count].tolist())
    if not held:
        raise DataError(
            f"a global held-out set and {num_clients} sites must share at least {_MIN_SITE * num_clients + 1} records, "
            f"got {len(strata)}. Give more data, or lower num_clients."
        )
    return np.sort(np.array(held, dtype=np.int64))


def _site(name: str, records: Sequence[R], fraction: float, seed: int) -> SiteRecords[R]:
    rest, held = split_holdout(len(records), fraction, public(seed, 0, "partition", name))
    return SiteRecords(name, tuple(records[i] for i in rest), tuple(records[i] for i in held))
