"""Arrays as tensors for training scripts, and torch's global generators. Torch is imported when it is needed."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from sfl.types import Array

TorchState: TypeAlias = dict[str, Any]
"""What of torch is global to a process: its generators and the current CUDA device."""


def to_tensors(parameters: Mapping[str, Array]) -> dict[str, Any]:
    """Tensors that share the memory of the arrays, which must be writable.

    Args:
        parameters: Named arrays of any shapes.
    """
    import torch

    return {name: torch.from_numpy(np.asarray(value)) for name, value in parameters.items()}


def load_state(module: Any, parameters: Mapping[str, Any], *, strict: bool = True) -> None:
    """Load arrays or tensors into a torch module.

    Args:
        module: The module.
        parameters: Its ``state_dict``, by name.
        strict: Whether both must have the same names.

    Raises:
        RuntimeError: torch's own, naming the entries that differ.
    """
    ready = {name: value if hasattr(value, "detach") else np.array(value) for name, value in parameters.items()}
    arrays = {name: value for name, value in ready.items() if isinstance(value, np.ndarray)}
    module.load_state_dict(ready | to_tensors(arrays), strict=strict)


def seed_torch(seed: int | None, device: str = "cpu") -> None:
    """Seed torch's global generators and choose the current CUDA device, if torch is loaded.

    Args:
        seed: A 63-bit seed; ``None`` leaves the generators.
        device: Where the site computes; ``cuda:N`` becomes the current device.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "manual_seed"):  # not loaded, or just being loaded
        return
    if seed is not None:
        torch.manual_seed(seed)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)


def torch_state() -> TorchState:
    """The generators and the CUDA device as they are; empty where torch is not loaded."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "get_rng_state"):
        return {}
    state: TorchState = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["device"] = torch.cuda.current_device()
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_torch_state(state: TorchState) -> None:
    """Put back what ``torch_state`` gave."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not state:
        return
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_device(state["device"])
        torch.cuda.set_rng_state_all(state["cuda"])
