"""Named functions on parameters, against numpy's own on every kind of array."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sfl.core import arrays
from sfl.types import Array

LARGE = 2 * arrays.BLOCK + 5

FLOATS = [np.float16, np.float32, np.float64]
LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "C": lambda x: x,
    "Fortran": np.asfortranarray,
    "reversed": lambda x: np.ascontiguousarray(x[::-1])[::-1],
    "every second column": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
}
SHAPES = {"small": (7, 5), "large": (arrays.BLOCK // 100, 257)}


def values(shape: tuple[int, ...], dtype: type = np.float32, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


# Names, shapes, dtypes


@pytest.mark.parametrize("dtype", [*FLOATS, np.int32, np.int64])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3)])
def test_results_are_arrays_of_the_same_shape_and_dtype(shape: tuple[int, ...], dtype: type) -> None:
    tree = {"b": np.ones(shape, dtype), "a": np.full(shape, 2, dtype)}
    results = {
        "zeros_like": arrays.zeros_like(tree),
        "copy": arrays.copy(tree),
        "add": arrays.add(tree, tree),
        "subtract": arrays.subtract(tree, tree),
        "scale": arrays.scale(tree, 0.5),
        "scale by a numpy scalar": arrays.scale(tree, np.float64(0.5)),
        "read_only": arrays.read_only(tree),
    }
    for name, result in results.items():
        assert list(result) == ["b", "a"], name
        for key, value in result.items():
            assert isinstance(value, np.ndarray), f"{name}: {type(value)}"
            assert value.shape == shape, name
            assert value.dtype == tree[key].dtype, name
    assert all((value == 1).all() for value in (tree["b"], arrays.scale(tree, 0.5)["a"]))


def test_add_and_subtract_go_by_name_not_by_position() -> None:
    left = {"a": np.array([1.0]), "b": np.array([2.0])}
    right = {"b": np.array([20.0]), "a": np.array([10.0]), "more": np.array([0.0])}
    assert {k: v.item() for k, v in arrays.add(left, right).items()} == {"a": 11.0, "b": 22.0}
    assert {k: v.item() for k, v in arrays.subtract(right | {}, right).items()} == dict.fromkeys(right, 0.0)
    with pytest.raises(KeyError):
        arrays.add(right, left)


def test_a_copy_is_deep_and_writable() -> None:
    frozen = arrays.read_only({"a": np.ones(3)})
    own = arrays.copy(frozen)
    own["a"][0] = 7.0
    assert frozen["a"][0] == 1.0


def test_read_only_views_share_memory_and_refuse_writes() -> None:
    tree = {"a": np.ones(3), "b": np.array(1.0)}
    views = arrays.read_only(tree)
    assert all(np.shares_memory(tree[name], views[name]) for name in tree)
    with pytest.raises(ValueError, match="read-only"):
        views["a"][0] = 2.0
    tree["a"][0] = 5.0  # the owner still may
    assert views["a"][0] == 5.0


def test_counts() -> None:
    tree = {"a": np.zeros((2, 3), np.float32), "b": np.zeros((), np.float64), "c": np.zeros((0, 4))}
    assert arrays.num_parameters(tree) == 7
    assert arrays.nbytes(tree) == 32
    assert arrays.num_parameters({}) == arrays.nbytes({}) == 0


# Norm


@given(
    st.lists(
        hnp.arrays(
            st.sampled_from([np.float16, np.float32, np.float64]),
            hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5),
            elements=st.floats(-1e4, 1e4, width=16),
        ),
        max_size=4,
    )
)
def test_l2_norm_is_numpys(parts: list[Array]) -> None:
    flat = np.concatenate([np.zeros(0), *(part.astype(np.float64).reshape(-1) for part in parts)])
    got = arrays.l2_norm({str(i): part for i, part in enumerate(parts)})
    assert got == pytest.approx(np.linalg.norm(flat), rel=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SHAPES)
def test_l2_norm_of_any_layout(size: str, layout: str) -> None:
    value = LAYOUTS[layout](values(SHAPES[size]))
    assert arrays.l2_norm({"a": value}) == pytest.approx(np.linalg.norm(value.astype(np.float64)), rel=1e-12)


@pytest.mark.parametrize(
    ("value", "norm"),
    [
        (np.array([np.nan, 1.0]), np.nan),
        (np.array([np.inf, -np.inf]), np.inf),
        (np.full(3, 1e300), np.inf),  # as np.linalg.norm: the square overflows; no warning
        (np.full(4, 1e30, np.float32), 2e30),
        (np.full(4, 60000.0, np.float16), 1.2e5),
        (np.array([3, 4]), 5.0),
    ],
)
def test_l2_norm_at_the_edges(value: Array, norm: float) -> None:
    assert arrays.l2_norm({"a": value}) == pytest.approx(norm, nan_ok=True, rel=1e-3)


# Finiteness


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", FLOATS)
@given(position=st.integers(0, LARGE - 1) | st.sampled_from([0, arrays.BLOCK - 1, arrays.BLOCK, LARGE - 1]))
def test_one_bad_element_is_found_wherever_it_is(dtype: type, bad: float, position: int) -> None:
    value = np.ones(LARGE, dtype)
    value[position] = bad
    assert not arrays.is_finite(value)
    assert not arrays.is_finite(value[::-1])
    value[position] = 1.0
    assert arrays.is_finite(value)


def test_two_infinities_do_not_cancel() -> None:
    assert not arrays.is_finite(np.array([np.inf, -np.inf, np.nan]))


@pytest.mark.parametrize(
    "value",
    [
        np.full(LARGE, 1e30, np.float32),  # each square overflows, each element is finite
        np.full(LARGE, np.finfo(np.float32).max, np.float32),
        np.full(LARGE, 1e300),
        np.full(LARGE, 65504.0, np.float16),
        np.full(LARGE, 1e-45, np.float32),
        np.array(1.0),
        np.zeros((0, 3)),
        np.arange(5),
        np.array([True]),
    ],
)
def test_finite_is_finite(value: Array) -> None:
    assert arrays.is_finite(value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_finiteness_of_any_layout(layout: str) -> None:
    value = LAYOUTS[layout](values(SHAPES["large"]))
    assert arrays.is_finite(value)
    value[-1, -1] = np.nan
    assert not arrays.is_finite(value)


# In place


@pytest.mark.parametrize("of_value", LAYOUTS)
@pytest.mark.parametrize("of_total", LAYOUTS)
@pytest.mark.parametrize("size", SHAPES)
def test_add_scaled_writes_to_the_total_of_any_layout(size: str, of_total: str, of_value: str) -> None:
    start, value = values(SHAPES[size], seed=1), LAYOUTS[of_value](values(SHAPES[size], seed=2))
    total = LAYOUTS[of_total](start.copy())
    before = value.copy()
    arrays.add_scaled(total, value, 3.0)
    np.testing.assert_allclose(total, start + 3.0 * before, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(value, before)


@pytest.mark.parametrize("size", [0, 1, arrays.BLOCK - 1, arrays.BLOCK, arrays.BLOCK + 1, LARGE])
def test_add_scaled_at_block_boundaries(size: int) -> None:
    total = np.ones(size, np.float32)
    arrays.add_scaled(total, np.arange(size, dtype=np.float32), 0.5)
    np.testing.assert_array_equal(total, 1.0 + 0.5 * np.arange(size, dtype=np.float32))


@pytest.mark.parametrize("size", [1, LARGE])
@pytest.mark.parametrize("dtype", [np.float16, np.int8, np.bool_, np.float64])
@pytest.mark.parametrize("into", [np.float32, np.float64])
def test_add_scaled_computes_in_the_dtype_of_the_total(into: type, dtype: type, size: int) -> None:
    total = np.zeros(size, into)
    arrays.add_scaled(total, np.full(size, 100).astype(dtype), 1e5)  # 1e7 is past float16 and past int8
    np.testing.assert_array_equal(total, np.full(size, 100).astype(dtype).astype(into) * 1e5)


def test_add_scaled_of_zero_dimensions() -> None:
    total = np.array(1.0, np.float32)
    arrays.add_scaled(total, np.array(2.0, np.float32), 3.0)
    assert total == 7.0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_subtract_into_may_overwrite_its_input(layout: str) -> None:
    updated, base = LAYOUTS[layout](values((7, 5), seed=1)), values((7, 5), seed=2)
    expected = updated - base
    assert arrays.subtract_into(updated, base, updated)
    np.testing.assert_array_equal(updated, expected)


@given(st.integers(0, 3 * arrays.BLOCK))
def test_blocks_cover_the_array_once_in_order(size: int) -> None:
    value = np.arange(size)
    pieces = list(arrays.blocks(value))
    assert all(0 < piece.size <= arrays.BLOCK and np.shares_memory(piece, value) for piece in pieces)
    np.testing.assert_array_equal(np.concatenate([value[:0], *pieces]), value)


@pytest.mark.parametrize("place", [None, 0, arrays.BLOCK, 2 * arrays.BLOCK + 4])
def test_a_large_difference_is_taken_in_blocks_and_tells_whether_it_is_finite(place: int | None) -> None:
    size = 2 * arrays.BLOCK + 5
    generator = np.random.default_rng(0)
    updated, base = generator.random(size, np.float32), generator.random(size, np.float32)
    if place is not None:
        updated[place] = np.nan
    expected = updated - base
    assert bool(arrays.subtract_into(updated, base, updated)) == (place is None)
    np.testing.assert_array_equal(updated, expected)


def test_statistics_of_batchnorm_and_whole_numbers_are_not_trained() -> None:
    names = ["w", "n.running_mean", "n.running_var", "n.num_batches_tracked"]
    assert [arrays.is_trained(name, np.ones(1)) for name in names] == [True, False, False, False]
    assert not arrays.is_trained("w", np.ones(1, np.int64))
