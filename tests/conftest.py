"""What every test runs under: offline, one thread, reproducible examples."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything can import a library that reads them
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import sys

import pytest
from hypothesis import settings

settings.register_profile("sfl", deadline=None, max_examples=50, derandomize=bool(os.environ.get("CI")))
settings.load_profile("sfl")


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    """Two cores are shared with other workers. Torch is asked only where a test module has imported it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)
