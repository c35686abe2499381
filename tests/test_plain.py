"""Objects as plain values and importable names, and back."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfl.core.aggregator import Sum, WeightedMean
from sfl.core.events import RoundFinished, SiteFinished
from sfl.core.task import Status
from sfl.core.transform import Chain, Divide
from sfl.errors import ConfigError
from sfl.utils.plain import describe, from_json, names_in, restore, to_json


class Colour(Enum):
    RED = 1


@dataclass(frozen=True)
class Inner:
    size: int
    scale: float = 2.0

    def twice(self, x: float) -> float:
        return 2 * self.scale * x


@dataclass(frozen=True)
class Outer:
    inner: Inner
    names: tuple[str, ...] = ()
    more: dict[str, Any] = field(default_factory=dict)


class Stateful:
    def __init__(self) -> None:
        self.secret = 3


def through_json(value: object) -> Any:
    return restore(from_json(json.loads(json.dumps(to_json(describe(value))))))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.lists(inner).map(tuple),
    max_leaves=12,
)


@given(TREES)
def test_plain_values_come_back_as_they_were(tree: object) -> None:
    back = through_json(tree)
    assert back == tree
    assert type(back) is type(tree)


@pytest.mark.parametrize(
    "value",
    [
        Path("/a/b"),
        Colour.RED,
        Status.LATE,
        Outer(Inner(3), ("a", "b"), {"k": [Inner(1), None]}),
        Inner,
        WeightedMean(),
        Sum(),
        Chain((Divide(3.0), Divide(2.0))),
        len,
        json.dumps,
        dict,
        SiteFinished(round=1, stage="fit", site="a", status=Status.FAILED, metrics={"loss": float("inf")}),
        RoundFinished(round=1, fit={}, evaluation={}, central={}, sites=(), seconds={}, bytes_down=1, bytes_up=2),
    ],
)
def test_objects_and_names_come_back_equal(value: object) -> None:
    back = through_json(value)
    assert type(back) is type(value)
    assert back == value or isinstance(value, WeightedMean | Sum)


def test_methods_and_partials_do_what_they_did() -> None:
    assert through_json(Inner(1, 3.0).twice)(2.0) == 12.0
    assert through_json(functools.partial(max, 3))(5) == 5


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", "i8", "u1", "?", ">f8"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 2), (2, 3)])
def test_arrays_come_back_bit_for_bit(dtype: str, shape: tuple[int, ...]) -> None:
    value = np.arange(int(np.prod(shape))).astype(dtype).reshape(shape)
    back = through_json(value)
    assert back.shape == shape
    assert back.dtype == value.dtype.newbyteorder("=")
    assert back.astype(dtype).tobytes() == value.tobytes()


@pytest.mark.parametrize("value", [lambda: 0, Stateful(), object(), {1: 2}, {"a": [lambda: 0]}, open])
def test_what_cannot_be_said_is_refused_by_name(value: object) -> None:
    with pytest.raises(ConfigError, match=r"the job.* must be"):
        describe([value] if value is not open else [value, lambda: 0], "the job")


def test_a_class_that_hides_behind_anothers_name_is_refused() -> None:
    impostor = type("Inner", (), {"__module__": __name__, "__qualname__": "Inner"})
    with pytest.raises(ConfigError, match="Define it at the top"):
        describe(impostor)


@pytest.mark.parametrize(
    "tree",
    [
        {"name": "os:no_such"},
        {"name": "no.such.module:x"},
        {"object": ["builtins:list", {}]},
        {"object": ["subprocess:Popen", {"args": ["true"]}]},
        {"object": [f"{__name__}:Inner", {"wrong": 1}]},
        {"name": "os:sep"},
        {"strange": 1},
        {"a": 1, "b": 2},
        {"enum": [f"{__name__}:Colour", "BLUE"]},
        {"object": 7},
    ],
)
def test_a_tree_that_is_none_of_ours_is_an_error_of_ours(tree: object) -> None:
    with pytest.raises(ConfigError):
        restore(tree)


def test_only_allowed_names_are_imported() -> None:
    described = describe(Status.USED)
    assert restore(described, allow=("sfl.core.task:Status",)) is Status.USED
    with pytest.raises(ConfigError, match="must be one of"):
        restore(describe(Inner(1)), allow=("sfl.core.",))


def test_the_modules_of_a_tree_are_known() -> None:
    described = describe({"a": [Outer(Inner(1)), functools.partial(json.dumps)], "b": Colour.RED})
    assert {name.partition(".")[0] for name in names_in(described)} == {__name__, "json"}
