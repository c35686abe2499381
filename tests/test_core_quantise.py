"""Codes against loops over elements and torch's own types; what arrives and does not fit is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sfl.core import arrays, quantise, sparse
from sfl.core.codes import BLOCKS, CODED, LEVELS, code_nbytes, decode, encode
from sfl.core.quantise import FORM, SCALE, WHERE
from sfl.core.task import FIT, Task
from sfl.core.unpack import is_packed, unpacked
from sfl.errors import UpdateError

FORMS = list(CODED)
every_form = pytest.mark.parametrize("form", FORMS)
TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16}
LARGEST = {"bfloat16": float(torch.finfo(torch.bfloat16).max), "float16": 65504.0}
FLOATS = hnp.arrays(
    st.sampled_from([np.float32, np.float64]),
    st.integers(1, 700),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)


def numbers(size: int, seed: int = 0, spread: float = 3.0) -> np.ndarray:
    """Of both signs and very different sizes."""
    draw = np.random.default_rng(seed)
    return (np.exp(spread * draw.normal(size=size)) * np.sign(draw.normal(size=size))).astype(np.float32)


def coded(flat: np.ndarray, form: str, **options: Any) -> np.ndarray:
    out = np.empty_like(flat)
    decode(*encode(flat, form, **options), out)
    return out


def trip(value: np.ndarray, form: str, **options: Any) -> np.ndarray:
    return quantise.unpacked(quantise.packed({"w": value}, form, **options), {"w": value})["w"]


# Numbers


@pytest.mark.parametrize("form", list(TORCH))
def test_half_precision_is_what_torch_makes_of_it(form: str) -> None:
    ties = np.arange(2**16, dtype=np.uint32)[:, None] << 16 | np.array([0, 0x7FFF, 0x8000, 0x8001, 0x1000], np.uint32)
    values = np.concatenate([ties.reshape(-1).view(np.float32), numbers(100_000, spread=8.0)])
    values = values[np.isfinite(values)]
    expected = torch.from_numpy(values).to(TORCH[form]).float().numpy()
    expected = np.clip(expected, -LARGEST[form], LARGEST[form])  # ours does not make inf of what is finite
    np.testing.assert_array_equal(coded(values, form), expected)


@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000])
def test_int8_is_what_a_loop_over_elements_says(size: int) -> None:
    values = numbers(size)
    for start in range(0, size, 256):
        block = [float(x) for x in values[start : start + 256]]
        scale = max(map(abs, block)) / 127.0
        for x, got in zip(block, coded(values, "int8")[start : start + 256].tolist(), strict=True):
            nearest = min(range(-127, 128), key=lambda code: abs(code * scale - x))
            assert abs(got - x) <= abs(nearest * scale - x) + 1e-6 * 127 * scale


@pytest.mark.parametrize("size", [1, 63, 64, 65, 300])
def test_nf4_is_what_a_loop_over_elements_says(size: int) -> None:
    values = numbers(size)
    decoded = coded(values, "nf4")
    for start in range(0, size, 64):
        block = [float(x) for x in values[start : start + 64]]
        scale = max(map(abs, block))
        for x, got in zip(block, decoded[start : start + 64].tolist(), strict=True):
            nearest = min((float(level) * scale for level in LEVELS), key=lambda level: abs(level - x))
            assert abs(got - x) <= abs(nearest - x) + 1e-6 * scale
            assert min(abs(got - float(level) * scale) for level in LEVELS) <= 1e-6 * scale


def test_the_levels_of_nf4_are_quantiles_of_a_normal_distribution() -> None:
    quantile = torch.distributions.Normal(0.0, 1.0).icdf
    offset = 0.9677083
    upper = quantile(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    lower = -quantile(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([lower, torch.zeros(1, dtype=torch.float64), upper]).sort().values.numpy()
    np.testing.assert_allclose(LEVELS, levels / levels.max(), atol=1e-6)
    assert (LEVELS[0], LEVELS[7], LEVELS[15]) == (-1.0, 0.0, 1.0)


@every_form
@given(values=FLOATS)
@settings(max_examples=60, deadline=None)
def test_errors_stay_within_half_a_step(form: str, values: np.ndarray) -> None:
    error = np.abs(coded(values, form).astype(np.float64) - values)
    if form in TORCH:
        info = torch.finfo(TORCH[form])
        within = np.abs(values) <= LARGEST[form]
        bound = np.maximum(np.abs(values) * (info.eps / 2 + 2.0**-23), info.smallest_normal * info.eps)
        assert np.all((error <= bound)[within])
        return
    width, half = BLOCKS[form], {"int8": 0.5 / 127, "nf4": 0.1520}[form]  # nf4: between -1 and the level beside it
    for start in range(0, values.size, width):
        largest = np.abs(values[start : start + width]).max()
        assert error[start : start + width].max() <= max(largest * (half + 1e-6), 2.0**-100)


@every_form
@given(values=FLOATS)
@settings(max_examples=100, deadline=None)
def test_what_is_bounded_has_no_larger_norm(form: str, values: np.ndarray) -> None:
    before = math.sqrt(math.fsum(float(x) ** 2 for x in values))
    decoded = coded(values, form, bounded=True)
    assert math.sqrt(math.fsum(float(x) ** 2 for x in decoded)) <= before
    if form in TORCH:
        assert np.all(np.abs(decoded.astype(np.float64)) <= np.abs(values.astype(np.float64)))


@every_form
@given(values=hnp.arrays(np.float16, st.integers(1, 300), elements=st.floats(-60_000, 60_000, width=16)))
@settings(max_examples=60, deadline=None)
def test_what_is_bounded_stays_bounded_in_half_precision(form: str, values: np.ndarray) -> None:
    decoded = coded(values, form, bounded=True)
    assert decoded.dtype == np.float16
    assert math.fsum(float(x) ** 2 for x in decoded) <= math.fsum(float(x) ** 2 for x in values)


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_rounding_to_the_nearest_would_break_the_bound_that_bounded_keeps(form: str) -> None:
    """The property above is no empty one: without the bound, norms do rise; with it, they fall by little."""
    values = [numbers(100_000, seed, spread=0.5) for seed in range(8)]
    norms = [
        [np.linalg.norm(coded(v, form, bounded=b).astype(float)) / np.linalg.norm(v) for v in values] for b in (0, 1)
    ]
    assert max(norms[0]) > 1.0
    assert 0.99 < min(norms[1]) <= max(norms[1]) <= 1.0


@every_form
def test_numbers_at_the_edges(form: str) -> None:
    most = float(np.finfo(np.float32).max)
    for value in (most, -most):
        flat = np.full(300, value, np.float32)
        assert np.all(np.isfinite(coded(flat, form)))
        np.testing.assert_allclose(
            coded(flat, form), np.clip(flat, -LARGEST.get(form, most), LARGEST.get(form, most)), rtol=1e-6
        )
    tiny = np.full(100, 2.0**-120, np.float32)
    np.testing.assert_array_equal(coded(tiny, form), tiny if form == "bfloat16" else 0.0 * tiny)
    assert np.all(np.isfinite(coded(np.full(100, 1e300), form)))
    np.testing.assert_array_equal(coded(np.zeros(100, np.float32), form), 0.0)
    assert coded(np.zeros(0, np.float32), form).size == 0


@every_form
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_not_finite_is_refused(form: str, bad: float, dtype: type) -> None:
    value = np.ones(70_000, dtype)
    value[69_999] = bad
    with pytest.raises(UpdateError, match="'w' must be finite to travel as"):
        quantise.packed({"w": value}, form)
    with pytest.raises(UpdateError, match="'w' must be finite to travel as"):
        quantise.remembering({"w": value}, None, form)


@every_form
def test_pieces_do_not_show(form: str) -> None:
    """An array that is walked in pieces is the concatenation of its blocks, each by itself."""
    values = numbers(2 * arrays.BLOCK + 300)
    apart = np.concatenate([coded(part, form) for part in np.split(values, range(256, values.size, 256))])
    np.testing.assert_array_equal(coded(values, form), apart)


# Arrays


@every_form
@pytest.mark.parametrize(
    "value",
    [
        np.arange(120, dtype=np.float32).reshape(2, 3, 20),
        np.arange(121, dtype=np.float64).reshape(11, 11),
        np.asfortranarray(np.arange(120, dtype=np.float32).reshape(10, 12)),
        np.arange(480, dtype=np.float32)[::4],
        np.broadcast_to(np.float32(3), (8, 9)),
        np.linspace(-1, 1, 90).astype(np.float16),
    ],
)
def test_arrays_keep_their_shapes_dtypes_and_places(form: str, value: np.ndarray) -> None:
    before = value.copy()
    packed = quantise.packed({"w": value}, form)
    for like in ({"w": value}, None):
        back = quantise.unpacked(packed, like)["w"]
        assert (back.dtype, back.shape) == (value.dtype, value.shape)
        np.testing.assert_allclose(back, value, atol=0.16 * float(np.abs(value).max()))
    np.testing.assert_array_equal(value, before)


def test_what_is_not_coded_passes_as_it_is() -> None:
    value = {
        "count": np.arange(500),
        "flags": np.ones(500, np.bool_),
        "few": np.ones(63, np.float32),
        "none": np.zeros((0, 3), np.float32),
        "scalar": np.array(0.1),
        "norm.running_var": np.ones(500, np.float32),
        "w": np.ones(64, np.float32),
        "half": np.ones(64, np.float16),
    }
    packed = quantise.packed(value, "float16")
    assert list(packed) == [*list(value)[:7], "w" + FORM, "half"]
    assert all(packed[name] is value[name] for name in value if name != "w")
    assert list(quantise.unpacked(packed)) == list(value)
    assert quantise.is_packed(packed)
    assert not quantise.is_packed(value)
    assert not quantise.is_packed("w" + SCALE)
    assert "few" + FORM in quantise.packed(value, "int8", smallest=10)
    assert "half" + FORM in quantise.packed(value, "int8")


@every_form
@given(density=st.floats(0.0, 1.0), seed=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_zeros_are_left_out_where_that_is_smaller(form: str, density: float, seed: int) -> None:
    draw = np.random.default_rng(seed)
    value = np.where(draw.random(900) < density, draw.normal(size=900), 0.0).astype(np.float32).reshape(30, 30)
    packed = quantise.packed({"w": value}, form, thin=True)
    back = quantise.unpacked(packed, {"w": value})["w"]
    assert np.all(back[value == 0] == 0)
    values = value[value != 0] if "w" + WHERE in packed else value.reshape(-1)
    np.testing.assert_array_equal(back[value != 0], coded(values, form)[values != 0])
    dense = quantise.nbytes({"w": value}, form)
    assert arrays.nbytes(packed) <= dense + 4
    if density < 0.05:
        assert arrays.nbytes(packed) < 0.7 * dense


@every_form
def test_sizes_follow_from_shapes(form: str) -> None:
    model = {"w": numbers(10_000).reshape(100, 100), "b": np.ones(10, np.float32), "odd": np.ones((7, 31))}
    assert arrays.nbytes(quantise.packed(model, form)) == quantise.nbytes(model, form)
    assert code_nbytes(0, form) == 0


def opt_1_3b() -> dict[str, np.ndarray]:
    """The arrays of OPT-1.3B (Zhang et al. 2022: 24 layers of width 2048, 50,272 tokens) without their memory."""
    width, shapes = 2048, {"embed_tokens.weight": (50_272, 2048), "embed_positions.weight": (2050, 2048)}
    for layer in range(24):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{layer}.{name}.weight": (width, width), f"{layer}.{name}.bias": (width,)}
        shapes |= {f"{layer}.fc1.weight": (4 * width, width), f"{layer}.fc1.bias": (4 * width,)}
        shapes |= {f"{layer}.fc2.weight": (width, 4 * width), f"{layer}.fc2.bias": (width,)}
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"{layer}.{norm}.weight": (width,), f"{layer}.{norm}.bias": (width,)}
    shapes |= {"final_layer_norm.weight": (width,), "final_layer_norm.bias": (width,)}
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(("form", "share"), [("bfloat16", 0.50), ("float16", 0.50), ("int8", 0.25), ("nf4", 0.14)])
def test_a_model_of_a_billion_parameters_takes_the_share_that_is_promised(form: str, share: float) -> None:
    model = opt_1_3b()
    assert arrays.num_parameters(model) == 1_315_758_080
    assert quantise.nbytes(model, form) / arrays.nbytes(model) == pytest.approx(share, rel=0.02)


# Memory


@pytest.mark.parametrize("thin", [False, True])
@every_form
def test_what_left_and_what_is_remembered_is_all_there_was(form: str, thin: bool) -> None:
    left: dict[str, np.ndarray] | None = None
    total, sent = np.zeros(500), np.zeros(500)
    for round in range(12):
        value = numbers(500, seed=round, spread=1.0)
        value[np.random.default_rng(round).random(500) < 0.3] = 0.0
        before = value.copy()
        packed, received, after = quantise.remembering({"w": value, "n": np.arange(3)}, left, form, thin=thin)
        np.testing.assert_array_equal(value, before)
        like = {"w": value, "n": np.arange(3)}
        np.testing.assert_array_equal(received["w"], quantise.unpacked(packed, like)["w"])
        assert list(after) == ["w"]
        if thin:
            assert np.all(received["w"][value == 0] == 0)
            waiting = np.zeros(500, np.float32) if left is None else left["w"]
            np.testing.assert_array_equal(after["w"][value == 0], waiting[value == 0])
        total, sent, left = total + value, sent + received["w"], after
    np.testing.assert_allclose(sent + left["w"], total, atol=1e-4)
    assert np.abs(left["w"]).max() > 0.0


def test_the_memory_of_what_is_coded_no_more_is_dropped() -> None:
    _, _, left = quantise.remembering({"w": numbers(500)}, {"n": np.ones(3)}, "int8")
    assert set(left) == {"n", "w"}
    _, _, left = quantise.remembering({"w": numbers(5)}, left, "int8")
    assert set(left) == {"n"}


# What arrives


LIKE = {"w": np.zeros((20, 10), np.float32)}
GOOD = quantise.packed({"w": numbers(200).reshape(20, 10)}, "int8")
THIN = quantise.packed(
    {"w": np.where(np.arange(200) % 20 == 0, 1, 0).astype(np.float32).reshape(20, 10)}, "int8", thin=True
)
NF4 = quantise.packed({"w": numbers(200).reshape(20, 10)}, "nf4")


def with_form(*said: int) -> dict[str, np.ndarray]:
    return GOOD | {"w" + FORM: np.array(said, np.int64)}


@pytest.mark.parametrize(
    "arrived",
    [
        GOOD | {"w": GOOD["w"][:-1]},
        GOOD | {"w": GOOD["w"].reshape(20, 10)},
        GOOD | {"w": GOOD["w"].astype(np.float32)},
        GOOD | {"w": GOOD["w"].astype(np.int64)},
        GOOD | {"w": GOOD["w"].view(np.uint8)},
        GOOD | {"w" + SCALE: np.array([np.nan], np.float32)},
        GOOD | {"w" + SCALE: np.array([np.inf], np.float32)},
        GOOD | {"w" + SCALE: np.array([-1.0], np.float32)},
        GOOD | {"w" + SCALE: np.array([1.0])},
        GOOD | {"w" + SCALE: np.ones(2, np.float32)},
        GOOD | {"w": np.zeros(200, np.uint16)},
        {name: value for name, value in GOOD.items() if name != "w" + SCALE},
        {name: value for name, value in GOOD.items() if name != "w" + FORM},
        {name: value for name, value in GOOD.items() if name != "w"},
        with_form(4, 10, 20),
        with_form(4, 200),
        with_form(),
        GOOD | {"w" + FORM: np.array([4, 20, 10], np.int32)},
        GOOD | {"w" + FORM: np.array([[4, 20, 10]], np.int64)},
        {f"v{name[1:]}": value for name, value in GOOD.items()},
        GOOD | {"v" + WHERE: np.zeros(1, np.uint32)},
        NF4 | {"w": NF4["w"][:-1]},
        THIN | {"w" + WHERE: np.arange(201, dtype=np.uint32)},
        THIN | {"w" + WHERE: np.zeros(24, np.uint8)},
        THIN | {"w" + WHERE: np.full(10, 200, np.uint32)},
        THIN | {"w" + WHERE: np.arange(10)},
        THIN | {"w" + WHERE: np.zeros((25, 1), np.uint8)},
    ],
)
def test_what_does_not_fit_is_refused(arrived: dict[str, np.ndarray]) -> None:
    with pytest.raises(UpdateError):
        quantise.unpacked(arrived, LIKE)


def test_zeros_of_what_is_not_coded_are_left_out_too() -> None:
    value = {"count": np.where(np.arange(500) % 50 == 0, 7, 0), "w": numbers(100)}
    for packed in (
        quantise.packed(value, "int8", thin=True),
        quantise.remembering(value, None, "int8", thin=True)[0],
    ):
        assert "count" + WHERE in packed
        np.testing.assert_array_equal(quantise.unpacked(packed, value)["count"], value["count"])
        with pytest.raises(UpdateError, match="must come with codes"):
            quantise.unpacked(packed)


def test_codes_of_an_array_of_whole_numbers_are_refused() -> None:
    with pytest.raises(UpdateError, match="must be an array of the model"):
        quantise.unpacked(GOOD, {"w": np.zeros((20, 10), np.int32)})


@pytest.mark.parametrize("said", [(4, 2**40), (4, -1), (3, 200), (16, 200), (4, 20, 11), (0,)])
def test_memory_follows_from_what_is_there_where_nothing_is_expected(said: tuple[int, ...]) -> None:
    with pytest.raises(UpdateError):
        quantise.unpacked(with_form(*said))
    with pytest.raises(UpdateError):
        quantise.unpacked(THIN)  # how many elements there are would be the sender's word alone


def test_scales_that_make_numbers_past_all_floats_are_noticed_as_such() -> None:
    arrived = GOOD | {"w" + SCALE: np.array([np.finfo(np.float32).max], np.float32)}
    assert not arrays.is_finite(quantise.unpacked(arrived, LIKE)["w"])


def test_what_comes_in_any_way_is_unpacked() -> None:
    value = {"w": np.where(np.arange(200) % 20 == 0, 1, 0).astype(np.float32).reshape(20, 10)}
    for arrived in (value, sparse.packed(value), quantise.packed(value, "int8", thin=True)):
        np.testing.assert_allclose(unpacked(arrived, LIKE)["w"], value["w"])
        assert is_packed(arrived) is (arrived is not value)
    assert unpacked(value, LIKE) is value


def test_a_task_travels_as_its_codes() -> None:
    task = Task(FIT, 1, LIKE)
    assert task.travels is LIKE
    assert replace(task, packed=GOOD).travels is GOOD
