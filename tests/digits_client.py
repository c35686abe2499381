"""An MLP over scikit-learn's digits. Engines' own processes import this module by name."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from sfl.client.base import BaseFederatedClient
from sfl.train.module import lend_parameters, load_parameters
from sfl.types import ClientUpdate, Config, Evaluation, Parameters


class Small(nn.Module):
    """An MLP for digits with bfloat16 weights beside float32 ones, and BatchNorm's buffers, an int64 among them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 32)
        self.norm = nn.BatchNorm1d(32)
        self.last = nn.Linear(32, 10).to(torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.norm(self.first(x))).to(torch.bfloat16)).float()


def small_model() -> Small:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(3)
        return Small()


def small_parameters() -> Parameters:
    return {name: np.array(value) for name, value in lend_parameters(small_model()).items()}


def load_digits() -> np.ndarray:
    """Images and labels, as scikit-learn reads them, without the two seconds in which a process imports it."""
    spec = find_spec("sklearn")
    assert spec is not None
    assert spec.origin is not None
    return np.loadtxt(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")


class Digits(BaseFederatedClient):
    """Plain SGD of ``Small`` on a hundred of scikit-learn's digits, each site's its own."""

    lends_arrays: ClassVar[bool] = True

    def __init__(self, client_id: int = 0, device: str = "cpu", **kwargs: Any) -> None:
        super().__init__(client_id=client_id, device=device, **kwargs)
        digits = load_digits()[100 * client_id : 100 * (client_id + 1)]
        self.x = torch.from_numpy(digits[:, :-1].astype(np.float32) / 16)
        self.y = torch.from_numpy(digits[:, -1].astype(np.int64))
        self.model = small_model()

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        load_parameters(self.model, parameters)
        self.model.train()
        for _ in range(3):
            loss = nn.functional.cross_entropy(self.model(self.x), self.y)
            self.model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter -= 0.1 * parameter.grad
        return lend_parameters(self.model), len(self.x), {"loss": loss.item()}

    def evaluate(self, parameters: Parameters, config: Config) -> Evaluation:
        load_parameters(self.model, parameters)
        self.model.eval()
        with torch.no_grad():
            return float(nn.functional.cross_entropy(self.model(self.x), self.y)), len(self.x), {}
