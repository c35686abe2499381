"""Small numpy clients and transforms that worker processes can import by name."""

import os
import signal
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from sfl.client.base import BaseFederatedClient
from sfl.core import arrays
from sfl.core.aggregator import WeightedMean
from sfl.core.events import Event, RoundFinished, SiteFinished
from sfl.core.mechanism import DpEvent, Mechanism
from sfl.core.task import Status, Task, Update
from sfl.core.transform import Transform
from sfl.errors import CompositionError
from sfl.types import ClientUpdate, Config, Evaluation, Parameters, StateTree


class MyClient(BaseFederatedClient):
    """The promised example, word for word: extra keywords are swallowed."""

    def __init__(self, client_id=0, device=None, **kwargs):
        super().__init__(client_id=client_id, device=device or "cpu")
        self.learning_rate = 0.1

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        updated = {k: v + self.learning_rate * (self.client_id + 1) for k, v in parameters.items()}
        return updated, 10 * (self.client_id + 1), {"loss": 0.5}

    def evaluate(self, parameters: Parameters, config: Config) -> Evaluation:
        return float(parameters["w"].sum()), 10, {"accuracy": 0.25}


class Base(BaseFederatedClient):
    """Adds one; evaluates to zero."""

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        return {k: v + np.ones((), v.dtype) for k, v in parameters.items()}, self.client_id + 1, {}

    def evaluate(self, parameters: Parameters, config: Config) -> Evaluation:
        return 0.0, 1, {}


class LeastSquares(Base):
    """Full-batch gradient steps on ½‖Xw − y‖²/n in float64, with data of its own (``rows`` of them)."""

    def __init__(self, client_id: int = 0, device: str = "cpu", *, steps: int = 1, rows: int = 8) -> None:
        super().__init__(client_id=client_id, device=device)
        self.x, self.y = least_squares_data(client_id, rows)
        self.steps = steps

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        w = parameters["w"]
        for _ in range(self.steps):
            w = w - 0.1 * self.x.T @ (self.x @ w - self.y) / len(self.y)
        return {"w": w}, len(self.y), {"loss": float(np.mean((self.x @ w - self.y) ** 2))}


def least_squares_data(client_id: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(client_id)
    return draw.normal(size=(rows, 3)), draw.normal(size=rows)


class Wanderer(Base):
    """Depends on everything a run must carry: parameters, round, seed, and a state that grows with each task."""

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        seen = self.state.get("seen", 0) + 1
        memory = self.state.get("memory", np.zeros(3))
        draw = np.random.default_rng([int(config["seed"]), int(config["round"]), self.client_id, seen])
        memory = 0.5 * memory + draw.normal(size=3)
        self.state = {"seen": seen, "memory": memory, "notes": ["round", int(config["round"])]}
        updated: Parameters = {}
        for name, value in parameters.items():
            step = draw.normal(size=value.shape) * 3 + memory.sum()
            updated[name] = (value + step).astype(value.dtype)
        return updated, 3 + self.client_id, {"loss": float(memory[0]), "seen": seen}

    def evaluate(self, parameters: Parameters, config: Config) -> Evaluation:
        total = sum(float(np.abs(v.astype(np.float64)).sum()) for v in parameters.values())
        return total + self.state.get("seen", 0), 2 + self.client_id, {"norm": total}


class SlowWanderer(Wanderer):
    """The same with a pause, so that a kill can hit it at work."""

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        time.sleep(0.03)
        return super().compute_update(parameters, config)


def many_dtypes() -> Parameters:
    draw = np.random.default_rng(0)
    return {
        "f4": draw.normal(size=(4, 5)).astype(np.float32),
        "f8": draw.normal(size=7),
        "f2": draw.normal(size=3).astype(np.float16),
        "i8": np.arange(4),
        "u1": np.array([0, 5, 100], np.uint8),
        "flag": np.array([True, False]),
        "scalar": np.array(1.5),
        "none": np.zeros((0, 3), np.float32),
    }


class SlowFirst(Base):
    """The first site takes its time."""

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        time.sleep(1.0 if self.client_id == 0 else 0.0)
        return super().compute_update(parameters, config)


class Faulty(Base):
    """``client_id`` 1 does what ``mode`` says in round ``round``; the others add one."""

    def __init__(self, client_id: int = 0, device: str = "cpu", *, mode: str, round: int = 1) -> None:
        super().__init__(client_id=client_id, device=device)
        self.mode, self.bad_round = mode, round

    def compute_update(self, parameters: Parameters, config: Config) -> Any:
        good, _, _ = super().compute_update(parameters, config)
        if self.client_id != 1 or config["round"] != self.bad_round:
            return good, 1, {}
        w = good["w"]
        if self.mode == "write":
            parameters["w"][0] = 7.0
        if self.mode in ACTIONS:
            ACTIONS[self.mode]()
        if self.mode == "huge":
            return {"w": np.array([1.7e308, -1.7e308])}, 1, {}
        return {
            "missing": ({}, 1, {}),
            "extra": ({**good, "more": w}, 1, {}),
            "shape": ({"w": w[:1]}, 1, {}),
            "kind": ({"w": w.astype(np.int64)}, 1, {}),
            "complex": ({"w": w.astype(np.complex128)}, 1, {}),
            "list": ({"w": w.tolist()}, 1, {}),
            "not a dict": ([w], 1, {}),
            "nan": ({"w": np.array([np.nan, 1.0])}, 1, {}),
            "inf": ({"w": np.array([np.inf, 1.0])}, 1, {}),
            "zero": (good, 0, {}),
            "negative": (good, -3, {}),
            "float count": (good, 1.5, {}),
            "true count": (good, True, {}),
            "bare": good,
            "pair": (good, 1),
            "none": None,
            "metrics": (good, 1, {"loss": "low"}),
            "no metrics": (good, 1, None),
        }[self.mode]

    def evaluate(self, parameters: Parameters, config: Config) -> Any:
        bad = self.client_id == 1 and config["round"] == self.bad_round
        return (float("nan") if bad and self.mode == "evaluate nan" else 0.5), 1, {}


def _raise() -> None:
    raise ValueError("no data")


def _interrupt() -> None:
    raise SystemExit(0)


ACTIONS = {
    "raise": _raise,
    "sys.exit": _interrupt,
    "os._exit": lambda: os._exit(3),
    "sigkill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "sleep": lambda: time.sleep(5.0),
    "doze": lambda: time.sleep(90.0),
    "write": _raise,
}


class Die(Faulty):
    """After the deed, as any other site: for modes that leave no answer to give, or give a late one."""

    def compute_update(self, parameters: Parameters, config: Config) -> Any:
        if self.client_id == 1 and config["round"] == self.bad_round:
            ACTIONS[self.mode]()
            return {"w": parameters["w"] + 1000.0}, 1, {}
        return Base.compute_update(self, parameters, config)


class SlowReader(Base):
    """Reads its parameters late in round 1; says in the next what they were."""

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        if config["round"] == 1:
            time.sleep(5.0)
            self.state["read"] = float(parameters["w"][0])
        return super().compute_update(parameters, config)[0], 1, dict(self.state)


class Meddler(Base):
    """Works in the mapping that it was handed, as many do."""

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        parameters["w"] = parameters["w"] + 1.0
        return parameters, 1, {"seen": float(parameters.pop("b")[0]) if self.client_id > 9 else 0.0}

    def evaluate(self, parameters: Parameters, config: Config) -> Evaluation:
        return float(parameters.pop("w").sum()), 1, {}


class Hoarder(Base):
    """Keeps every array that it returned, with a copy, and says whether one of them was changed since."""

    kept: ClassVar[list[tuple[np.ndarray, np.ndarray]]] = []

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        updated = {k: v + 1.0 for k, v in parameters.items()}
        self.kept += [(v, v.copy()) for v in updated.values()]
        return updated, 1, {}


class Lender(Hoarder):
    """The same, but lends its arrays out."""

    lends_arrays = True
    kept: ClassVar[list[tuple[np.ndarray, np.ndarray]]] = []


class LedgerReader(Base):
    """Reports how many events the ledger holds while it trains."""

    def __init__(self, client_id: int = 0, device: str = "cpu", *, ledger: str, log: str) -> None:
        super().__init__(client_id=client_id, device=device)
        self.ledger, self.log = Path(ledger), Path(log)

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        lines = self.ledger.read_text().count('"event"') if self.ledger.exists() else 0
        with self.log.open("a") as file:
            file.write(f"{config['round']} {lines}\n")
        return {"w": parameters["w"] + np.array([3.0, 4.0]) * (self.client_id + 1)}, 5, {"loss": 1.0}


class ErrorFeedback(Transform):
    """Sends whole multiples of a half and carries what was cut off to the next round."""

    raises_norm = False

    def init(self, parameters: Parameters) -> StateTree:
        return {name: np.zeros(value.shape) for name, value in parameters.items()}

    def apply(self, update: Update, state: Any, rng: np.random.Generator) -> tuple[Update, StateTree]:
        delta, rest = {}, {}
        for name, value in update.delta.items():
            wanted = value.astype(np.float64) + state[name] + 1e-3 * rng.random(value.shape)
            sent = np.round(wanted * 2) / 2
            delta[name], rest[name] = np.asarray(sent, value.dtype), np.asarray(wanted - sent)
        return replace(update, delta=delta), rest


class BareState(Transform):
    """Its state is one array, not a container: counts the rounds."""

    raises_norm = False

    def init(self, parameters: Parameters) -> StateTree:
        return np.zeros(3)

    def apply(self, update: Update, state: Any, rng: np.random.Generator) -> tuple[Update, StateTree]:
        return replace(update, metrics={"rounds": float(state[0] + 1)}), state + 1.0


class DropNames(Transform):
    """Sends ``keep`` alone."""

    raises_norm = False

    def __init__(self, *keep: str) -> None:
        self.keep = keep

    def init(self, parameters: Parameters) -> StateTree:
        return None

    def apply(self, update: Update, state: Any, rng: np.random.Generator) -> tuple[Update, StateTree]:
        return replace(update, delta={k: v for k, v in update.delta.items() if k in self.keep}), state


class Widen(DropNames):
    """Doubles the precision, so the delta is larger than the parameters."""

    def apply(self, update: Update, state: Any, rng: np.random.Generator) -> tuple[Update, StateTree]:
        return replace(update, delta={k: np.asarray(v.astype(np.float64)) for k, v in update.delta.items()}), state


class RaiseAt(DropNames):
    """Fails on ``site``."""

    def apply(self, update: Update, state: Any, rng: np.random.Generator) -> tuple[Update, StateTree]:
        if update.site in self.keep:
            raise ArithmeticError("the transform broke")
        return update, state


class PoisonAt(DropNames):
    """Makes ``site``'s delta NaN: what a site's own checks no longer see."""

    def apply(self, update: Update, state: Any, rng: np.random.Generator) -> tuple[Update, StateTree]:
        bad = update.site in self.keep
        return (replace(update, delta=arrays.scale(update.delta, np.nan)) if bad else update), state


class ClipTo(Transform):
    """Scales to a norm of at most ``bound``."""

    raises_norm = False
    clips = True

    def __init__(self, bound: float) -> None:
        self.bound = bound

    def init(self, parameters: Parameters) -> StateTree:
        return None

    def apply(self, update: Update, state: Any, rng: np.random.Generator) -> tuple[Update, StateTree]:
        norm = arrays.l2_norm(update.delta)
        return replace(update, delta=arrays.scale(update.delta, min(1.0, self.bound / max(norm, 1e-300)))), state


class FixedNoise(Transform):
    """Adds a constant where noise would be, so that a test can follow it; counts how often it did."""

    adds_noise = True

    def init(self, parameters: Parameters) -> StateTree:
        return {"times": 0}

    def apply(self, update: Update, state: Any, rng: np.random.Generator) -> tuple[Update, StateTree]:
        delta = {name: value + 0.5 for name, value in update.delta.items()}
        return replace(update, delta=delta), {"times": state["times"] + 1}


class TestMechanism(Mechanism):
    """Clip to a norm of 1, then the constant."""

    __test__ = False  # not a test, whatever pytest thinks of its name

    def __init__(self, placement: Literal["local", "central"]) -> None:
        self._placement: Literal["local", "central"] = placement

    @property
    def placement(self) -> Literal["local", "central"]:
        return self._placement

    def clip(self) -> Transform:
        return ClipTo(1.0)

    def noise(self) -> Transform:
        return FixedNoise()

    def event(self, cohort: int, population: int) -> DpEvent:
        return DpEvent(
            mechanism="constant",
            noise_multiplier=0.5,
            sampling_rate=cohort / population,
            unit="site",
            adjacency="add_remove",
            adversary="server_trusted",
            sampling="none",
        )


class Remembers(WeightedMean):
    """Half of what it gave the round before, and the mean: an aggregator with a memory. It needs two sites."""

    def require(self, cohort: int) -> None:
        if cohort < 2:
            raise CompositionError(f"Remembers must have rounds of 2 sites, got {cohort}. Plan more.")

    def init(self, parameters: Parameters) -> StateTree:
        return {"given": arrays.zeros_like(parameters), "sent": 0.0}

    def step(self, updates: Iterable[Update], task: Task, state: Any) -> tuple[Update, StateTree]:
        mean = self.aggregate(updates)
        given = {name: value + 0.5 * state["given"][name] for name, value in mean.delta.items()}
        sent = state["sent"] + float(task.parameters["f8"].sum())
        return replace(mean, delta=arrays.copy(given)), {"given": {**state["given"], **given}, "sent": sent}


class Recorder:
    """An observer that keeps what it heard; with ``stop_at`` it raises at that event (0 is the first)."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.events: list[Event] = []
        self.stop_at = stop_at

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if self.stop_at is not None and len(self.events) > self.stop_at:
            raise InterruptedError("the test stops the run here")

    @property
    def rounds(self) -> list[RoundFinished]:
        return [event for event in self.events if isinstance(event, RoundFinished)]

    def site(self, site: str, round: int = 1, stage: str = "fit") -> SiteFinished:
        """How ``site`` ended that stage: exactly one entry, the same in the events and in the round's line."""
        said = [e for e in self.events if isinstance(e, SiteFinished)]
        (found,) = [e for e in said if (e.site, e.round, e.stage) == (site, round, stage)]
        listed = [e for r in self.rounds if r.round == round for e in r.sites if (e.site, e.stage) == (site, stage)]
        assert listed in ([found], []), "the round's line must tell the same"
        return found

    def statuses(self, round: int = 1, stage: str = "fit") -> list[Status]:
        (entry,) = [r for r in self.rounds if r.round == round]
        return [s.status for s in entry.sites if s.stage == stage]
