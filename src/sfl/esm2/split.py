"""Proteins shared among sites, with held-out records on every level and a check that none of them leaks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfl.core.rng import public
from sfl.errors import ConfigError, DataError, nearest
from sfl.esm2.proteins import ATTRIBUTES, ProteinRecord
from sfl.train.partition import PartitionSpec, check_disjoint, parse_partition, partition_indices, split_holdout

_TOP = 5
_MIN_SITE = 2  # one record to train on, one held out


@dataclass(frozen=True, slots=True)
class SiteProteins:
    """What one site has.

    Attributes:
        name: The site's name.
        train: Proteins that it trains on; at least one.
        held_out: Its own proteins that it never trains on; at least one.
    """

    name: str
    train: tuple[ProteinRecord, ...]
    held_out: tuple[ProteinRecord, ...]


@dataclass(frozen=True, slots=True)
class FederatedProteins:
    """A data set shared among sites. No sequence is in two of its parts.

    Attributes:
        sites: One for each site, in order of client id.
        held_out: Proteins that no site has; empty if ``global_fraction`` is 0.
        partition: How the data were shared.
        duplicates: Records that were left out as their sequence was already in an earlier one.
    """

    sites: tuple[SiteProteins, ...]
    held_out: tuple[ProteinRecord, ...]
    partition: PartitionSpec
    duplicates: int = 0

    def describe(self) -> dict[str, Any]:
        """Sizes for the report, of JSON types: each part's records, residues and most frequent organisms."""
        return {
            "partition": str(self.partition),
            "duplicates_dropped": self.duplicates,
            "sites": [
                {"site": site.name, "train": _figures(site.train), "held_out": _figures(site.held_out)}
                for site in self.sites
            ],
            "held_out": _figures(self.held_out),
        }


def _figures(records: Sequence[ProteinRecord]) -> dict[str, Any]:
    organisms = Counter(record.organism or "unknown" for record in records)
    top = sorted(organisms.items(), key=lambda item: (-item[1], item[0]))[:_TOP]
    return {
        "records": len(records),
        "residues": sum(len(record.sequence) for record in records),
        "organisms": len(organisms),
        "top_organisms": [{"organism": name, "records": count} for name, count in top],
    }


def check_leakage(data: FederatedProteins) -> None:
    """Raise unless every two parts (each site's two sides, the global held-out set) share no sequence.

    Raises:
        DataError: Two parts share a sequence; the message names them.
    """
    parts = {"the global held-out set": data.held_out}
    for site in data.sites:
        parts[f"{site.name} (train)"] = site.train
        parts[f"{site.name} (held out)"] = site.held_out
    check_disjoint({name: (r.sequence for r in part) for name, part in parts.items()}, what="sequence")


def federate_proteins(
    records: Sequence[ProteinRecord] | Mapping[str, Sequence[ProteinRecord]],
    *,
    partition: str,
    num_clients: int,
    seed: int,
    eval_fraction: float = 0.1,
    global_fraction: float = 0.1,
) -> FederatedProteins:
    """Share ``records`` among sites and hold some out: first globally, then at each site.

    Sequences that occur more than once are dropped but for the first (with site files: the first file keeps it).

    Args:
        records: All proteins, or those of each site file by its name.
        partition: iid, dirichlet:ALPHA[:FIELD], key:FIELD or files; FIELD is organism, genus, label or a column.
        num_clients: Number of sites; with ``files`` the number of files.
        seed: The run's seed: the same seed gives the same sites.
        eval_fraction: Share of a site's records that it holds out, in (0, 1).
        global_fraction: Share of all records that no site gets, in [0, 1); with ``files``, of each file's.

    Raises:
        ConfigError: The partition, the number of sites or a fraction is wrong.
        DataError: There are too few records, or an example would be on both sides.
    """
    spec = parse_partition(partition)
    _require_fractions(eval_fraction, global_fraction)
    pool, files, duplicates = _pool(records)
    by_file = spec.kind == "files"
    if by_file:
        _require_site_files(records, files, num_clients)
    values = files if by_file else _values(spec, pool)
    held = _global_held_out(values if by_file else [""] * len(pool), global_fraction, seed, num_clients)
    rest = np.setdiff1d(np.arange(len(pool), dtype=np.int64), held)
    names = list(dict.fromkeys(files)) if by_file else [f"site-{k + 1}" for k in range(num_clients)]
    kept_values = [values[i] for i in rest] if values else None
    parts = partition_indices(
        spec, len(rest), num_clients=num_clients, seed=seed, values=kept_values, min_size=_MIN_SITE
    )
    sites = tuple(
        _site(name, [pool[i] for i in rest[part]], eval_fraction, seed) for name, part in zip(names, parts, strict=True)
    )
    data = FederatedProteins(sites, tuple(pool[i] for i in held), spec, duplicates)
    check_leakage(data)
    return data


def _require_fractions(eval_fraction: float, global_fraction: float) -> None:
    if not 0.0 < eval_fraction < 1.0:
        raise ConfigError(f"eval_fraction must be in (0, 1), got {eval_fraction!r}. Use for instance 0.1.")
    if not 0.0 <= global_fraction < 1.0:
        raise ConfigError(f"global_fraction must be in [0, 1), got {global_fraction!r}. Use for instance 0.1.")


def _pool(
    records: Sequence[ProteinRecord] | Mapping[str, Sequence[ProteinRecord]],
) -> tuple[list[ProteinRecord], list[str], int]:
    """Records with distinct sequences, the site file of each (empty for a plain list), and how many were dropped."""
    named = records if isinstance(records, Mapping) else {"": records}
    first: dict[str, tuple[ProteinRecord, str]] = {}
    for name, part in named.items():
        for record in part:
            first.setdefault(record.sequence, (record, name))
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


def _values(spec: PartitionSpec, pool: Sequence[ProteinRecord]) -> list[str]:
    """The partition field of each record; empty for a partition that needs none."""
    if not spec.field:
        return []
    values = [record.value(spec.field) for record in pool]
    if any(values):
        return values
    known = {*ATTRIBUTES, *(name for record in pool for name in record.fields)}
    if spec.field not in known:
        raise ConfigError(f"partition field must be a field of the data, got {spec}. {nearest(spec.field, known)}")
    raise DataError(
        f"partition field {spec.field!r} must have a value in some record, got none in {len(pool)} records. "
        "Use another field, or iid; FASTA headers name an organism as OS=Homo sapiens."
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


def _site(name: str, records: Sequence[ProteinRecord], fraction: float, seed: int) -> SiteProteins:
    rest, held = split_holdout(len(records), fraction, public(seed, 0, "partition", name))
    return SiteProteins(name, tuple(records[i] for i in rest), tuple(records[i] for i in held))
