"""Least squares in numpy, as a federated training script."""

import argparse

import numpy as np

import sfl.client as flare

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()

flare.init()
data = np.random.default_rng(sum(flare.get_site_name().encode()))  # stands in for the site's own data
x = data.normal(size=(64, 3))
y = x @ np.array([1.0, -2.0, 0.5]) + 0.05 * data.normal(size=64)

while flare.is_running():
    model = flare.receive()
    w = model.params["w"]
    metrics = {"loss": float(np.mean((x @ w - y) ** 2))}
    if flare.is_evaluate():
        flare.send(flare.FLModel(metrics=metrics))
        continue
    for _ in range(args.steps):
        w = w - 0.1 * x.T @ (x @ w - y) / len(y)
    steps = {"NUM_STEPS_CURRENT_ROUND": len(y)}
    flare.send(flare.FLModel(params={"w": w}, metrics=metrics, meta=steps))
