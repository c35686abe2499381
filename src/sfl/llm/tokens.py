"""Documents as tokens, and tokens as batches: packed into full blocks, or a row for each document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from sfl.train.batching import length_sorted_batches
from sfl.train.examples import Examples

__all__ = ["IGNORED", "Packed", "Rows", "TokenBatch", "Tokens", "unpacked"]

IGNORED = -100
"""The target of a token after which nothing is to be foretold; torch's own."""

Ids: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """A document as the model is shown it.

    Attributes:
        ids: int64, shape (tokens,).
        targets: What each token foretells: the next one where that is to be learnt, else ``IGNORED``; shape (tokens,).
    """

    ids: Ids
    targets: Ids

    @classmethod
    def of(cls, ids: Sequence[int], learnt: Sequence[bool]) -> Tokens:
        """From a document's tokens, and which of them are to be learnt; the first never is: nothing foretells it."""
        found = np.asarray(ids, dtype=np.int64)
        targets = np.full(len(found), IGNORED, dtype=np.int64)
        targets[:-1][np.asarray(learnt[1:], dtype=bool)] = found[1:][np.asarray(learnt[1:], dtype=bool)]
        return cls(found, targets)

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, start: int, length: int) -> Tokens:
        """A part of it; its last token still foretells the one after it."""
        return Tokens(self.ids[start : start + length], self.targets[start : start + length])


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """Rows of tokens.

    Attributes:
        ids: int64, shape (rows, length).
        targets: The next token, or ``IGNORED``; int64, shape (rows, length).
        positions: Of each token in its document, in packed rows: a row's documents do not see each other. int64, shape
            (rows, length); ``None`` where each row is one document.
        real: Which tokens are no padding, bool, shape (rows, length); ``None`` where all are.
    """

    ids: Ids
    targets: Ids
    positions: Ids | None = None
    real: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class _Documents(Examples[TokenBatch]):
    """Documents of a site.

    Attributes:
        documents: The documents.
        batch_size: Rows in a batch.
        block_size: Tokens in a row.
        padding: The token that fills a row; any, as nothing sees it.
    """

    documents: tuple[Tokens, ...]
    batch_size: int
    block_size: int
    padding: int = 0

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document that one row can show."""
        return np.minimum([len(document) for document in self.documents], self.block_size).astype(np.int64)

    def apart(self, chosen: NDArray[np.int64], generator: np.random.Generator) -> TokenBatch:
        """Just these documents, a row for each; of a longer one than a row, a part that is drawn."""
        drawn = [self.documents[int(index)] for index in chosen]
        starts = generator.integers(0, [max(len(document) - self.block_size, 0) + 1 for document in drawn])
        parts = [document.cut(int(at), self.block_size) for document, at in zip(drawn, starts, strict=True)]
        return self._padded(parts)

    def _padded(self, parts: Sequence[Tokens]) -> TokenBatch:
        return padded(parts, self.padding)


@dataclass(frozen=True)
class Packed(_Documents):
    """Documents one after the other in full rows. No token sees, or foretells, another document.

    A document that does not end with its row goes on in the next, as if it began there. What is left of a pass that
    fills no row is shown in an evaluation, and in training only where it is all there is.
    """

    def epoch(self, generator: np.random.Generator) -> Iterator[TokenBatch]:
        """One pass in random order."""
        rows, rest = self._rows(generator.permutation(len(self.documents)))
        for start in range(0, len(rows), self.batch_size):
            yield rows_of(rows, start, self.batch_size)
        if not len(rows) and rest is not None:
            yield rest

    def evaluation(self, generator: np.random.Generator) -> Iterator[TokenBatch]:  # noqa: ARG002
        """One pass in order, with every token."""
        rows, rest = self._rows(np.arange(len(self.documents)))
        for start in range(0, len(rows), self.batch_size):
            yield rows_of(rows, start, self.batch_size)
        if rest is not None:
            yield rest

    def _rows(self, order: NDArray[np.int64]) -> tuple[TokenBatch, TokenBatch | None]:
        """All full rows, and what is left as a short one."""
        chosen = [self.documents[int(index)] for index in order]
        ids = np.concatenate([document.ids for document in chosen]) if chosen else np.empty(0, dtype=np.int64)
        targets = np.concatenate([document.targets for document in chosen]) if chosen else ids.copy()
        size, begins = self.block_size, np.zeros(len(ids), dtype=np.int64)
        starts = np.cumsum([0, *(len(document) for document in chosen)])[:-1]
        begins[starts] = starts
        begins[::size] = np.arange(0, len(ids), size)
        positions = np.arange(len(ids)) - np.maximum.accumulate(begins)
        full = len(ids) // size
        parts = [part[: full * size].reshape(full, size) for part in (ids, targets, positions)]
        rest = [part[full * size :][None, :] for part in (ids, targets, positions)]
        left = TokenBatch(rest[0], rest[1], rest[2]) if rest[0].size else None
        return TokenBatch(parts[0], parts[1], parts[2]), left


@dataclass(frozen=True)
class Rows(_Documents):
    """A row for each document, or for each part of one that is longer than a row."""

    def epoch(self, generator: np.random.Generator) -> Iterator[TokenBatch]:
        """One pass in batches of like lengths, in random order."""
        parts = self._parts()
        lengths = np.array([len(part) for part in parts], dtype=np.int64)
        for batch in length_sorted_batches(lengths, self.batch_size, generator):
            yield self._padded([parts[int(index)] for index in batch])

    def evaluation(self, generator: np.random.Generator) -> Iterator[TokenBatch]:
        """The same; the order changes no figure."""
        return self.epoch(generator)

    def _parts(self) -> list[Tokens]:
        size = self.block_size
        return [document.cut(at, size) for document in self.documents for at in range(0, len(document), size)]


def padded(parts: Sequence[Tokens], padding: int = 0) -> TokenBatch:
    """A row for each part, filled up to the longest."""
    width = max(len(part) for part in parts)
    ids = np.full((len(parts), width), padding, dtype=np.int64)
    targets = np.full((len(parts), width), IGNORED, dtype=np.int64)
    real = np.zeros((len(parts), width), dtype=np.bool_)
    for row, part in enumerate(parts):
        ids[row, : len(part)], targets[row, : len(part)], real[row, : len(part)] = part.ids, part.targets, True
    return TokenBatch(ids, targets, None, None if real.all() else real)


def unpacked(batch: TokenBatch) -> TokenBatch:
    """The documents of packed rows, and what rows hold of one, in a row each."""
    if batch.positions is None:
        return batch
    starts = np.flatnonzero(batch.positions.reshape(-1) == 0)[1:]
    ids, targets = (np.split(part.reshape(-1), starts) for part in (batch.ids, batch.targets))
    return padded([Tokens(*part) for part in zip(ids, targets, strict=True)])


def rows_of(batch: TokenBatch, start: int, count: int) -> TokenBatch:
    """Some rows of a packed batch."""
    part = slice(start, start + count)
    positions = None if batch.positions is None else batch.positions[part]
    return TokenBatch(batch.ids[part], batch.targets[part], positions)
