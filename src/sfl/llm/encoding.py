"""Documents as tokens: a text, a prompt with its completion, or a conversation through the tokenizer's template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sfl.errors import DataError
from sfl.llm.documents import COMPLETION, PROMPT, TEXT, Document, Turns
from sfl.llm.tokens import Tokens
from sfl.train.pretrained import first_line

__all__ = ["encode"]


def encode(documents: Sequence[Document], tokenizer: Any, max_length: int = 0) -> tuple[Tokens, ...]:
    """Each document as tokens; of a prompt or a user's turn none is learnt.

    A text begins with the tokenizer's first token, where it has one, and ends with its last: that it ends is learnt.

    Args:
        documents: The documents.
        tokenizer: Of the model.
        max_length: Tokens that are used; 0 means all.

    Raises:
        DataError: A conversation meets a tokenizer without a template, or with one that does not take it.
    """
    parts = [_parts(document.turns) for document in documents]
    texts = [text for each in parts for text, _ in each]
    coded = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ())
    found = [
        _joined(tokenizer, [(next(coded), is_learnt) for _, is_learnt in each])
        if each
        else _conversation(document.turns, tokenizer)
        for document, each in zip(documents, parts, strict=True)
    ]
    return tuple(tokens.cut(0, max_length) if max_length else tokens for tokens in found)


def _parts(turns: Turns) -> list[tuple[str, bool]]:
    """The texts of a document, and whether each is learnt; none of a conversation, which is the template's."""
    roles = [role for role, _ in turns]
    if roles == [TEXT]:
        return [(turns[0][1], True)]
    return [(turns[0][1], False), (turns[1][1], True)] if roles == [PROMPT, COMPLETION] else []


def _joined(tokenizer: Any, parts: Sequence[tuple[list[int], bool]]) -> Tokens:
    ids = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    learnt = [False] * len(ids)
    for more, is_learnt in parts:
        ids += more
        learnt += [is_learnt] * len(more)
    return Tokens.of([*ids, int(tokenizer.eos_token_id)], [*learnt, True])


def _conversation(turns: Turns, tokenizer: Any) -> Tokens:
    """The template is asked for the conversation up to each answer, with and without it: what it adds is learnt."""
    if tokenizer.chat_template is None:
        raise DataError(
            "conversations must come with a model whose tokenizer has a chat template, got one without. Use such a "
            "model, or data with prompt and completion."
        )
    messages = [{"role": role, "content": text} for role, text in turns]
    ids: list[int] = []
    learnt: list[bool] = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _templated(tokenizer, messages[:place], answer=True)
        after = _templated(tokenizer, messages[: place + 1], answer=False)
        same = _common(before, after)  # its last token may merge with the answer's first
        if after[: len(ids)] != ids or same < len(ids):
            raise DataError(
                "a chat template must only add to what it has said before as a conversation goes on, got one that "
                "changes it. Use data with prompt and completion."
            )
        learnt += [False] * (same - len(ids)) + [True] * (len(after) - same)
        ids = after
    return Tokens.of(ids, learnt)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _templated(tokenizer: Any, messages: Sequence[dict[str, str]], *, answer: bool) -> list[int]:
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer)
    except Exception as error:  # a template is a program of the model's, and may refuse roles, or their order
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"conversations must be ones that the model's chat template takes, got the roles {roles}: "
            f"{first_line(error)}. Mend or leave out such conversations, or give prompt and completion."
        ) from error
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
