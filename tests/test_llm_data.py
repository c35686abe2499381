"""Documents: every source and kind, what is learnt of each, and rows in which no document sees another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfl.errors import ConfigError, DataError
from sfl.llm.config import LLMClientConfig, LLMRunConfig
from sfl.llm.dataset import federate_documents, figures, load_documents, load_sites
from sfl.llm.documents import Document
from sfl.llm.encoding import encode
from sfl.llm.model import BUNDLED, find_model, load_tokenizer
from sfl.llm.tokens import IGNORED, Packed, Rows, TokenBatch, Tokens
from sfl.types import FederationConfig


def text(content: str, **fields: str) -> Document:
    return Document("d", (("text", content),), fields)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(find_model(BUNDLED))


# ------------------------------------------------------------------------------------------------------------ sources


def lines(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_text_file_is_parted_by_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufefffirst line\r\nsecond\r\n\r\n  \t\r\nother\n\n\nthird\n")
    documents, report = load_documents(str(tmp_path / "a.txt"))
    assert [d.turns for d in documents] == [(("text", t),) for t in ("first line\nsecond", "other", "third")]
    assert (report.read, report.kept) == (3, 3)


def test_the_kinds_of_json_lines(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    shared = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hey"}]
    name = lines(
        tmp_path / "a.jsonl",
        {"text": "plain", "author": "A", "year": 1599, "id": "x1"},
        {"prompt": "2+2=", "completion": "4", "author": "B"},
        {"Instruction": "say", "Output": "said"},
        {"messages": chat},
        {"conversations": shared},
        {"messages": "no list"},
        {"messages": [{"role": "user", "content": "never answered"}]},
        {"text": "  "},
        {"text": "plain"},
        {"prompt": "2+2=", "completion": ""},
    )
    documents, report = load_documents(name)
    assert [d.turns for d in documents] == [
        (("text", "plain"),),
        (("prompt", "2+2="), ("completion", "4")),
        (("prompt", "say"), ("completion", "said")),
        (("user", "hi"), ("assistant", "ho")),
        (("user", "hi"), ("assistant", "hey")),
    ]
    assert (documents[0].id, documents[0].value("author"), documents[0].value("year")) == ("x1", "A", "1599")
    assert documents[1].id == "record-2"
    assert report.counts() == "2 empty, 2 without a conversation, 1 duplicate"
    assert report.read == 10


def test_tables_and_saved_sets_equal_json_lines(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq
    from datasets import Dataset

    rows = [{"text": "one, with a comma", "author": "A"}, {"text": 'two "quoted"', "author": "B"}]
    name = lines(tmp_path / "a.jsonl", *rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text('author,text\nA,"one, with a comma"\nB,"two ""quoted"""\n')
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    wanted = load_documents(name)[0]
    for other in ("a.parquet", "a.csv", "saved"):
        found = load_documents(str(tmp_path / other))[0]
        assert [(d.turns, d.value("author")) for d in found] == [(d.turns, d.value("author")) for d in wanted]


def test_conversations_in_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    pq.write_table(pa.Table.from_pylist([{"messages": chat}]), tmp_path / "a.parquet")
    (document,) = load_documents(str(tmp_path / "a.parquet"))[0]
    assert document.turns == (("user", "hi"), ("assistant", "ho"))


def test_a_named_column(tmp_path: Path) -> None:
    name = lines(tmp_path / "a.jsonl", {"text": "not this", "body": "this"})
    assert load_documents(f"{name}:body")[0][0].turns == (("text", "this"),)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ('{"text": "a"}\n{"text": \n', "a.jsonl", "line 2"),
        ("[1]\n", "a.jsonl", "got list in line 1"),
        ('{"tekst": "a"}\n', "a.jsonl", "got the columns tekst. Did you mean 'tekst'"),
        ('{"text": ""}\n', "a.jsonl", r"at least one usable document, got 1 records \(1 empty\)"),
        ("", "a.txt", "an empty file"),
        ("author\nA\n", "a.csv", "must have text, prompt and completion, or messages"),
    ],
)
def test_bad_files_are_data_errors(tmp_path: Path, content: str, name: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_documents(str(tmp_path / name))


def test_the_bundled_plays_become_sites_of_their_own() -> None:
    documents, report = load_documents()
    assert report.kept > 5000
    assert {name for d in documents for name in d.fields} == {"work", "speaker"}
    data = federate_documents(documents, partition="key:work", num_clients=8, seed=0)
    works = [{d.value("work") for d in (*site.train, *site.held_out)} for site in data.sites]
    assert all(len(each) == 1 for each in works)
    assert len(set.union(*works)) == 8
    assert figures(data.sites[0].train)["top"][0][1] > 1


def test_site_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        lines(tmp_path / f"{name}.jsonl", *({"text": f"{name}{k}"} for k in range(4)))
    sites, report = load_sites(str(tmp_path))
    assert {name: len(found) for name, found in sites.items()} == {"a": 4, "b": 4}
    assert report.kept == 8


# -------------------------------------------------------------------------------------------------- what is learnt


def learnt(tokens: Tokens, tokenizer: Any) -> str:
    return tokenizer.decode(tokens.targets[tokens.targets != IGNORED])


def test_of_a_text_all_is_learnt_but_its_first_token(tokenizer: Any) -> None:
    (tokens,) = encode([text("To be, or not to be")], tokenizer)
    end = tokenizer.eos_token
    assert tokenizer.decode(tokens.ids) == f"{end}To be, or not to be{end}"
    assert learnt(tokens, tokenizer) == f"To be, or not to be{end}"


def test_of_a_prompt_none_is_learnt(tokenizer: Any) -> None:
    (tokens,) = encode([Document("d", (("prompt", "To be"), ("completion", ", or not")))], tokenizer)
    end = tokenizer.eos_token
    assert tokenizer.decode(tokens.ids) == f"{end}To be, or not{end}"
    assert learnt(tokens, tokenizer) == f", or not{end}"


def test_of_a_conversation_the_answers_are_learnt(tokenizer: Any) -> None:
    turns = (("system", "S"), ("user", "Who?"), ("assistant", "I."), ("user", "And?"), ("assistant", "He."))
    (tokens,) = encode([Document("d", turns)], tokenizer)
    end = tokenizer.eos_token
    whole = tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=False)
    assert tokenizer.decode(tokens.ids) == whole
    assert learnt(tokens, tokenizer) == f"I.{end}He.{end}"


def test_a_conversation_needs_a_template(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    document = Document("d", (("user", "Who?"), ("assistant", "I.")))
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(DataError, match="a chat template, got one without"):
        encode([document], tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"takes, got the roles (user|user, assistant): roles must alternate"):
        encode([document], tokenizer)
    last = "{{ messages[-1]['content'] }}"  # forgets what was said before
    monkeypatch.setattr(tokenizer, "chat_template", last)
    with pytest.raises(DataError, match="must only add"):
        encode([Document("d", (*document.turns, ("user", "And?"), ("assistant", "He.")))], tokenizer)


def test_a_document_is_cut_at_max_length(tokenizer: Any) -> None:
    whole, cut = (encode([text("To be, or not to be")], tokenizer, n)[0] for n in (0, 3))
    assert cut.ids.tolist() == whole.ids[:3].tolist()
    assert cut.targets.tolist() == whole.targets[:3].tolist()


# --------------------------------------------------------------------------------------------------------------- rows

documents = st.lists(st.integers(2, 30), min_size=1, max_size=12)


def numbered(lengths: list[int]) -> tuple[Tokens, ...]:
    """Documents whose tokens are all different, so that each can be found again."""
    ends = np.cumsum(lengths)
    return tuple(Tokens.of(list(range(end - n, end)), [True] * n) for n, end in zip(lengths, ends, strict=True))


def pairs_of(batches: list[TokenBatch]) -> list[tuple[int, int]]:
    """Each token with what it foretells."""
    found = [
        (int(a), int(b))
        for batch in batches
        for a, b in zip(batch.ids.ravel(), batch.targets.ravel(), strict=True)
        if b != IGNORED
    ]
    return sorted(found)


@given(lengths=documents, rows=st.integers(1, 4), size=st.integers(8, 20))
def test_an_evaluation_foretells_every_token_once_from_the_one_before(lengths: list[int], rows: int, size: int) -> None:
    wanted = sorted((int(d.ids[k]), int(d.ids[k + 1])) for d in numbered(lengths) for k in range(len(d) - 1))
    for kind in (Packed, Rows):
        examples = kind(numbered(lengths), rows, size)
        assert pairs_of(list(examples.evaluation(np.random.default_rng(0)))) == wanted


@given(lengths=documents, rows=st.integers(1, 4), size=st.integers(8, 20), seed=st.integers(0, 9))
def test_packed_rows_are_full_and_their_positions_tell_documents_apart(
    lengths: list[int], rows: int, size: int, seed: int
) -> None:
    found = numbered(lengths)
    where = {int(t): (d, k) for d, document in enumerate(found) for k, t in enumerate(document.ids)}
    batches = list(Packed(found, rows, size).epoch(np.random.default_rng(seed)))
    seen = [int(t) for batch in batches for t in batch.ids.ravel()]
    assert len(seen) == len(set(seen))
    assert len(seen) == (sum(lengths) // size * size or sum(lengths))
    for batch in batches:
        assert batch.real is None
        assert sum(lengths) < size or batch.ids.shape[1] == size
        assert batch.positions is not None
        for ids, positions in zip(batch.ids, batch.positions, strict=True):
            for k in range(1, len(ids)):
                goes_on = where[int(ids[k])][0] == where[int(ids[k - 1])][0]
                assert positions[k] == (positions[k - 1] + 1 if goes_on else 0)
            assert positions[0] == 0


@given(lengths=documents, size=st.integers(8, 20), seed=st.integers(0, 9))
def test_a_row_apart_is_of_one_document(lengths: list[int], size: int, seed: int) -> None:
    found = numbered(lengths)
    examples = Packed(found, 4, size)
    chosen = np.arange(len(found))
    batch = examples.apart(chosen, np.random.default_rng(seed))
    assert batch.positions is None
    real = np.ones(batch.ids.shape, dtype=bool) if batch.real is None else batch.real
    for index, document in enumerate(found):
        row = batch.ids[index][real[index]].tolist()
        assert len(row) == min(len(document), size) == examples.lengths[index]
        at = document.ids.tolist().index(row[0])
        assert row == document.ids[at : at + len(row)].tolist()
        assert not (batch.targets[index][~real[index]] != IGNORED).any()


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 4}, "block_size must be at least 8"),
        ({"max_length": 1}, "max_length must be 0"),
        ({"lora_alpha": 0.0}, "lora_alpha must be positive"),
        ({"lora_dropout": 1.0}, "lora_dropout must be in"),
        ({"peft": "none", "lora_targets": "c_attn"}, "lora_targets must come with peft=lora"),
        ({"peft": "prompt", "lora_aggregation": "exact"}, "lora_aggregation must come with peft=lora"),
        ({"peft": "none", "dtype": "bfloat16"}, "dtype must be auto or float32"),
        ({"lora_ranks": "8,x"}, "lora_ranks must be whole numbers from 1 to lora_r=8"),
        ({"lora_ranks": "9"}, "lora_ranks must be whole numbers from 1 to lora_r=8"),
        ({"gradient_accumulation": 0}, "gradient_accumulation must be at least 1"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLMClientConfig(**options)


def test_ranks_are_one_for_each_site() -> None:
    client = LLMClientConfig(lora_ranks="8,2", lora_aggregation="exact")
    assert LLMRunConfig(client=client).client.ranks(2) == (8, 2)
    with pytest.raises(ConfigError, match="one for each of num_clients=3 sites, got 2"):
        LLMRunConfig(client=client, federation=FederationConfig(num_clients=3))
