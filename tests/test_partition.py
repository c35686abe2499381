"""Laws of the partitions: each is a partition, none is empty, and skew goes the way its parameter says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfl.core.rng import public
from sfl.errors import ConfigError, DataError
from sfl.train.partition import (
    PartitionSpec,
    check_disjoint,
    dirichlet,
    parse_partition,
    partition_indices,
    split_holdout,
    split_holdout_groups,
)

FORMS = {
    "iid": PartitionSpec("iid"),
    " IID ": PartitionSpec("iid"),
    "files": PartitionSpec("files"),
    "dirichlet:0.5": PartitionSpec("dirichlet", 0.5, "label"),
    "dirichlet(0.5)": PartitionSpec("dirichlet", 0.5, "label"),
    "dirichlet:0.5:genus": PartitionSpec("dirichlet", 0.5, "genus"),
    "dirichlet(1e-3, genus)": PartitionSpec("dirichlet", 0.001, "genus"),
    "key:organism": PartitionSpec("key", field="organism"),
    "key(organism)": PartitionSpec("key", field="organism"),
}
BAD_FORMS = {
    "": "Known: ",
    "idd": "Did you mean 'iid'",
    "iid:3": "iid takes no argument",
    "files:x": "files takes no argument",
    "key": "key:organism",
    "key:": "key:organism",
    "key:a:b": "key:organism",
    "dirichlet": "dirichlet:0.5",
    "dirichlet:": "dirichlet:0.5",
    "dirichlet:zero": "positive, finite",
    "dirichlet:0": "positive, finite",
    "dirichlet:-1": "positive, finite",
    "dirichlet:nan": "positive, finite",
    "dirichlet:inf": "positive, finite",
    "dirichlet:1:genus:x": "dirichlet:0.5",
}


@pytest.mark.parametrize(("text", "spec"), FORMS.items())
def test_parse(text: str, spec: PartitionSpec) -> None:
    assert parse_partition(text) == spec
    assert parse_partition(str(spec)) == spec


@pytest.mark.parametrize(("text", "remedy"), BAD_FORMS.items())
def test_parse_refuses(text: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=r"partition must be .*, got ") as caught:
        parse_partition(text)
    assert remedy in str(caught.value)


def assert_partition(parts: list[np.ndarray], n: int, num_clients: int, min_size: int = 1) -> None:
    assert len(parts) == num_clients
    assert all(part.dtype == np.int64 and len(part) >= min_size for part in parts)
    assert all((np.diff(part) > 0).all() for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))


@settings(max_examples=150, deadline=None)
@given(
    labels=st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=80),
    clients=st.integers(1, 10),
    alpha=st.floats(5e-324, 1e300),
    kind=st.sampled_from(["iid", "dirichlet", "key", "files"]),
    seed=st.integers(0, 2**63 - 1),
    min_size=st.integers(0, 3),
)
def test_partition_is_a_partition_or_says_why(labels, clients, alpha, kind, seed, min_size) -> None:
    spec = PartitionSpec(kind, alpha, "label")

    def share() -> list[np.ndarray]:
        return partition_indices(spec, len(labels), num_clients=clients, seed=seed, values=labels, min_size=min_size)

    refusal, parts = "", []
    try:
        parts = share()
    except (ConfigError, DataError) as error:
        refusal = str(error)
    if refusal:
        assert "got" in refusal
        assert len(labels) < clients * max(1, min_size) or kind in ("key", "files")
        return
    assert_partition(parts, len(labels), clients, max(1, min_size))
    assert all((a == b).all() for a, b in zip(parts, share(), strict=True))
    if kind in ("iid", "dirichlet"):
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
    else:  # no key group is on two sites
        owners = [{labels[i] for i in part} for part in parts]
        assert sum(len(owner) for owner in owners) == len(set(labels))


def label_shares(parts: list[np.ndarray], labels: np.ndarray) -> np.ndarray:
    return np.array([[np.mean(labels[part] == name) for name in np.unique(labels)] for part in parts])


def test_dirichlet_concentration_runs_from_one_label_to_uniform() -> None:
    labels = np.repeat([f"l{k}" for k in range(10)], 400)
    top = []
    for alpha in (1e-6, 0.1, 1.0, 10.0, 1e9):
        shares = [label_shares(dirichlet(labels.tolist(), 8, alpha, public(s, 0, "t")), labels) for s in range(5)]
        top.append(float(np.mean([share.max(axis=1).mean() for share in shares])))
    assert top[1:] == sorted(top[1:], reverse=True)
    assert min(top[:2]) > 0.6  # 500 records a site, 400 a label: at most 0.8
    assert top[-1] < 0.14
    assert np.abs(np.array(shares)[:, :-1] - 0.1).max() < 0.06  # the last site takes what is left: noisier


def test_dirichlet_draws_the_label_mix_of_hsu_et_al() -> None:
    """The first site's mix is Dir(alpha p): mean p and variance p (1 - p) / (alpha + 1), up to sampling noise."""
    labels = ["a"] * 3000 + ["b"] * 7000
    mixes = [np.mean(dirichlet(labels, 5, 2.0, public(s, 0, "t"))[0] < 3000) for s in range(300)]
    assert np.mean(mixes) == pytest.approx(0.3, abs=0.05)
    assert np.var(mixes) == pytest.approx(0.3 * 0.7 / 3.0, rel=0.3)


def test_dirichlet_of_many_labels_and_sites_is_quick_and_whole() -> None:
    labels = [f"l{k % 5000}" for k in range(20_000)]
    assert_partition(dirichlet(labels, 50, 0.3, public(0, 0, "t")), 20_000, 50, 400)


def test_seed_changes_the_draw() -> None:
    one, two = (partition_indices(PartitionSpec("iid"), 50, num_clients=2, seed=seed)[0].tolist() for seed in (0, 1))
    assert one != two


def test_key_balances_biggest_first() -> None:
    keys = ["a"] * 5 + ["b"] * 4 + ["c"] * 3 + ["d"] * 3 + ["e"] * 3
    parts = partition_indices(PartitionSpec("key", field="k"), 18, num_clients=2, seed=0, values=keys)
    assert [{keys[i] for i in part} for part in parts] == [{"a", "d"}, {"b", "c", "e"}]


@pytest.mark.parametrize(
    ("kind", "values", "clients", "message"),
    [
        ("iid", ["a"] * 3, 4, "4 sites .* 4 or more records, got 3"),
        ("dirichlet", ["a"] * 3, 4, "4 sites .* 4 or more records, got 3"),
        ("key", ["a", "a", "b", "b"], 3, "each of 3 sites, got 2 keys"),
        ("files", ["a", "a", "b"], 3, "num_clients=3 and 2 files"),
        ("iid", ["a"], 0, "num_clients must be at least 1, got 0"),
    ],
)
def test_impossible_partitions_say_the_numbers(kind, values, clients, message) -> None:
    spec = PartitionSpec(kind, 1.0, "f")
    with pytest.raises((ConfigError, DataError), match=message):
        partition_indices(spec, len(values), num_clients=clients, seed=0, values=values)


def test_uneven_keys_and_short_files_are_refused() -> None:
    values = ["a"] * 9 + ["b"]
    with pytest.raises(DataError, match="at least 2 records, got 1 for the smallest"):
        partition_indices(PartitionSpec("key", field="f"), 10, num_clients=2, seed=0, values=values, min_size=2)
    with pytest.raises(DataError, match="site file 'b' must hold at least 2 records, got 1"):
        partition_indices(PartitionSpec("files"), 10, num_clients=2, seed=0, values=values, min_size=2)


@pytest.mark.parametrize("values", [None, ["a"]])
def test_values_must_match_the_records(values) -> None:
    with pytest.raises(ConfigError, match="one value a record"):
        partition_indices(PartitionSpec("key", field="f"), 2, num_clients=1, seed=0, values=values)


@given(n=st.integers(2, 200), fraction=st.floats(1e-6, 1 - 1e-6), seed=st.integers(0, 99))
def test_holdout_has_both_sides_and_all_records(n, fraction, seed) -> None:
    rest, held = split_holdout(n, fraction, public(seed, 0, "t"))
    assert_partition([rest, held], n, 2)
    assert abs(len(held) - fraction * n) <= 1


@given(keys=st.lists(st.sampled_from("abcde"), min_size=2, max_size=60), seed=st.integers(0, 99))
def test_holdout_groups_are_never_split(keys, seed) -> None:
    if len(set(keys)) < 2:
        keys = [*keys, "z"]
    rest, held = split_holdout_groups(keys, 0.3, public(seed, 0, "t"))
    assert_partition([rest, held], len(keys), 2)
    assert not {keys[i] for i in rest} & {keys[i] for i in held}


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_holdout_refuses_fraction(fraction) -> None:
    with pytest.raises(ConfigError, match=r"\(0, 1\), got"):
        split_holdout(10, fraction, public(0, 0, "t"))


def test_holdout_refuses_too_few() -> None:
    with pytest.raises(DataError, match=r"2 records.*got 1"):
        split_holdout(1, 0.5, public(0, 0, "t"))
    with pytest.raises(DataError, match=r"2 groups.*got 1"):
        split_holdout_groups(["a", "a"], 0.5, public(0, 0, "t"))


def test_check_disjoint_can_fail() -> None:
    check_disjoint({"train": [1, 2, 2], "test": [3]})
    with pytest.raises(DataError, match="'train' and 'test' must share no record, got 2 in both"):
        check_disjoint({"train": [1, 2], "test": [3, 2]})
    with pytest.raises(DataError, match=r"got 'AAAA.*\.\.\.' in both"):
        check_disjoint({"train": ["A" * 99], "test": ["A" * 99]}, what="sequence")
