"""A model of GPT-2's shapes and a client whose work is one addition: engines' own processes import this module."""

from __future__ import annotations

import numpy as np

from sfl.client.base import BaseFederatedClient
from sfl.types import ClientUpdate, Config, Evaluation, Parameters

VOCABULARY, LARGEST = 50257, 1280


def model(megabytes: int) -> Parameters:
    """Float32 arrays of about so many megabytes (10^6 bytes): an embedding of a quarter of them, then layers alike."""
    total = megabytes * 250_000
    width = max(8, min(LARGEST, total // 4 // VOCABULARY))
    arrays = {"wte": np.full((VOCABULARY, width), 0.25, np.float32)}
    rest, count = total - VOCABULARY * width, 32
    for layer in range(count):
        arrays[f"h.{layer}.mlp"] = np.full((rest // count // (4 * width), 4 * width), layer / count, np.float32)
        arrays[f"h.{layer}.ln"] = np.ones(width, np.float32)
    return arrays


def small() -> Parameters:
    """Nothing, to see what a process takes by itself."""
    return {"w": np.zeros(5, np.float32)}


class AddsOne(BaseFederatedClient):
    """Adds a constant in place, in memory that it lends."""

    lends_arrays = True

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        updated: Parameters = {}
        for name, value in parameters.items():
            updated[name] = value + np.float32(1 + self.client_id)
        return updated, 1 + self.client_id, {}

    def evaluate(self, parameters: Parameters, config: Config) -> Evaluation:
        return float(next(iter(parameters.values())).flat[0]), 1, {}
