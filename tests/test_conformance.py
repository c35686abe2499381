"""One table, the same checks for every method. A new method adds one row to ``TRANSFORMS`` or ``AGGREGATORS``.

The checks hold each row to the contracts of ``Transform`` and ``Aggregator`` and to what its own docstring documents at
the edges; that its numbers are right is shown by an oracle in the method's own test file.
"""

import copy
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pytest

from sfl.core import arrays, check, rng
from sfl.core.aggregator import Aggregator, Sum, WeightedMean
from sfl.core.codes import CODED
from sfl.core.task import FIT, SERVER, Task, Update
from sfl.core.transform import Chain, Divide, Transform, chain
from sfl.core.unpack import unpacked
from sfl.errors import RoundError, SflError
from sfl.privacy.clip import Clip
from sfl.privacy.filters import (
    ErrorFeedback,
    ExcludeLayers,
    FreezeLayers,
    PercentileFilter,
    PrivateTopK,
    Quantise,
    QuantiseBounded,
    RandomK,
    SparseVector,
    TopK,
)
from sfl.server.lora import LoraProductMean
from sfl.server.robust import (
    NNM,
    Bucketing,
    Bulyan,
    CenteredClipping,
    CoordinateMedian,
    CosineTrust,
    FLTrust,
    FoundationFL,
    GeometricMedian,
    Krum,
    MultiKrum,
    NormBound,
    PreAggregated,
    TrimmedMean,
)
from sfl.types import Parameters, StateTree
from sfl.utils.plain import describe, restore

Edge = Literal["passes", "raises", "absorbs"]
"""What becomes of NaN and inf: they pass through, the method raises, or the result is finite all the same."""


@dataclass(frozen=True, kw_only=True)
class TransformCase:
    """A row: how to make the transform, and what its docstring says of it.

    Attributes:
        make: Makes a fresh one.
        not_finite: What becomes of NaN and inf.
        bound: The norm that its output never exceeds, if it clips.
        secret: Whether it draws from a cryptographic source, so that two calls differ.
        zero_stays: Whether a zero delta stays zero.
        dtypes: The dtypes of deltas that it takes.
    """

    make: Callable[[], Transform]
    not_finite: Edge
    bound: float | None = None
    secret: bool = False
    zero_stays: bool = True
    dtypes: tuple[str, ...] = ("f4", "f8")


@dataclass(frozen=True, kw_only=True)
class AggregatorCase:
    """A row: how to make the aggregator, and what its docstring says of it.

    Attributes:
        make: Makes a fresh one.
        not_finite: What becomes of NaN and inf in one of ``sites`` updates.
        mean_like: Whether the aggregate of equal updates is that update.
        sites: A cohort that is large enough for it.
        dtypes: The dtypes of deltas that it takes.
        sent: Arrays that the model has besides; then the aggregator is told what was sent, which it must know.
    """

    make: Callable[[], Aggregator]
    not_finite: Edge
    mean_like: bool = True
    sites: int = 7
    dtypes: tuple[str, ...] = ("f4", "f8")
    sent: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])

    def aggregate(self, updates: Iterable[Update], aggregator: Aggregator | None = None) -> Update:
        """Of a fresh one, or of ``aggregator``."""
        aggregator = self.make() if aggregator is None else aggregator
        if not self.sent:
            return aggregator.aggregate(updates)
        sent = parameters("f4", 99, more=self.sent)
        return aggregator.step(updates, Task(FIT, 1, arrays.read_only(sent)), aggregator.init(sent))[0]


# Small transforms, so that each check has a row that needs it.


class Halve(Transform):
    """Half of every delta, and a state that counts the rounds."""

    raises_norm = False

    def init(self, parameters: Parameters) -> StateTree:
        return {"rounds": 0, "seen": np.zeros(1)}

    def apply(self, update: Update, state: Any, rng: np.random.Generator) -> tuple[Update, StateTree]:
        after = {"rounds": state["rounds"] + 1, "seen": state["seen"] + arrays.l2_norm(update.delta)}
        return replace(update, delta=arrays.scale(update.delta, 0.5)), after


class Drop(Transform):
    """Leaves out what belongs to the bias."""

    raises_norm = False

    def init(self, parameters: Parameters) -> StateTree:
        return None

    def apply(self, update: Update, state: Any, rng: np.random.Generator) -> tuple[Update, StateTree]:
        return replace(update, delta={k: v for k, v in update.delta.items() if "bias" not in k}), state


class Thin(Drop):
    """Keeps a random half and doubles it; refuses what is not finite."""

    raises_norm = True

    def apply(self, update: Update, state: Any, rng: np.random.Generator) -> tuple[Update, StateTree]:
        check.check_finite(update.site, update.delta)
        kept = {k: np.asarray(v * (2 * rng.integers(0, 2, v.shape)).astype(v.dtype)) for k, v in update.delta.items()}
        return replace(update, delta=kept), state


class Bound(Drop):
    """Clips to norm 1; what is not finite becomes zero."""

    clips = True

    def apply(self, update: Update, state: Any, rng: np.random.Generator) -> tuple[Update, StateTree]:
        norm = arrays.l2_norm(update.delta)
        if not np.isfinite(norm):
            return replace(update, delta=arrays.zeros_like(update.delta)), state
        return replace(update, delta=arrays.scale(update.delta, min(1.0, 0.999 / max(norm, 1e-12)))), state


class Arrived(Transform):
    """What a server makes of the codes that another transform sends."""

    def __init__(self, coder: Transform) -> None:
        self.coder, self.raises_norm = coder, coder.raises_norm

    def init(self, parameters: Parameters) -> StateTree:
        return self.coder.init(parameters)

    def apply(self, update: Update, state: Any, rng: np.random.Generator) -> tuple[Update, StateTree]:
        sent, state = self.coder.apply(update, state, rng)
        return replace(sent, delta=unpacked(sent.delta, update.delta)), state


PRIVATE = PrivateTopK(epsilon=1.0, share=0.2, gamma=2.0)
SPARSE = SparseVector(epsilon=1.0, count=3, threshold=1.0, gamma=2.0)

TRANSFORMS: dict[str, TransformCase] = {
    "identity": TransformCase(make=Chain, not_finite="passes", dtypes=("f2", "f4", "f8", "i8")),
    "divide": TransformCase(make=lambda: Divide(3), not_finite="passes", dtypes=("f2", "f4", "f8")),
    "halve": TransformCase(make=Halve, not_finite="passes"),
    "drop": TransformCase(make=Drop, not_finite="passes", dtypes=("f2", "f4", "f8", "i8")),
    "thin": TransformCase(make=Thin, not_finite="raises"),
    "bound": TransformCase(make=Bound, not_finite="absorbs", bound=1.0),
    "exclude": TransformCase(
        make=lambda: ExcludeLayers((1, "head")), not_finite="passes", dtypes=("f2", "f4", "f8", "i8")
    ),
    "freeze": TransformCase(make=lambda: FreezeLayers(("*.bias",)), not_finite="passes", dtypes=("f4", "i8")),
    "percentile": TransformCase(
        make=lambda: PercentileFilter(50.0, 4.0), not_finite="raises", dtypes=("f2", "f4", "f8", "i8")
    ),
    "fixed k": TransformCase(make=lambda: PercentileFilter(90.0, fixed_k=True), not_finite="raises"),
    "top k": TransformCase(make=lambda: TopK(0.2), not_finite="raises", dtypes=("f2", "f4", "f8", "i8")),
    "random k": TransformCase(make=lambda: RandomK(0.99), not_finite="passes", dtypes=("f4", "f8", "i8")),
    "top k, feedback": TransformCase(make=lambda: ErrorFeedback(TopK(0.2)), not_finite="raises"),
    "random k, feedback": TransformCase(make=lambda: ErrorFeedback(RandomK(0.5, unbiased=False)), not_finite="raises"),
    "private top k": TransformCase(
        make=lambda: chain(PRIVATE.clip(), PRIVATE.noise()), not_finite="raises", secret=True, zero_stays=False
    ),
    "sparse vector": TransformCase(
        make=lambda: chain(SPARSE.clip(), SPARSE.noise()), not_finite="raises", secret=True, zero_stays=False
    ),
    "clip": TransformCase(make=lambda: Clip(1.5), not_finite="passes", bound=1.5, dtypes=("f2", "f4", "f8", "i8")),
    "clip per layer": TransformCase(make=lambda: Clip(1.5, per_layer=True), not_finite="passes", bound=1.5),
    "clamp": TransformCase(make=PRIVATE.clip, not_finite="raises", bound=2.0 * 46**0.5),
    **{
        f"{form}{', feedback' * feedback}": TransformCase(
            make=partial(lambda form, feedback: Arrived(Quantise(form, feedback, smallest=1)), form, feedback),
            not_finite="raises",
            dtypes=("f2", "f4", "f8", "i8"),
        )
        for form in CODED
        for feedback in (False, True)
    },
    **{
        f"{form}, bounded": TransformCase(
            make=partial(lambda form: chain(Clip(1.5), Arrived(QuantiseBounded(form, smallest=1))), form),
            not_finite="raises",
            bound=1.5,
            dtypes=("f2", "f4", "f8", "i8"),
        )
        for form in CODED
    },
    "chain": TransformCase(make=lambda: chain(Thin(), Halve(), Drop(), Bound()), not_finite="raises", bound=1.0),
}

AGGREGATORS: dict[str, AggregatorCase] = {
    "weighted mean": AggregatorCase(make=WeightedMean, not_finite="passes"),
    "sum": AggregatorCase(make=Sum, not_finite="passes", mean_like=False),
    "krum": AggregatorCase(make=lambda: Krum(1), not_finite="raises"),
    "multi-krum": AggregatorCase(make=lambda: MultiKrum(2), not_finite="raises"),
    "bulyan": AggregatorCase(make=lambda: Bulyan(1), not_finite="raises"),
    "trimmed mean": AggregatorCase(make=lambda: TrimmedMean(0.2), not_finite="raises"),
    "median": AggregatorCase(make=CoordinateMedian, not_finite="raises"),
    "geometric median": AggregatorCase(make=GeometricMedian, not_finite="raises"),
    "centered clipping": AggregatorCase(make=lambda: CenteredClipping(1e3, 2), not_finite="raises"),
    "foundation-fl": AggregatorCase(make=lambda: FoundationFL(2), not_finite="raises"),
    "foundation-fl, median": AggregatorCase(make=lambda: FoundationFL(2, "median"), not_finite="raises"),
    "cosine trust": AggregatorCase(make=lambda: CosineTrust(0.1, allow_untrusted_reference=True), not_finite="raises"),
    "fltrust": AggregatorCase(make=lambda: FLTrust(parameters("f8", 0)), not_finite="raises", mean_like=False),
    "nnm": AggregatorCase(make=lambda: PreAggregated(Krum(2), NNM(2)), not_finite="raises"),
    "bucketing": AggregatorCase(make=lambda: PreAggregated(CoordinateMedian(), Bucketing(2)), not_finite="raises"),
    "norm bound": AggregatorCase(make=lambda: NormBound(WeightedMean(), 100.0), not_finite="absorbs"),
    "lora product mean": AggregatorCase(
        make=LoraProductMean,
        not_finite="raises",
        mean_like=False,
        sent={
            "wte.lora_embedding_A": (2, 6),
            "wte.lora_embedding_B": (5, 2),
            "q.lora_A.w": (3, 5),
            "q.lora_B.w": (4, 3),
        },
    ),
}


# Inputs

SHAPES: dict[str, tuple[int, ...]] = {
    "layer.weight": (6, 5),
    "layer.bias": (5,),
    "temperature": (),
    "empty": (0, 3),
    "head.weight": (5, 2),
}


Shapes = dict[str, tuple[int, ...]]


def parameters(dtype: str, seed: int = 0, scale: float = 10.0, more: Shapes | None = None) -> Parameters:
    source, shapes = np.random.default_rng(seed), SHAPES | (more or {})
    return {name: np.asarray(scale * source.normal(size=shape)).astype(dtype) for name, shape in shapes.items()}


def update(
    dtype: str = "f4", site: str = "site-1", seed: int = 0, scale: float = 10.0, more: Shapes | None = None
) -> Update:
    return Update(site, parameters(dtype, seed, scale, more), 3.0 + seed, {"loss": 0.5})


def cohort(case: AggregatorCase, dtype: str = "f4") -> list[Update]:
    return [update(dtype, f"site-{i + 1}", seed=i, scale=1.0, more=case.sent) for i in range(case.sites)]


def spoilt(value: Update, bad: float) -> Update:
    delta = arrays.copy(value.delta)
    delta["layer.weight"][3, 2] = bad
    return replace(value, delta=delta)


def frozen(value: Update) -> Update:
    return replace(value, delta=arrays.read_only(value.delta))


def run(transform: Transform, value: Update, state: StateTree = None) -> tuple[Update, StateTree]:
    before = transform.init(parameters("f4")) if state is None else state
    return transform.apply(value, before, rng.public(0, 1, "transform", value.site))


def same(left: Any, right: Any) -> bool:
    """Whether two state trees, or two deltas, have the same bits."""
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return type(left) is type(right) and left == right


def is_tree(state: object) -> bool:
    """Whether a checkpoint can hold it."""
    if isinstance(state, dict):
        return all(isinstance(key, str) and is_tree(value) for key, value in state.items())
    if isinstance(state, list | tuple):
        return all(is_tree(value) for value in state)
    return state is None or isinstance(state, bool | int | float | str | np.ndarray)


def rows(table: dict[str, Any], *, dtypes: bool = False) -> pytest.MarkDecorator:
    """One test for each row, or for each row and dtype."""
    if not dtypes:
        return pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in table.items()])
    pairs = [pytest.param(case, d, id=f"{name}-{d}") for name, case in table.items() for d in case.dtypes]
    return pytest.mark.parametrize(("case", "dtype"), pairs)


# Transforms


@rows(TRANSFORMS, dtypes=True)
def test_transform_keeps_names_shapes_and_dtypes(case: TransformCase, dtype: str) -> None:
    value = update(dtype)
    out, _ = run(case.make(), value)
    check.check_structure(out.site, out.delta, value.delta, partial=True)
    assert [name for name in value.delta if name in out.delta] == list(out.delta), "the order of names must stay"
    assert all(array.dtype == value.delta[name].dtype for name, array in out.delta.items())
    assert out.site == value.site


@rows(TRANSFORMS)
def test_transform_is_pure(case: TransformCase) -> None:
    transform, value = case.make(), frozen(update())
    state = transform.init(parameters("f4"))
    before, delta = copy.deepcopy(state), copy.deepcopy(value.delta)
    _, after = transform.apply(value, state, rng.public(0, 1, "t"))
    assert same(state, before), "apply must not write to the state it was given"
    assert same(value.delta, delta), "apply must not write to the update it was given"
    assert value.metrics == {"loss": 0.5}
    transform.apply(value, after, rng.public(0, 2, "t"))


@rows(TRANSFORMS)
def test_transform_is_deterministic_unless_secret(case: TransformCase) -> None:
    transform, value = case.make(), update()
    (first, one), (again, two) = run(transform, value), run(transform, value)
    (fresh, three) = run(case.make(), value)
    assert same(first.delta, again.delta) is not case.secret
    assert same(first.delta, fresh.delta) is not case.secret
    assert (same(one, two) and same(two, three)) or case.secret


@rows(TRANSFORMS)
def test_transform_of_zero(case: TransformCase) -> None:
    value = replace(update(), delta=arrays.zeros_like(parameters("f4")))
    out, _ = run(case.make(), value)
    check.check_finite("out", out.delta)
    if case.zero_stays:
        assert arrays.l2_norm(out.delta) == 0.0


@rows(TRANSFORMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_transform_of_what_is_not_finite(case: TransformCase, bad: float) -> None:
    value = spoilt(update(), bad)
    if case.not_finite == "raises":
        with pytest.raises(SflError):
            run(case.make(), value)
        return
    out, _ = run(case.make(), value)
    finite = all(arrays.is_finite(array) for array in out.delta.values())
    assert finite is (case.not_finite == "absorbs")


@rows(TRANSFORMS)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3, 1e12])
def test_transform_keeps_its_word_on_norms(case: TransformCase, scale: float) -> None:
    transform, value = case.make(), update(scale=scale)
    assert transform.clips is False or case.bound is not None, "a transform that clips must state its bound here"
    norm = arrays.l2_norm(run(transform, value)[0].delta)
    if not transform.raises_norm:
        assert norm <= arrays.l2_norm(value.delta) * (1 + 1e-6)
    if case.bound is not None:
        assert norm <= case.bound


@rows(TRANSFORMS)
def test_transform_state_can_be_checkpointed_and_resumed(case: TransformCase) -> None:
    transform, value = case.make(), update()
    state = transform.init(parameters("f4"))
    assert is_tree(state)
    for round in range(1, 4):
        restored = pickle.loads(pickle.dumps(state))
        resumed, later = case.make().apply(value, restored, rng.public(0, round, "t"))
        out, state = transform.apply(value, state, rng.public(0, round, "t"))
        assert is_tree(state)
        if not case.secret:
            assert same(out.delta, resumed.delta)
            assert same(state, later)


# Aggregators


@rows(AGGREGATORS, dtypes=True)
def test_aggregate_keeps_names_shapes_and_dtypes(case: AggregatorCase, dtype: str) -> None:
    updates = cohort(case, dtype)
    out = case.aggregate(updates)
    check.check_structure(out.site, out.delta, updates[0].delta)
    assert list(out.delta) == list(updates[0].delta)
    assert all(array.dtype == dtype for array in out.delta.values())
    assert out.site == SERVER
    assert out.weight > 0


@rows(AGGREGATORS)
def test_aggregation_is_pure_and_its_result_is_the_callers(case: AggregatorCase) -> None:
    updates = cohort(case)
    before = copy.deepcopy([u.delta for u in updates])
    out = case.aggregate([frozen(u) for u in updates])
    for array in out.delta.values():
        array[...] = 7
    assert same([u.delta for u in updates], before)


@rows(AGGREGATORS)
def test_aggregation_is_deterministic(case: AggregatorCase) -> None:
    aggregator, updates = case.make(), cohort(case)
    first = case.aggregate(updates, aggregator).delta
    assert same(first, case.aggregate(updates, aggregator).delta), "no state may stay behind"
    assert same(first, case.aggregate(iter(updates)).delta)


@rows(AGGREGATORS)
def test_the_order_of_sites_changes_nothing_beyond_rounding(case: AggregatorCase) -> None:
    forward, backward = (case.aggregate(cohort(case)[::step]).delta for step in (1, -1))
    for name, array in forward.items():
        np.testing.assert_allclose(backward[name], array, rtol=1e-4, atol=1e-5)


@rows(AGGREGATORS)
def test_what_needs_a_sum_streams(case: AggregatorCase) -> None:
    aggregator, updates = case.make(), cohort(case)

    def lent() -> Iterator[Update]:
        buffers = arrays.zeros_like(updates[0].delta)
        for one in updates:
            for name, array in one.delta.items():
                buffers[name][...] = array
            yield replace(one, delta=buffers)
            for buffer in buffers.values():
                buffer[...] = np.nan

    given = lent() if aggregator.needs == "sum" else iter(updates)
    assert same(case.aggregate(given, aggregator).delta, case.aggregate(updates).delta)


@rows(AGGREGATORS)
def test_aggregate_of_equal_updates_and_of_zero(case: AggregatorCase) -> None:
    one = cohort(case)[0]
    equal = [replace(one, site=f"site-{i}", weight=1.0 + i) for i in range(case.sites)]
    if case.mean_like:
        for name, array in case.aggregate(equal).delta.items():
            np.testing.assert_allclose(array, one.delta[name], rtol=1e-5)
    zero = [replace(u, delta=arrays.zeros_like(u.delta)) for u in equal]
    assert arrays.l2_norm(case.aggregate(zero).delta) == 0.0


@rows(AGGREGATORS)
def test_what_an_aggregator_remembers_can_be_checkpointed_and_resumed(case: AggregatorCase) -> None:
    aggregator, sent = case.make(), parameters("f4", 99, more=case.sent)
    state = aggregator.init(sent)
    for round in range(1, 4):
        updates = [replace(u, delta=arrays.read_only(u.delta)) for u in cohort(case)]
        updates[0] = update("f4", "site-1", seed=round, scale=1.0, more=case.sent)
        task, kept = Task(FIT, round, arrays.read_only(sent)), copy.deepcopy(state)
        assert is_tree(state)
        resumed, later = case.make().step(updates, task, pickle.loads(pickle.dumps(state)))
        out, after = aggregator.step(updates, task, state)
        assert same(out.delta, resumed.delta)
        assert same(after, later)
        for array in out.delta.values():
            array[...] = 7  # the aggregate is the callee's: what is remembered is not
        assert same(after, later)
        assert same(state, kept)
        state = after


@rows(AGGREGATORS)
def test_an_aggregator_travels_as_plain_values(case: AggregatorCase) -> None:
    aggregator, updates = case.make(), cohort(case)
    there = restore(describe(aggregator))
    assert type(there) is type(aggregator)
    assert same(case.aggregate(updates, there).delta, case.aggregate(updates, aggregator).delta)


@rows(AGGREGATORS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_aggregate_of_what_is_not_finite(case: AggregatorCase, bad: float) -> None:
    updates = cohort(case)
    updates[2] = spoilt(updates[2], bad)
    if case.not_finite == "raises":
        with pytest.raises(SflError):
            case.aggregate(updates)
        return
    out = case.aggregate(updates)
    finite = all(arrays.is_finite(array) for array in out.delta.values())
    assert finite is (case.not_finite == "absorbs")


@rows(AGGREGATORS)
def test_aggregate_of_nothing_is_refused(case: AggregatorCase) -> None:
    with pytest.raises(RoundError):
        case.aggregate([])
