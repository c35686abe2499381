"""The contract of a reply: what passes, what is refused, and that the message says which site and what."""

from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from sfl.core import arrays, check
from sfl.core.task import Update
from sfl.errors import UpdateError

SENT = {"w": np.zeros((2, 3), np.float32), "b": np.zeros(3, np.float32), "steps": np.array(0)}


def reply(**changes: Any) -> dict[str, Any]:
    return arrays.copy(SENT) | changes


@pytest.mark.parametrize(
    "got",
    [
        reply(),
        MappingProxyType(reply()),
        dict(reversed(reply().items())),
        reply(w=np.zeros((2, 3), np.float64)),
        reply(w=np.zeros((2, 3), np.float16)),
        reply(steps=np.array(3, np.int32)),
        reply(steps=np.array(True)),
    ],
)
def test_a_good_structure_passes(got: object) -> None:
    check.check_structure("site-1", got, SENT)


@pytest.mark.parametrize(
    ("got", "message"),
    [
        (None, "parameters must be a dict of named arrays, got NoneType"),
        ([1], "got list"),
        ({}, r"got missing 'w', 'b', 'steps'\. Return every array"),
        ({"w": SENT["w"]}, "missing 'b', 'steps'"),
        (reply(extra=np.zeros(1)), "got unexpected 'extra'"),
        ({**reply(), 3: np.zeros(1)}, "unexpected '3'"),
        (reply(v=1, x=1, y=1, z=1), "unexpected 'v', 'x', 'y' and 1 more"),
        ({"W": SENT["w"], "b": SENT["b"], "steps": SENT["steps"]}, "missing 'w'; unexpected 'W'"),
        (reply(w=[[0.0]]), "'w' must be a numpy array, got list"),
        (reply(w=np.float32(1)), "'w' must be a numpy array, got float32"),
        (reply(w=np.zeros((3, 2), np.float32)), r"'w' must have shape \(2, 3\), got \(3, 2\)"),
        (reply(b=np.zeros((3, 1), np.float32)), r"'b' must have shape \(3,\), got \(3, 1\)"),
        (reply(b=np.zeros(3, np.int64)), "'b' must have a dtype like float32, got int64"),
        (reply(steps=np.array(0.5)), "'steps' must have a dtype like int64, got float64"),
        (reply(b=np.zeros(3, np.complex64)), "got complex64"),
        (reply(b=np.array(["a", "b", "c"])), "got <U1"),
        (reply(b=np.array([None, 1, 2], dtype=object)), "got object"),
    ],
)
def test_a_bad_structure_is_refused_by_name(got: object, message: str) -> None:
    with pytest.raises(UpdateError, match=rf"^site-1: .*{message}"):
        check.check_structure("site-1", got, SENT)


def test_partial_allows_missing_names_and_nothing_else() -> None:
    check.check_structure("site-1", {}, SENT, partial=True)
    check.check_structure("site-1", {"b": SENT["b"]}, SENT, partial=True)
    with pytest.raises(UpdateError, match="unexpected 'c'"):
        check.check_structure("site-1", {"c": SENT["b"]}, SENT, partial=True)
    with pytest.raises(UpdateError, match="shape"):
        check.check_structure("site-1", {"b": SENT["w"]}, SENT, partial=True)


@pytest.mark.parametrize(("bad", "kind"), [(np.nan, "NaN"), (np.inf, "inf"), (-np.inf, "inf")])
def test_what_is_not_finite_is_named(bad: float, kind: str) -> None:
    check.check_finite("site-1", SENT)
    value = np.zeros(2 * arrays.BLOCK, np.float32)
    value[-1] = bad
    with pytest.raises(UpdateError, match=rf"^site-1: 'b' must be finite, got {kind}\."):
        check.check_finite("site-1", reply(b=value))


@pytest.mark.parametrize("count", [1, 10**6, np.int64(3), np.uint8(1)])
def test_a_count_is_a_positive_integer(count: object) -> None:
    got = check.check_count("site-1", count)
    assert got == count
    assert type(got) is int


@pytest.mark.parametrize("count", [0, -1, 1.0, True, np.True_, "3", None, np.nan, np.array([1, 2])])
def test_any_other_count_is_refused(count: object) -> None:
    with pytest.raises(UpdateError, match=r"^site-1: num_examples must be a positive integer, got "):
        check.check_count("site-1", count)


def test_metrics_become_floats_and_keep_what_is_not_finite() -> None:
    got = check.check_metrics("site-1", {"loss": np.float32(0.5), "n": 3, "ok": True, 7: np.int64(2), "bad": np.nan})
    assert {k: v for k, v in got.items() if k != "bad"} == {"loss": 0.5, "n": 3.0, "ok": 1.0, "7": 2.0}
    assert np.isnan(got["bad"])
    assert all(type(value) is float for value in got.values())
    assert check.check_metrics("site-1", {}) == {}


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (None, "metrics must be a dict of named numbers, got NoneType"),
        ({"loss": "low"}, "metric 'loss' must be a number, got str"),
        ({"loss": np.zeros(1)}, "metric 'loss' must be a number, got ndarray"),
        ({"loss": 1j}, "got complex"),
        ({"n": 10**400}, "metric 'n' must fit a float"),
    ],
)
def test_other_metrics_are_refused_by_name(metrics: object, message: str) -> None:
    with pytest.raises(UpdateError, match=rf"^site-1: .*{message}"):
        check.check_metrics("site-1", metrics)


@pytest.mark.parametrize("weight", [0.0, -1.0, np.nan, np.inf])
def test_the_server_refuses_a_weight_that_is_not_positive_and_finite(weight: float) -> None:
    with pytest.raises(UpdateError, match=r"^site-1: weight must be positive and finite, got "):
        check.check_update(Update("site-1", {}, weight), SENT)


def test_the_server_looks_at_structure_and_finiteness_itself() -> None:
    check.check_update(Update("site-1", reply(), 1.0), SENT)
    check.check_update(Update("site-1", {"b": SENT["b"]}, 1.0), SENT)
    with pytest.raises(UpdateError, match="unexpected 'x'"):
        check.check_update(Update("site-1", {"x": SENT["b"]}, 1.0), SENT)
    with pytest.raises(UpdateError, match="finite"):
        check.check_update(Update("site-1", {"b": np.full(3, np.nan)}, 1.0), SENT)


def test_arrays_known_to_be_finite_are_not_read_again_but_all_else_is() -> None:
    expected = {"w": np.zeros(2)}
    bad = Update("site-1", {"w": np.array([1.0, np.nan])}, 1.0)
    check.check_update(bad, expected, known_finite=True)
    with pytest.raises(UpdateError, match="finite"):
        check.check_update(bad, expected)
    with pytest.raises(UpdateError, match="shape"):
        check.check_update(Update("site-1", {"w": np.zeros(3)}, 1.0), expected, known_finite=True)


def test_the_answer_to_a_task_of_a_workflow_may_have_any_names_and_shapes() -> None:
    check.check_arrays(Update("site-1", {"anything": np.zeros((2, 0)), "flag": np.array(True)}, 1.0))
    for update, message in (
        (Update("site-1", {}, 0.0), "weight must be positive"),
        (Update("site-1", [1], 1.0), "arrays must be a dict of named arrays, got list"),  # type: ignore[arg-type]
        (Update("site-1", {"a": [1]}, 1.0), r"'a' must be an array of real numbers, got \[1\]"),  # type: ignore[dict-item]
        (Update("site-1", {"a": np.array(["x"])}, 1.0), "'a' must be an array of real numbers"),
        (Update("site-1", {"a": np.array([np.nan])}, 1.0), "'a' must be finite, got NaN"),
    ):
        with pytest.raises(UpdateError, match=message):
            check.check_arrays(update)
