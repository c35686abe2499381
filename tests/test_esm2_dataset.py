"""Loading, cleaning and sharing proteins: every source, every way a file can be wrong, and no leakage."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import pickle
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfl.errors import ConfigError, DataError, MissingExtraError
from sfl.esm2.alphabet import TOKENS
from sfl.esm2.dataset import (
    PackedProteins,
    ProteinRecord,
    check_leakage,
    encode,
    federate_proteins,
    figures,
    genus,
    load_proteins,
    load_sites,
)
from sfl.esm2.fasta import parse_header
from sfl.esm2.proteins import RawProtein, clean
from sfl.esm2.sources import PROTEINS
from sfl.train.sources import absolute, resolve

FASTA = """>P1|A_ECOLI Alpha protein OS=Escherichia coli
MKTAYI
AKQRW
>sp|P2|B_HUMAN C->U-editing enzyme OS=Homo sapiens OX=9606 GN=B PE=1 SV=2
mktwv*
>P3 no organism
MKTWVLLX
"""
AA = "ACDEFGHIKLMNPQRSTVWY"


def proteins(n: int, organisms: int = 5, start: int = 0) -> list[ProteinRecord]:
    names = [f"Genus{k} species" for k in range(organisms)]
    return [
        ProteinRecord(f"P{i}", "M" + "".join(AA[(i // 20**k) % 20] for k in range(4)), o, genus(o), genus(o))
        for i in range(start, start + n)
        for o in [names[i % organisms]]
    ]


def write_table(path: Path, delimiter: str = ",") -> Path:
    with path.open("w", newline="") as handle:
        writer = csv.writer(handle, delimiter=delimiter)
        writer.writerow(["Entry", "Organism", "family", "seq"])
        writer.writerows([["P1", "Homo sapiens", "k", "MKTA"], ["P2", "Mus musculus", "", "MKTW"]])
    return path


def test_fasta_records(tmp_path: Path) -> None:
    path = tmp_path / "a.fasta"
    path.write_text(FASTA)
    records, report = load_proteins(str(path))
    assert [(r.id, r.sequence, r.organism, r.genus, r.label) for r in records] == [
        ("P1", "MKTAYIAKQRW", "Escherichia coli", "escherichia", "escherichia"),
        ("P2", "MKTWV", "Homo sapiens", "homo", "homo"),
        ("P3", "MKTWVLLX", "", "", ""),
    ]
    assert (report.read, report.kept, report.warnings(), report.counts()) == (3, 3, [], "none dropped")
    assert pickle.loads(pickle.dumps(records)) == records


@pytest.mark.parametrize(
    "text", [FASTA.replace("\n", "\r\n"), FASTA.replace("\n", "\r"), "\ufeff\n" + FASTA, ";c\n" + FASTA]
)
def test_fasta_of_other_line_ends_and_marks(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(text.encode())
    assert [r.id for r in load_proteins(str(path))[0]] == ["P1", "P2", "P3"]


def test_gzip_is_told_by_content(tmp_path: Path) -> None:
    zipped, plain = tmp_path / "zipped.fasta", tmp_path / "plain.fasta.gz"
    zipped.write_bytes(gzip.compress(FASTA.encode()))
    plain.write_text(FASTA)
    assert load_proteins(str(zipped))[0] == load_proteins(str(plain))[0]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", ("", "")),
        ("P1", ("P1", "")),
        ("P1|X_Y name OS=Mus musculus (Mouse) OX=1", ("P1", "Mus musculus (Mouse)")),
        ("UniRef50_P1 thing n=1 Tax=Mus musculus TaxID=10090 RepID=X", ("UniRef50_P1", "Mus musculus")),
        ("P1 OS=Brassica rapa subsp. pekinensis", ("P1", "Brassica rapa subsp. pekinensis")),
    ],
)
def test_headers(header: str, expected: tuple[str, str]) -> None:
    assert parse_header(header) == expected


@pytest.mark.parametrize(
    ("organism", "expected"),
    [("", ""), ("Homo sapiens", "homo"), ("[Clostridium] x", "clostridium"), ("uncultured", "uncultured"),
     ("'Candidatus' Pelagibacter sp.", "pelagibacter"), ("uncultured Candidatus Foo", "foo")],
)  # fmt: skip
def test_genus(organism: str, expected: str) -> None:
    assert genus(organism) == expected


def test_the_bundled_sample_is_clean() -> None:
    records, report = load_proteins()
    assert len(records) == report.kept > 3000
    assert set(report.dropped.values()) == {0}
    assert all(record.genus for record in records)


@pytest.mark.parametrize(("name", "delimiter"), [("t.csv", ","), ("t.tsv", "\t")])
@pytest.mark.parametrize("column", ["", ":seq", ":SEQ"])
def test_tables(tmp_path: Path, name: str, delimiter: str, column: str) -> None:
    records, _ = load_proteins(f"{write_table(tmp_path / name, delimiter)}{column}")
    assert [(r.id, r.sequence, r.genus) for r in records] == [("P1", "MKTA", "homo"), ("P2", "MKTW", "mus")]
    assert [r.value("family") for r in records] == ["k", ""]
    assert records[0].value("Organism") == records[0].value("organism") == "Homo sapiens"
    assert records[0].value("nothing") == ""


def test_parquet_and_saved_data_set_equal_csv(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table(
        {"Entry": ["P1", "P2"], "Organism": ["Homo sapiens", "Mus musculus"], "family": ["k", None],
         "seq": ["MKTA", "MKTW"], "embedding": [[0.5], [0.25]]}
    )  # fmt: skip
    pq.write_table(table, tmp_path / "t.parquet")
    expected = load_proteins(str(write_table(tmp_path / "t.csv")))[0]
    records, _ = load_proteins(f"{tmp_path / 't.parquet'}:seq")
    assert records == expected
    assert [dict(r.fields) for r in records] == [dict(r.fields) for r in expected]
    with pytest.raises(DataError, match=r"must have the column 'seqq'.*Did you mean 'seq'"):
        load_proteins(f"{tmp_path / 't.parquet'}:seqq")
    with pytest.raises(DataError, match="must have the column 'embedding'"):
        load_proteins(f"{tmp_path / 't.parquet'}:embedding")


def test_saved_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"id": ["P1", "P2"], "sequence": ["MKTA", "MKTW"], "label": [3, 4]})
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(str(tmp_path / "two"))
    for name in ("one", "two"):
        assert [(r.id, r.label) for r in load_proteins(str(tmp_path / name))[0]] == [("P1", "3"), ("P2", "4")]
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match="save_to_disk"):
        load_proteins(str(tmp_path / "one"))


def test_hub_data_set_and_its_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"id": ["P1"], "aa": ["MKTA"]})

    def load(name: str) -> object:
        if name != "some/proteins":
            raise ConnectionError(f"Couldn't reach {name!r} on the Hub")
        return datasets.DatasetDict(test=data, more=data)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert [r.id for r in load_proteins("hf:some/proteins:test:aa")[0]] == ["P1"]
    with pytest.raises(DataError, match=r"must have the split 'tst', got splits test, more. Did you mean 'test'"):
        load_proteins("hf:some/proteins:tst:aa")
    with pytest.raises(DataError, match="must be a data set on the Hugging Face hub, got: Couldn't reach 'no/such'"):
        load_proteins("hf:no/such")


def test_hub_without_network_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(
        DataError, match=r"hf:some/proteins:train must be reachable.*Network is unreachable.*local file"
    ):
        load_proteins("hf:some/proteins:train")


@pytest.mark.parametrize(("package", "name"), [("pyarrow.parquet", "t.parquet"), ("datasets", "saved")])
def test_missing_extra_names_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    path = tmp_path / name
    if package == "datasets":
        path.mkdir()
        (path / "state.json").touch()
    else:
        path.write_bytes(b"PAR1")
    with pytest.raises(MissingExtraError, match=r"pip install 'sfl\[data\]'"):
        load_proteins(str(path))


BAD_FILES = {
    "empty": (b"", "got an empty file"),
    "blank": (b" \n\n", "got an empty file"),
    "words": (b"hello world", "must be FASTA .*got 'hello world'"),
    "html.fasta": (b"<!DOCTYPE html>", "must be FASTA"),
    "latin.fasta": (b">P1 caf\xe9\nMKT", "got byte 0xe9 at offset 7"),
    "zeros.fasta": (b">P1\n\0\0", "NUL bytes"),
    "cut.fasta.gz": (gzip.compress(FASTA.encode())[:-20], "whole gzip data"),
    "magic.gz": (b"\x1f\x8b", "whole gzip data"),
    "bent.gz": (gzip.compress(FASTA.encode())[:10] + b"\xff" * 40, "whole gzip data"),
    "crc.gz": (gzip.compress(FASTA.encode())[:-8] + b"\0" * 8, "whole gzip data"),
    "torn.parquet": (b"PAR1junk", "must be a Parquet file"),
    "text.parquet": (b"hello", "must be a Parquet file"),
    "invalid.fasta": (b">P1\nMK1\n>P2\n\n", r"got 2 records \(1 empty, 1 invalid\).*P1 at position 3: '1'"),
    "header.fasta": (b">", r"got 1 records \(1 empty\)"),
    "nosequence.csv": (
        b"id,sequnce\n1,MKT",
        "must have a text column 'sequence', got 2 columns. Did you mean 'sequnce'",
    ),
    "headeronly.csv": (b"id,sequence\n", "got 0 records"),
    "long.csv": (b"sequence\n" + b"M" * 200_000, "must be a table"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_data_errors(tmp_path: Path, name: str) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_proteins(str(tmp_path / name))
    assert name in str(caught.value)
    assert "must" in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{}/a.fsta", "Did you mean 'a.fasta'"),
        ("{}/none/a.fasta", "cannot be read either"),
        ("{}/*.nothing", "must match at least one file"),
        ("{}/hollow", "folder with protein files"),
        ("{}/a.fasta,{}/b.fasta", "b.fasta', which does not exist"),
        ("{}/gone.csv:seq", "does not exist"),
        ("hf:", "hf:NAME"),
    ],
)
def test_bad_names(tmp_path: Path, data: str, message: str) -> None:
    (tmp_path / "a.fasta").write_text(FASTA)
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "README.md").touch()
    with pytest.raises(DataError, match=message):
        load_proteins(data.format(tmp_path, tmp_path))


@settings(max_examples=60, deadline=None)
@given(junk=st.binary(max_size=200), prefix=st.sampled_from([b"", b">", b"\x1f\x8b\x08", b"PAR1", b"sequence\n"]))
def test_no_foreign_exception_escapes(tmp_path_factory: pytest.TempPathFactory, junk: bytes, prefix: bytes) -> None:
    path = tmp_path_factory.mktemp("junk") / "junk.csv"
    path.write_bytes(prefix + junk)
    try:
        records, report = load_proteins(str(path))
    except DataError:
        return
    assert len(records) == report.kept > 0


def test_cleaning_report_lines() -> None:
    raw = [
        RawProtein("A", "MKT"),
        RawProtein("B", "mk\nt *"),
        RawProtein("C", "MJT"),
        RawProtein("", "M-T"),
        RawProtein("E", "*"),
        RawProtein("F", "M"),
    ]
    records, report = clean(raw, source="d.fasta")
    assert [r.id for r in records] == ["A"]
    assert report.warnings() == [
        "d.fasta: 1 record dropped: empty (first: E)",
        "d.fasta: 2 records dropped: invalid residues (first: C at position 2: 'J')",
        "d.fasta: 1 record dropped: too short (first: F with 1 of at least 2 residues)",
        "d.fasta: 1 record dropped: duplicate sequence (first: B)",
    ]


@given(st.lists(st.text(alphabet="AMKX*- \nj", max_size=5), max_size=30), st.integers(1, 4))
def test_every_record_is_counted_once(sequences: list[str], min_length: int) -> None:
    records, report = clean([RawProtein("x", s) for s in sequences], source="s", min_length=min_length)
    assert report.read == len(sequences) == report.kept + sum(report.dropped.values())
    assert len({r.sequence for r in records}) == len(records) == report.kept
    again, second = clean([RawProtein(r.id, r.sequence) for r in records], source="s", min_length=min_length)
    assert [r.sequence for r in again] == [r.sequence for r in records]
    assert second.warnings() == []


def test_encode_is_the_alphabet_of_esm() -> None:
    assert len(TOKENS) == 33
    assert encode("LAGVSERTIDPKQNFYMHWCXBUZO.-").tolist() == list(range(4, 31))
    assert encode("l?é").tolist() == [3, 3, 3]
    assert TOKENS[32] == "<mask>"


@given(st.lists(st.text(alphabet=AA, max_size=9), max_size=9))
def test_packed_proteins_hold_what_was_packed(sequences: list[str]) -> None:
    packed = PackedProteins.pack(sequences)
    assert len(packed) == len(sequences)
    assert packed.lengths.tolist() == [len(s) for s in sequences]
    assert all((packed[i] == encode(s)).all() for i, s in enumerate(sequences))
    with pytest.raises(IndexError):
        packed[len(sequences)]


def write_sites(folder: Path, parts: dict[str, list[ProteinRecord]]) -> Path:
    folder.mkdir()
    for name, records in parts.items():
        text = "".join(f">{r.id} OS={r.organism}\n{r.sequence}\n" for r in records)
        (folder / f"{name}.fasta").write_text(text)
    return folder


def test_site_files(tmp_path: Path) -> None:
    shared = proteins(3, start=900)
    parts = {"b": proteins(20), "a": [*proteins(30, start=100), *shared], "c": [*proteins(20, start=200), *shared]}
    folder = write_sites(tmp_path / "sites", parts)
    sites, report = load_sites(str(folder))
    assert list(sites) == ["a", "b", "c"]
    assert report.kept == 76
    data = federate_proteins(sites, partition="files", num_clients=3, seed=0)
    assert [site.name for site in data.sites] == ["a", "b", "c"]
    assert data.duplicates == 3
    own = {r.sequence for site in data.sites for r in site.train + site.held_out if site.name == "c"}
    assert not own & {r.sequence for r in shared}  # the first file keeps them
    assert list(load_sites(f"{folder}/*.fasta")[0]) == ["a", "b", "c"]
    assert list(load_sites(f"{folder}/c.fasta,{folder}/a.fasta")[0]) == ["c", "a"]
    assert list(load_sites(f"{folder}/a.fasta,{folder}/a.fasta")[0]) == ["a", "a-2"]
    assert load_proteins(str(folder))[1].dropped["duplicate"] == 3


def test_site_files_that_hold_nothing_of_their_own(tmp_path: Path) -> None:
    sites = {"one": proteins(10), "two": proteins(10)}
    with pytest.raises(DataError, match=r"site 'two' must have at least 2 records of its own.*got 0"):
        federate_proteins(sites, partition="files", num_clients=2, seed=0)
    with pytest.raises(ConfigError, match="num_clients=5 and 1 files"):
        federate_proteins({"one": proteins(10)}, partition="files", num_clients=5, seed=0)
    with pytest.raises(ConfigError, match="one data file for each site"):
        federate_proteins(proteins(10), partition="files", num_clients=2, seed=0)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(5, 80),
    clients=st.integers(1, 6),
    partition=st.sampled_from(["iid", "dirichlet:0.1", "dirichlet:5:organism", "key:organism"]),
    seed=st.integers(0, 1000),
    fractions=st.tuples(st.floats(0.01, 0.99), st.floats(0.0, 0.99)),
)
def test_federation_is_whole_and_does_not_leak(n, clients, partition, seed, fractions) -> None:
    options = {"partition": partition, "num_clients": clients, "seed": seed}
    options |= {"eval_fraction": fractions[0], "global_fraction": fractions[1]}
    refusal, data = "", None
    try:
        data = federate_proteins(proteins(n), **options)
    except DataError as error:
        refusal = str(error)
    if data is None:
        assert "got" in refusal
        assert partition.startswith("key") or n <= 2 * clients
        return
    check_leakage(data, what="sequence")
    parts = [data.held_out, *(side for site in data.sites for side in (site.train, site.held_out))]
    assert sorted(r.id for part in parts for r in part) == sorted(r.id for r in proteins(n))
    assert all(site.train and site.held_out for site in data.sites)
    assert bool(data.held_out) == (fractions[1] > 0.0)
    assert data == federate_proteins(proteins(n), **options)
    described = data.describe(figures)
    assert sum(s["train"]["records"] + s["held_out"]["records"] for s in described["sites"]) == n - len(data.held_out)


@pytest.mark.parametrize("into", ["train", "held_out", "global"])
def test_check_leakage_can_fail(into: str) -> None:
    data = federate_proteins(proteins(40), partition="iid", num_clients=2, seed=0)
    stolen = dataclasses.replace(data.sites[0].held_out[0], id="other")
    if into == "global":
        leaking = dataclasses.replace(data, held_out=(*data.held_out, stolen))
    else:
        second = dataclasses.replace(data.sites[1], **{into: (*getattr(data.sites[1], into), stolen)})
        leaking = dataclasses.replace(data, sites=(data.sites[0], second))
    with pytest.raises(DataError, match=r"site-1 \(held out\).*must share no sequence"):
        check_leakage(leaking, what="sequence")


def test_federate_really_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfl.train.federated.split_holdout", lambda n, *_: (range(n), range(1)))
    with pytest.raises(DataError, match="must share no sequence"):
        federate_proteins(proteins(40), partition="iid", num_clients=2, seed=0)


def test_repeated_sequences_are_counted_and_kept_once() -> None:
    data = federate_proteins([*proteins(20), *proteins(5)], partition="iid", num_clients=2, seed=0)
    assert data.duplicates == 5


def test_key_partition_does_not_split_organisms() -> None:
    data = federate_proteins(proteins(60, organisms=7), partition="key:organism", num_clients=3, seed=1)
    owners = [{r.organism for r in site.train + site.held_out} for site in data.sites]
    assert sum(len(owner) for owner in owners) == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partition": "key:organsm"}, "Did you mean 'organism'"),
        ({"partition": "dirichlet:1:id2"}, "Did you mean 'id'|Known"),
        ({"num_clients": 0}, "num_clients must be at least 1"),
        ({"num_clients": 30}, "at least 61 records, got 40"),
        ({"num_clients": 30, "global_fraction": 0.0}, "60 or more records, got 40"),
        ({"eval_fraction": 0.0}, "eval_fraction must be in"),
        ({"global_fraction": 1.0}, "global_fraction must be in"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        federate_proteins(proteins(40), **({"partition": "iid", "num_clients": 2, "seed": 0} | options))


def test_a_field_without_values_is_refused() -> None:
    blank = [dataclasses.replace(r, organism="", genus="", label="") for r in proteins(20)]
    with pytest.raises(DataError, match="'organism' must have a value in some record, got none in 20"):
        federate_proteins(blank, partition="key:organism", num_clients=2, seed=0)


def test_paths_are_made_absolute_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.fasta", "b.fasta", "a,b.fasta"):
        (tmp_path / name).write_text(FASTA)
    assert absolute("a.fasta, b.fasta,") == f"{tmp_path}/a.fasta,{tmp_path}/b.fasta"
    assert absolute("a,b.fasta") == f"{tmp_path}/a,b.fasta"
    assert absolute("t.csv:seq,hf:NAME") == f"{tmp_path}/t.csv:seq,hf:NAME"
    assert absolute("  ") == ""
    for data in ("a.fasta, b.fasta,", "a,b.fasta", " a.fasta "):
        assert [s.path for s in resolve(absolute(data), PROTEINS)] == [
            s.path and tmp_path / s.path for s in resolve(data, PROTEINS)
        ]
    with pytest.raises(DataError, match="must name a file between its commas"):
        absolute(" , ")


@pytest.mark.parametrize("letter", ["ß", "\ufb01", "\u0131", "\uff2d"])
def test_what_upper_case_would_turn_into_residues_is_no_residue(letter: str) -> None:
    records, report = clean([RawProtein("P1", f"MKTA{letter}M"), RawProtein("P2", "mktam")], source="s")
    assert [record.sequence for record in records] == ["MKTAM"]
    assert report.dropped["invalid"] == 1


def test_a_billion_sites_are_refused_at_once() -> None:
    with pytest.raises(DataError, match="at least 2000000001 records, got 40"):
        federate_proteins(proteins(40), partition="iid", num_clients=10**9, seed=0)
