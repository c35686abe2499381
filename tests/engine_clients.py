"""Clients of the engine tests. Engines' own processes import this module by name."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterable

import numpy as np

from sfl.client.base import BaseFederatedClient
from sfl.types import ClientUpdate, Config, Evaluation, Parameters

log = logging.getLogger("my.own.client")


class Remembers(BaseFederatedClient):
    """Moves every array a little, by a number it remembers from round to round; logs; fails where it is told to."""

    honours = frozenset({"drift"})

    def __init__(self, client_id: int = 0, device: str = "cpu", *, fails: Iterable[tuple[int, int]] = ()) -> None:
        super().__init__(client_id=client_id, device=device)
        self.fails = {tuple(pair) for pair in fails}

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        if (self.client_id, config["round"]) in self.fails:
            raise ValueError(f"no data today at {self.site}")
        self.state["seen"] = self.state.get("seen", 0) + 1
        log.info("%s trains for the %s. time", self.site, self.state["seen"])
        step = self.state["seen"] * (self.client_id + 1)
        added = self.terms.added(parameters)
        updated = {
            name: value + step
            if value.dtype.kind in "iu"
            else value * value.dtype.type(1 + 1e-3 * step) - value.dtype.type(0.1) * added[name]
            for name, value in parameters.items()
        }
        self.travelled = 0.1
        return updated, 3 + self.client_id, {"loss": float(np.sum(parameters["w"])) + self.client_id / 3}

    def evaluate(self, parameters: Parameters, config: Config) -> Evaluation:
        return float(np.sum(parameters["w"])), 2 + self.client_id, {"seen": float(self.state.get("seen", 0))}


def many_kinds() -> Parameters:
    """Arrays of every kind that travels."""
    rng = np.random.default_rng(1)
    return {
        "w": rng.normal(size=(3, 4)).astype(np.float32),
        "wide": rng.normal(size=5),
        "half": rng.normal(size=6).astype(np.float16),
        "count": np.array([3, 2**40], np.int64),
        "scalar": np.array(0.1),
        "empty": np.zeros((0, 3), np.float32),
    }


def large() -> Parameters:
    """More than 64 MiB."""
    return {"w": np.random.default_rng(1).normal(size=(9 << 20,))}


def middling() -> Parameters:
    """One of them as large as many parts of what comes home through a log."""
    return {**many_kinds(), "large": np.random.default_rng(1).normal(size=(1 << 20,))}


class Dies(Remembers):
    """The process of site 0 dies in round two, once; ``marker`` says that it has."""

    def __init__(self, client_id: int = 0, device: str = "cpu", *, marker: str) -> None:
        super().__init__(client_id=client_id, device=device)
        self.marker = marker

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        if self.client_id == 0 and config["round"] == 2 and not os.path.exists(self.marker):  # noqa: PTH110
            with open(self.marker, "w"):  # noqa: PTH123
                os.kill(os.getpid(), signal.SIGKILL)
        return super().compute_update(parameters, config)


class Sleeps(Remembers):
    """Site 0 never answers."""

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        if self.client_id == 0:
            time.sleep(3600)
        return super().compute_update(parameters, config)
