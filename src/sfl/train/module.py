"""Between a torch module and named numpy arrays, without copies where the memory allows it."""

# pyright: reportPrivateUsage=false
# torch has no public walk over parameters and buffers at once; these four dicts have been what they are since 0.4.

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import nn

from sfl.errors import ModelError
from sfl.types import Array, Parameters

T = TypeVar("T")
Tensors: TypeAlias = dict[str, torch.Tensor]
_resident: dict[Hashable, Any] = {}


def resident(key: Hashable, build: Callable[[], T]) -> T:
    """The one object of this key in this process: all sites of a worker share one resident model."""
    if key not in _resident:
        _resident[key] = build()
    return _resident[key]


def release_resident() -> None:
    """Let go of every resident model of this process."""
    _resident.clear()


def exchanged(module: nn.Module) -> Tensors:
    """What travels: trainable parameters (tied ones once) and buffers that a checkpoint holds, by name."""
    parameters: Tensors = {}
    buffers: Tensors = {}
    _collect(module, "", parameters, buffers, set())
    return parameters | buffers


def _collect(module: nn.Module, prefix: str, parameters: Tensors, buffers: Tensors, seen: set[int]) -> None:
    """``named_parameters`` and ``named_buffers`` in one walk: those two cost a small model more than its training."""
    seen.add(id(module))
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))
            parameters[prefix + name] = parameter.data
    for name, buffer in module._buffers.items():
        if buffer is not None and id(buffer) not in seen and name not in module._non_persistent_buffers_set:
            seen.add(id(buffer))
            buffers[prefix + name] = buffer
    for name, child in module._modules.items():
        if child is not None and id(child) not in seen:
            _collect(child, f"{prefix}{name}.", parameters, buffers, seen)


def lend_parameters(module: nn.Module) -> Parameters:
    """The module's parameters as arrays: views into its memory on the CPU in float32, copies otherwise."""
    return {name: _as_array(tensor) for name, tensor in exchanged(module).items()}


def copy_parameters(module: nn.Module) -> Parameters:
    """The module's parameters as arrays of their own."""
    return {name: np.array(value) for name, value in lend_parameters(module).items()}


def load_parameters(module: nn.Module, parameters: Mapping[str, Array]) -> None:
    """Write parameters into the module.

    Raises:
        ModelError: If names or shapes differ from the module's.
    """
    tensors = exchanged(module)
    if tensors.keys() != parameters.keys():
        different = sorted(tensors.keys() ^ parameters.keys())
        raise ModelError(f"parameters must have the model's {len(tensors)} names, got a difference in {different[:3]}.")
    for name, tensor in tensors.items():
        value = parameters[name]
        if tensor.shape != value.shape:
            raise ModelError(f"{name!r} must have shape {tuple(tensor.shape)}, got {value.shape}.")
        if tensor.device.type == "cpu" and tensor.dtype != torch.bfloat16:
            np.copyto(tensor.numpy(), value, casting="same_kind")
        else:
            tensor.copy_(torch.from_numpy(np.array(value)))


@contextmanager
def frozen(module: nn.Module, names: Iterable[str]) -> Generator[None]:
    """For a while, parameters of these names are not trained; they are exchanged all the same, before and after."""
    wanted = set(names)
    chosen = [p for name, p in module.named_parameters() if name in wanted and p.requires_grad]
    for parameter in chosen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in chosen:
            parameter.requires_grad_(True)


def _as_array(tensor: torch.Tensor) -> Array:
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    return tensor.detach().cpu().numpy()
