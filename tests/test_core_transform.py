"""Chains: order of application, states, and the order that composition allows."""

from typing import Any

import numpy as np
import pytest

from sfl.core import rng
from sfl.core.task import Update
from sfl.core.transform import Chain, Divide, Stateless, Transform, chain, check_order
from sfl.errors import CompositionError, ConfigError
from sfl.types import Parameters


class Affine(Transform):
    """``delta * factor + shift``; its state counts the calls."""

    def __init__(self, factor: float, shift: float) -> None:
        self.factor, self.shift = factor, shift

    def init(self, parameters: Parameters) -> int:
        return 0

    def apply(self, update: Update, state: Any, rng: np.random.Generator) -> tuple[Update, Any]:
        delta = {name: value * self.factor + self.shift for name, value in update.delta.items()}
        return Update(update.site, delta, update.weight, update.metrics), state + 1


class Clip(Affine):
    raises_norm, clips = False, True


class Noise(Affine):
    adds_noise = True


class Shrink(Affine):
    raises_norm = False


class Raises(Affine):
    def apply(self, update: Update, state: Any, rng: np.random.Generator) -> tuple[Update, Any]:
        raise RuntimeError("no")


def run(transform: Transform, value: float = 1.0) -> tuple[float, Any]:
    update = Update("s", {"a": np.array([value])}, 1.0)
    out, state = transform.apply(update, transform.init(update.delta), rng.public(0, 1, "t"))
    return out.delta["a"].item(), state


DOUBLE, PLUS, CLIP, NOISE, SHRINK = Affine(2, 0), Affine(1, 3), Clip(1, 0), Noise(1, 0), Shrink(0.5, 0)


def test_the_empty_chain_is_the_identity() -> None:
    update = Update("s", {"a": np.ones(2)}, 1.0)
    assert chain().init(update.delta) == []
    out, state = chain().apply(update, [], rng.public(0, 1, "t"))
    assert out is update
    assert state == []


def test_transforms_run_first_to_last_each_with_its_own_state() -> None:
    assert run(chain(DOUBLE, PLUS)) == (5.0, [1, 1])
    assert run(chain(PLUS, DOUBLE)) == (8.0, [1, 1])


def test_state_travels_from_round_to_round() -> None:
    both = chain(DOUBLE, PLUS)
    update = Update("s", {"a": np.ones(1)}, 1.0)
    state = both.init(update.delta)
    for _ in range(3):
        _, state = both.apply(update, state, rng.public(0, 1, "t"))
    assert state == [3, 3]


def test_chaining_is_associative() -> None:
    flat = run(chain(DOUBLE, PLUS, SHRINK))[0]
    assert run(chain(chain(DOUBLE, PLUS), SHRINK))[0] == flat
    assert run(chain(DOUBLE, chain(PLUS, SHRINK)))[0] == flat


def test_a_state_of_another_chain_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        chain(DOUBLE, PLUS).apply(Update("s", {}, 1.0), [0], rng.public(0, 1, "t"))


def test_what_a_transform_raises_is_not_swallowed() -> None:
    with pytest.raises(RuntimeError, match="no"):
        run(chain(DOUBLE, Raises(1, 0)))


@pytest.mark.parametrize(
    "transforms",
    [
        (),
        (DOUBLE,),
        (DOUBLE, CLIP),
        (DOUBLE, CLIP, NOISE),
        (CLIP, SHRINK, NOISE),
        (CLIP, NOISE, SHRINK),
        (CLIP, CLIP, NOISE, NOISE),
        (Chain([DOUBLE, CLIP]), NOISE),
        (Chain([CLIP]), Chain([Chain([NOISE])])),
        (CLIP, Chain([SHRINK])),
        (CLIP, Chain()),
    ],
)
def test_good_orders_compose(transforms: tuple[Transform, ...]) -> None:
    assert chain(*transforms).transforms == transforms


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ((NOISE,), "Noise must come after a clip, got no clip before it"),
        ((NOISE, CLIP), "Noise must come after a clip"),
        ((DOUBLE, NOISE), "Noise must come after a clip"),
        ((Chain([NOISE]),), "Noise must come after a clip"),
        ((CLIP, DOUBLE), "Clip must come after what can raise a norm, got it before Affine. Swap Clip and Affine"),
        ((CLIP, NOISE, DOUBLE), "Swap Clip and Affine"),
        ((CLIP, DOUBLE, CLIP), "Swap Clip and Affine"),
        ((Chain([CLIP]), DOUBLE), "Swap Clip and Affine"),
        ((CLIP, Chain([SHRINK, DOUBLE])), "Swap Clip and Affine"),
    ],
)
def test_bad_orders_say_what_to_swap(transforms: tuple[Transform, ...], message: str) -> None:
    for compose in (lambda: chain(*transforms), lambda: check_order(list(transforms))):
        with pytest.raises(CompositionError, match=message):
            compose()


def test_a_transform_that_says_nothing_is_taken_to_raise_norms() -> None:
    assert (Transform.raises_norm, Transform.clips, Transform.adds_noise) == (True, False, False)


def test_divide_divides() -> None:
    assert run(Divide(4), 2.0) == (0.5, None)
    assert run(chain(CLIP, NOISE, Divide(1)), 2.0)[0] == 2.0


@pytest.mark.parametrize("divisor", [0, 0.5, -2, float("nan")])
def test_divide_never_enlarges(divisor: float) -> None:
    with pytest.raises(ConfigError, match="divisor must be at least 1, got"):
        Divide(divisor)


class Talks(Affine):
    """Sends a count beside the rest, and what it was told as its factor."""

    def sends(self, parameters: Parameters) -> Parameters:
        return {**parameters, "count": np.zeros(())}

    def tells(self, state: Any) -> dict[str, float]:
        return {"factor": float(state)}

    def told(self, config: Any) -> Any:
        return Talks(config.get("factor", self.factor), self.shift)


class Knows(Affine):
    """Its state is the names that it was prepared for."""

    def init(self, parameters: Parameters) -> Any:
        return sorted(parameters)


def test_a_transform_sends_what_it_gets_and_tells_nothing_unless_it_says_so() -> None:
    parameters = {"a": np.ones(1)}
    assert DOUBLE.sends(parameters) is parameters
    assert DOUBLE.tells(0) == {}
    assert DOUBLE.told({"factor": 5.0}) is DOUBLE


def test_a_chain_sends_tells_and_is_told_all_that_its_parts_are() -> None:
    both = chain(Talks(2, 0), Knows(1, 0))
    parameters = {"a": np.ones(1)}
    assert list(both.sends(parameters)) == ["a", "count"]
    assert both.init(parameters) == [0, ["a", "count"]]  # the second is prepared for what the first sends
    assert both.tells([7, 0]) == {"factor": 7.0}
    told = both.told({"factor": 3.0})
    assert [transform.factor for transform in told.transforms] == [3.0, 1]  # type: ignore[attr-defined]
    assert run(chain(Talks(2, 0)).told({"factor": 3.0}))[0] == 3.0


class Spoken(Stateless):
    """Says something of everything."""

    def change(self, update: Update) -> Update:
        return update

    def figures(self, update: Update) -> dict[str, float]:
        return {"size": float(len(update.delta))}

    def remarks(self, figures: dict[str, float]) -> list[str]:
        return [f"size {figures['size']:g}"]

    def caveat(self) -> str:
        return "promises nothing"


def test_what_transforms_say_of_an_update() -> None:
    update = Update("site-1", {"w": np.zeros(2)}, 1.0)
    both = chain(Divide(2.0), Spoken())
    assert both.figures(update) == {"size": 1.0}
    assert both.remarks({"size": 1.0}) == ["size 1"]
    assert Divide(2.0).caveat() == ""
    assert Spoken().caveat() == "promises nothing"
