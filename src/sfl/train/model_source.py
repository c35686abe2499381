"""Where a job's initial parameters come from: arrays, a module, the name of its class, or a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np

from sfl.errors import ConfigError, ModelError
from sfl.types import Array, Parameters

_HALF = ("torch.bfloat16", "torch.float16")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Makes the initial parameters when a run begins. Plain data, so that a recipe can travel.

    Every entry of a module's ``state_dict`` travels, frozen parameters and integer buffers included: training scripts
    load them strictly. Half precision is widened to float32, which keeps every value.

    Attributes:
        arrays: The parameters themselves; empty if they come from elsewhere.
        class_path: ``pkg.mod.Class`` of a torch module, built when the run begins.
        args: Keyword arguments of that class.
        checkpoint: A safetensors file, or a ``.pt`` file of tensors alone; it has the last word.
        seed: Seed of the class's random initial values.
        is_torch: Whether a training script is to be handed tensors.
    """

    arrays: Mapping[str, Array] = field(default_factory=dict[str, Array])
    class_path: str = ""
    args: Mapping[str, Any] = field(default_factory=dict[str, Any])
    checkpoint: str = ""
    seed: int = 0
    is_torch: bool = False

    @classmethod
    def of(cls, model: object, checkpoint: str | Path | None, seed: int) -> ModelSource:
        """From what a user names.

        Args:
            model: A ``ModelSource``, a torch module, ``{"class_path": ..., "args": {...}}``, named arrays, or ``None``.
            checkpoint: A file of parameters, or ``None``.
            seed: Seed of random initial values.

        Raises:
            ConfigError: If it is none of these, or there is nothing to begin from.
        """
        if isinstance(model, ModelSource):
            return model
        file = "" if checkpoint is None else str(Path(checkpoint).absolute())
        if model is None and not file:
            raise ConfigError("model must be given for a train_script, or initial_ckpt, got neither.")
        if model is None:
            return cls(checkpoint=file, is_torch=Path(file).suffix != ".safetensors")
        if isinstance(model, Mapping) and "class_path" in model:
            return cls._of_class(cast("Mapping[str, Any]", model), file, seed)
        if isinstance(model, Mapping):
            return cls(arrays=dict(cast("Mapping[str, Array]", model)), checkpoint=file)
        if not callable(getattr(model, "state_dict", None)):
            raise ConfigError(
                f"model must be a torch module, a class_path dict or a dict of arrays, got {type(model).__name__}."
            )
        return cls(arrays=state_arrays(model), checkpoint=file, is_torch=True)

    @classmethod
    def _of_class(cls, model: Mapping[str, Any], file: str, seed: int) -> ModelSource:
        unknown = sorted(set(model) - {"class_path", "args"})
        path = model["class_path"]
        if unknown or not isinstance(path, str) or "." not in path:
            raise ConfigError(f"model must be {{'class_path': 'pkg.mod.Class', 'args': {{...}}}}, got {model!r:.80}.")
        return cls(class_path=path, args=dict(model.get("args") or {}), checkpoint=file, seed=seed, is_torch=True)

    def __call__(self) -> Parameters:
        """The parameters.

        Raises:
            ModelError: If the class cannot be made, the file cannot be read, or the two differ in names or shapes.
        """
        made = _built(self.class_path, self.args, self.seed) if self.class_path else dict(self.arrays)
        if not self.checkpoint:
            return made
        loaded = read_checkpoint(Path(self.checkpoint))
        if made and _shapes(made) != _shapes(loaded):
            different = sorted(n for n, _ in set(_shapes(made).items()) ^ set(_shapes(loaded).items()))
            raise ModelError(f"{self.checkpoint} must hold the model's parameters, got others in {different[:3]}.")
        return {name: loaded[name] for name in made or loaded}


def state_arrays(module: Any) -> Parameters:
    """Every entry of a module's ``state_dict`` as an array of its own.

    Raises:
        ModelError: If an entry is not a tensor.
    """
    return _as_arrays(module.state_dict(), type(module).__name__)


def read_checkpoint(path: Path) -> Parameters:
    """The arrays of a safetensors file, or of a ``.pt`` file of tensors (never a pickle of anything else).

    Raises:
        ModelError: If the file cannot be read or holds something else.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return _as_arrays(load_file(path), str(path))
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, AttributeError, TypeError) as error:
        raise ModelError(f"{path} must be a checkpoint of tensors, got: {error}.") from error
    except Exception as error:  # torch says with pickle's own error what it refuses to load
        if type(error).__name__ != "UnpicklingError":
            raise
        raise ModelError(f"{path} must hold tensors and nothing else, got: {str(error)[:200]}.") from error
    return _as_arrays(_inner(loaded), str(path))


def _inner(loaded: object) -> object:
    """The state dict inside what trainers save around it."""
    if isinstance(loaded, Mapping):
        for key in ("state_dict", "model_state_dict", "model"):
            if isinstance(loaded.get(key), Mapping):
                return cast("object", loaded[key])
    return cast("object", loaded)


def _built(class_path: str, args: Mapping[str, Any], seed: int) -> Parameters:
    import torch

    module, _, name = class_path.rpartition(".")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # noqa: TID251 - inside fork_rng: a class draws its values from the global one
            return state_arrays(getattr(import_module(module), name)(**args))
    except (ImportError, AttributeError, TypeError) as error:
        raise ModelError(f"model must name a torch module that can be made, got {class_path}: {error}.") from error


def _as_arrays(state: object, what: str) -> Parameters:
    if not isinstance(state, Mapping) or not state:
        raise ModelError(f"{what} must hold named tensors, got {type(state).__name__}.")
    return {str(name): _as_array(str(name), value, what) for name, value in cast("Mapping[Any, Any]", state).items()}


def _as_array(name: str, value: Any, what: str) -> Array:
    if not hasattr(value, "detach"):
        raise ModelError(f"{what} must hold tensors alone, got {type(value).__name__} under {name!r}.")
    value = value.detach().cpu()
    return np.array((value.float() if str(value.dtype) in _HALF else value).numpy())


def _shapes(parameters: Parameters) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in parameters.items()}
