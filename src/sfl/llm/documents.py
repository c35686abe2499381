"""What a document is: a text, a prompt with its completion, or a conversation; and the cleaning of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

from sfl.train.cleaning import CleaningReport, Dropped

__all__ = [  # noqa: RUF022 - plain order
    "ATTRIBUTES",
    "COMPLETION",
    "Document",
    "PROMPT",
    "TEXT",
    "Turns",
    "clean",
    "turns_of",
]

TEXT, PROMPT, COMPLETION = "text", "prompt", "completion"
_COMPLETIONS = ("completion", "response", "output", "answer")
_PROMPTS = ("prompt", "instruction", "question")
_MESSAGES = ("messages", "conversations", "conversation")
_REASONS = {
    "empty": "empty",
    "a conversation that is none": "without a conversation",
    "duplicate text": "duplicate",
}

Turns: TypeAlias = tuple[tuple[str, str], ...]
"""Who says what: ``text`` alone, ``prompt`` and ``completion``, or the roles of a conversation."""


@dataclass(frozen=True, slots=True)
class Document:
    """A document to learn from.

    Attributes:
        id: Of its source, or ``record-N``.
        turns: Who says what.
        fields: All other columns of the source.
    """

    id: str
    turns: Turns
    fields: Mapping[str, str] = field(default_factory=dict[str, str], compare=False, repr=False)

    @property
    def key(self) -> str:
        """Two documents that say the same are the same."""
        return "\x1e".join(f"{role}\x1f{text}" for role, text in self.turns)

    @property
    def size(self) -> int:
        """Characters."""
        return sum(len(text) for _, text in self.turns)

    def value(self, name: str) -> str:
        """The field of this name; empty if absent."""
        return self.id if name == "id" else self.fields.get(name, "")

    def names(self) -> Iterable[str]:
        """The columns of its source."""
        return (*ATTRIBUTES, *self.fields)


ATTRIBUTES = ("id",)
"""What every document has; a source's columns come on top."""


def turns_of(row: Mapping[str, Any], column: str = "") -> tuple[Turns | None, frozenset[str]]:
    """What a row says, and the columns that say it.

    Args:
        row: Values by column.
        column: The column of texts; empty to look for ``messages``, ``prompt`` and ``completion``, or ``text``.

    Returns:
        Nothing (``None``) for a conversation that is none.
    """
    lower = {name.lower(): name for name in reversed(list(row))}
    if column:
        name = column if column in row else lower.get(column.lower(), "")
        return ((TEXT, _text(row.get(name))),), frozenset({name})
    for wanted in _MESSAGES:
        if row.get(lower.get(wanted, "")):
            name = lower[wanted]
            return _conversation(row[name]), frozenset({name})
    prompt = next((lower[name] for name in _PROMPTS if name in lower), "")
    completion = next((lower[name] for name in _COMPLETIONS if name in lower), "")
    if prompt and completion:
        turns = (PROMPT, _text(row[prompt])), (COMPLETION, _text(row[completion]))
        return turns, frozenset({prompt, completion})
    name = lower.get(TEXT, "")
    return ((TEXT, _text(row.get(name))),), frozenset({name})


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _conversation(value: object) -> Turns | None:
    """Messages with a role and a content, one of them the assistant's, which is what is learnt."""
    if not isinstance(value, list):
        return None
    turns: list[tuple[str, str]] = []
    for message in cast("list[object]", value):
        if not isinstance(message, Mapping):
            return None
        told = cast("Mapping[str, object]", message)
        role, content = told.get("role", told.get("from")), told.get("content", told.get("value"))
        if not (isinstance(role, str) and isinstance(content, str)):
            return None
        turns.append(({"human": "user", "gpt": "assistant"}.get(role, role), content))
    return tuple(turns) if any(role == "assistant" and text.strip() for role, text in turns) else None


def clean(
    raw: Iterable[tuple[str, Turns | None, Mapping[str, str]]], *, source: str, seen: set[str] | None = None
) -> tuple[list[Document], CleaningReport]:
    """Drop, and count, what is empty, no conversation, or there already.

    Args:
        raw: Id, turns and other fields of each record of one source.
        source: The source's name, for the report.
        seen: Keys that count as having occurred; those that are kept are added to it.
    """
    known = set[str]() if seen is None else seen
    documents: list[Document] = []
    dropped = Dropped(_REASONS)
    for number, (name, turns, fields) in enumerate(raw, start=1):
        document = Document(name or f"record-{number}", turns or (), fields)
        problem = _problem(document, turns, known)
        if problem:
            dropped.add(problem, document.id)
            continue
        known.add(document.key)
        documents.append(document)
    return documents, dropped.report(source, len(documents))


def _problem(document: Document, turns: Turns | None, known: set[str]) -> str:
    if turns is None:
        return "a conversation that is none"
    learnt = [text for role, text in turns if role not in (PROMPT, "user", "system")]
    if not any(text.strip() for text in learnt):
        return "empty"
    return "duplicate text" if document.key in known else ""
