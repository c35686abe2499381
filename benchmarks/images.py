"""Small images for the benchmarks: scikit-learn's digits, and Fashion-MNIST where it is installed; a numpy MLP."""

from __future__ import annotations

import gzip
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from sfl.client.base import BaseFederatedClient
from sfl.core import rng
from sfl.errors import DataError
from sfl.train.partition import dirichlet
from sfl.types import Array, ClientUpdate, Config, Evaluation, Metrics, Parameters

FASHION = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
HIDDEN = 64

Data = tuple[Array, Array, Array, Array]


@lru_cache
def load(task: str) -> Data:
    """Training images and labels, held-out images and labels."""
    return _digits() if task == "digits" else _fashion()


def _digits() -> Data:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images[order].astype(np.float32) / 16.0, labels[order]
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


def _fashion() -> Data:
    """12,000 training images and all 10,000 held-out ones (Xiao, Rasul & Vollgraf 2017; MIT)."""
    parts = []
    for part in ("train", "t10k"):
        for kind, offset in (("images-idx3", 16), ("labels-idx1", 8)):
            file = FASHION / f"{part}-{kind}-ubyte.gz"
            if not file.is_file():
                raise DataError(
                    f"Fashion-MNIST must lie in {FASHION}, got no {file.name}. Install Debian's dataset-fashion-mnist, "
                    "or set FASHION_MNIST to the folder of its four files."
                )
            parts.append(np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=offset))
    images, labels, more, theirs = parts
    scaled = [part.reshape(-1, 784).astype(np.float32) / 255.0 for part in (images, more)]
    return scaled[0][:12000], labels[:12000].astype(np.int64), scaled[1], theirs.astype(np.int64)


def initial(task: str, seed: int) -> Parameters:
    """Weights of the MLP, He-normal."""
    draw = rng.public(seed, 0, "initial")
    inputs = load(task)[0].shape[1]
    sizes = {"first": (inputs, HIDDEN), "last": (HIDDEN, 10)}
    weights = {f"{name}.weight": draw.normal(0, np.sqrt(2 / size[0]), size) for name, size in sizes.items()}
    biases = {f"{name}.bias": np.zeros(size[1]) for name, size in sizes.items()}
    return {name: value.astype(np.float32) for name, value in {**weights, **biases}.items()}


@lru_cache(maxsize=16)
def shares(task: str, sites: int, alpha: float, seed: int) -> list[Array]:
    """Indices of each site's training images."""
    labels = [str(label) for label in load(task)[1]]
    return list(dirichlet(labels, sites, alpha, rng.public(seed, 0, "partition")))


def accuracy(task: str, parameters: Parameters) -> Metrics:
    """On the held-out images."""
    _, _, images, labels = load(task)
    return {"accuracy": float((_forward(parameters, images)[1].argmax(1) == labels).mean())}


def _forward(w: Parameters, x: Array) -> tuple[Array, Array]:
    hidden = np.maximum(x @ w["first.weight"] + w["first.bias"], 0.0)
    return hidden, hidden @ w["last.weight"] + w["last.bias"]


class ImageSite(BaseFederatedClient):
    """Plain SGD of the MLP on a site's images, heeding what an algorithm adds.

    Args:
        client_id: Index of the site.
        device: Not used.
        task: digits or fashion.
        sites: In how many parts the images are shared out.
        alpha: By labels drawn from Dirichlet(alpha).
        seed: Of the partition and of the order of images.
        epochs: Passes over the site's images in a round.
        learning_rate: Of SGD.
    """

    honours = frozenset({"proximal", "drift", "learning_rate"})

    def __init__(
        self,
        client_id: int = 0,
        device: str = "cpu",
        *,
        task: str,
        sites: int,
        alpha: float,
        seed: int,
        epochs: int,
        learning_rate: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(client_id=client_id, device=device, **kwargs)
        images, labels, _, _ = load(task)
        mine = shares(task, sites, alpha, seed)[client_id]
        self.x, self.y = images[mine], labels[mine]
        self.seed, self.epochs, self.learning_rate = seed, epochs, learning_rate

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        """``epochs`` passes in batches of 32."""
        w = {name: value.copy() for name, value in parameters.items()}
        rate = np.float32(self.learning_rate * self.terms.learning_rate_factor)
        draw = rng.public(self.seed, int(config["round"]), "images", self.site)
        steps, steered = 0, bool(self.terms.needs)
        for _ in range(self.epochs):
            order = draw.permutation(len(self.x))
            for start in range(0, len(order), 32):
                batch = order[start : start + 32]
                slope = self._gradient(w, self.x[batch], self.y[batch])
                more = self.terms.added(w) if steered else {}
                for name, value in slope.items():
                    w[name] -= rate * (value + more[name] if steered else value)
                steps += 1
        self.travelled = float(steps * rate)
        return w, len(self.x), {}

    @staticmethod
    def _gradient(w: Parameters, x: Array, y: Array) -> Parameters:
        hidden, scores = _forward(w, x)
        odds = np.exp(scores - scores.max(1, keepdims=True))
        odds /= odds.sum(1, keepdims=True)
        odds[np.arange(len(y)), y] -= 1.0
        odds /= len(y)
        back = (odds @ w["last.weight"].T) * (hidden > 0)
        return {
            "first.weight": x.T @ back,
            "first.bias": back.sum(0),
            "last.weight": hidden.T @ odds,
            "last.bias": odds.sum(0),
        }

    def evaluate(self, parameters: Parameters, config: Config) -> Evaluation:
        """Accuracy on the site's own images."""
        right = _forward(parameters, self.x)[1].argmax(1) == self.y
        return None, len(self.x), {"accuracy": float(right.mean())}
