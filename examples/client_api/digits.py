"""The data and the network of the examples: each site has its own share of scikit-learn's handwritten digits."""

import torch
from sklearn.datasets import load_digits

SITES = 4


class Net(torch.nn.Sequential):
    """64 pixels to 10 scores, with one normalised hidden layer."""

    def __init__(self):
        super().__init__(torch.nn.Linear(64, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Linear(32, 10))


def site_data(site):
    """Every fourth image belongs to a site; a fifth of them is held out."""
    pixels, labels = load_digits(return_X_y=True)
    start = (int(site.rpartition("-")[2]) - 1) % SITES
    x = torch.tensor(pixels[start::SITES] / 16, dtype=torch.float32)
    y = torch.tensor(labels[start::SITES])
    held = len(x) // 5
    return x[held:], y[held:], x[:held], y[:held]


def batches(count, size=32):
    """Shuffled rows, in batches."""
    return torch.randperm(count).split(size)
