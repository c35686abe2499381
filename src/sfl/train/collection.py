"""Where an application's records come from: sources that are read, cleaned and shared out in one way for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

from sfl.errors import DataError
from sfl.train.cleaning import CleaningReport
from sfl.train.federated import Federated, R, Shares, federate
from sfl.train.sources import Shelf, Source, names_of_sites, resolve

__all__ = ["Collection"]


@dataclass(frozen=True, kw_only=True)
class Collection(Generic[R]):
    """Records of one kind.

    Attributes:
        shelf: What files of them may be.
        read: Reads a source, and drops what is unusable or has one of the given keys, to which it adds those it keeps.
        record: How messages call a record: protein.
        content: How they call what makes two records the same: sequence.
        holds: What a file of them holds: amino-acid sequences.
        hint: What to say where the field of a partition has no value in any record.
    """

    shelf: Shelf
    read: Callable[[Source, set[str]], tuple[list[R], CleaningReport]]
    record: str
    content: str
    holds: str
    hint: str

    def load(self, data: str = "") -> tuple[list[R], CleaningReport]:
        """All usable records that ``data`` names, in file order; a content is kept once.

        Args:
            data: Empty for the bundled sample, or a path, ``path:column``, folder, comma list, pattern, or ``hf:NAME``
                (see `sfl.train.sources.resolve`).

        Raises:
            DataError: A source is missing or unreadable, or nothing in it is usable.
            MissingExtraError: A source needs pyarrow or datasets, which is not installed.
        """
        seen: set[str] = set()
        parts = [self.read(source, seen) for source in resolve(data, self.shelf)]
        name = parts[0][1].source if len(parts) == 1 else data
        report = CleaningReport.merge(name, (part for _, part in parts))
        self._require_usable(report)
        return [record for part, _ in parts for record in part], report

    def load_sites(self, data: str) -> tuple[dict[str, list[R]], CleaningReport]:
        """The same, by file, for partition ``files``: one file is one site, called as the file.

        A content may still occur in several files: ``federate`` keeps it in the first.
        """
        sources = resolve(data, self.shelf)
        sites: dict[str, list[R]] = {}
        reports: list[CleaningReport] = []
        for name, source in zip(names_of_sites(sources), sources, strict=True):
            sites[name], report = self.read(source, set())
            self._require_usable(report)
            reports.append(report)
        return sites, CleaningReport.merge(data, reports)

    def federate(
        self,
        records: Sequence[R] | Mapping[str, Sequence[R]],
        *,
        partition: str,
        num_clients: int,
        seed: int,
        eval_fraction: float = 0.1,
        global_fraction: float = 0.1,
    ) -> Federated[R]:
        """Share records among sites and hold some out; see `sfl.train.federated.federate` and ``Shares``."""
        shares = Shares(
            partition=partition,
            num_clients=num_clients,
            seed=seed,
            eval_fraction=eval_fraction,
            global_fraction=global_fraction,
        )
        return federate(records, shares, what=self.content, hint=self.hint)

    def _require_usable(self, report: CleaningReport) -> None:
        if not report.kept:
            lines = "; ".join(report.warnings())
            raise DataError(
                f"{report.source} must hold at least one usable {self.record}, got {report.read} records "
                f"({report.counts()}). Check that it holds {self.holds}{f': {lines}' if lines else ''}."
            )
