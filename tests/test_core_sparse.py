"""Arrays that are mostly zero come back from the wire bit for bit, and what does not fit is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sfl.core import arrays, sparse
from sfl.errors import UpdateError

SPARSE = hnp.arrays(
    st.sampled_from([np.float32, np.float64, np.int64, np.float16]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9),
    elements=st.sampled_from([0, 0, 0, 0, 1, -3]),
)


@given(SPARSE)
def test_packed_arrays_come_back_bit_for_bit(value: np.ndarray) -> None:
    if value.dtype.kind == "f":
        value = np.where(value == 1, -0.0, value).astype(value.dtype)
    packed = sparse.packed({"w": value, "v": np.ones(3)})
    back = sparse.unpacked(packed, {"w": value, "v": np.ones(3)})
    assert list(back) == ["w", "v"]
    assert (back["w"].dtype, back["w"].shape) == (value.dtype, value.shape)
    assert back["w"].tobytes() == value.tobytes()
    assert arrays.nbytes(packed) == sparse.nbytes({"w": value, "v": np.ones(3)})
    assert sparse.nbytes({"w": value}) <= value.nbytes


@pytest.mark.parametrize(
    ("values", "where"),
    [
        (np.ones(2), np.array([0, 10], np.uint32)),
        (np.ones(2), np.array([3, 3], np.uint32)),
        (np.ones(2), np.array([4, 1], np.uint32)),
        (np.ones(2), np.array([1], np.uint32)),
        (np.ones(2), np.array([1, 2], np.int64)),
        (np.ones(2), np.zeros(3, np.uint8)),
        (np.ones((1, 2)), np.array([1, 2], np.uint32)),
    ],
)
def test_positions_that_do_not_fit_are_refused(values: np.ndarray, where: np.ndarray) -> None:
    with pytest.raises(UpdateError):
        sparse.unpacked({"w": values, "w" + sparse.WHERE: where}, {"w": np.zeros(10)})
    with pytest.raises(UpdateError):
        sparse.unpacked({"w" + sparse.WHERE: where}, {"w": np.zeros(10)})
    with pytest.raises(UpdateError):
        sparse.unpacked({"x": np.ones(1), "x" + sparse.WHERE: np.zeros(1, np.uint32)}, {"w": np.zeros(10)})


def test_what_is_packed_is_known_by_its_positions() -> None:
    mostly_zero = {"w": np.zeros(100)}
    assert sparse.is_packed(sparse.packed(mostly_zero))
    assert not sparse.is_packed(mostly_zero)
    assert not sparse.is_packed("w" + sparse.WHERE)


def test_a_bit_for_each_element_where_that_is_less() -> None:
    value = np.zeros(64, np.float32)
    value[::4] = 1.0
    packed = sparse.packed({"w": value})
    assert packed["w" + sparse.WHERE].dtype == np.uint8
    np.testing.assert_array_equal(sparse.unpacked(packed, {"w": value})["w"], value)
