"""ESM2's alphabet: residues to token ids, and proteins packed into one buffer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Tokens: TypeAlias = NDArray[np.uint8]

STANDARD = "LAGVSERTIDPKQNFYMHWC"
"""The 20 standard amino acids, in the order of ESM's alphabet (token ids 4 to 23)."""

RARE = "XBUZO"
"""Unknown and ambiguous residues, selenocysteine and pyrrolysine (token ids 24 to 28)."""

TOKENS = ("<cls>", "<pad>", "<eos>", "<unk>", *STANDARD, *RARE, ".", "-", "<null_1>", "<mask>")
"""The 33 tokens of every ESM2 checkpoint; a token's place is its id."""

CLS, PAD, EOS, UNK = 0, 1, 2, 3
FIRST_RESIDUE = 4
MASK = 32

_TABLE: Tokens = np.full(256, UNK, dtype=np.uint8)
for _id, _token in enumerate(TOKENS):
    if len(_token) == 1:
        _TABLE[ord(_token)] = _id


def encode(sequence: str) -> Tokens:
    """Token ids of the residues, without ``<cls>`` and ``<eos>``: uint8, shape (len(sequence),).

    What is no upper-case residue of the alphabet is ``<unk>``.

    Example:
        >>> encode("LAG?").tolist()
        [4, 5, 6, 3]
    """
    return _TABLE[np.frombuffer(sequence.encode("ascii", "replace"), dtype=np.uint8)]


@dataclass(frozen=True, slots=True, eq=False)
class PackedProteins:
    """Many token sequences in one buffer: a byte a residue and eight a protein.

    Attributes:
        tokens: uint8, shape (residues,).
        offsets: int64, shape (proteins + 1,): protein i is ``tokens[offsets[i]:offsets[i + 1]]``.
    """

    tokens: Tokens
    offsets: NDArray[np.int64]

    @classmethod
    def pack(cls, sequences: Iterable[str]) -> PackedProteins:
        """Encode and concatenate ``sequences``."""
        texts = list(sequences)
        offsets = np.zeros(len(texts) + 1, dtype=np.int64)
        np.cumsum([len(text) for text in texts], out=offsets[1:])
        return cls(encode("".join(texts)), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Tokens:
        """Token ids of one protein, as a view."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be below {len(self)}, got {index}.")
        place = index % len(self)
        return self.tokens[self.offsets[place] : self.offsets[place + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Residues of each protein, shape (proteins,)."""
        return np.diff(self.offsets)
