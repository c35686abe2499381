"""Which pretrained model is meant, and ``transformers`` as it is used here. Loading is each application's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from sfl.errors import ConfigError, MissingExtraError, ModelError
from sfl.train.hub import hub_refusal, is_offline
from sfl.utils.cache import keep_torch_in_cache

if TYPE_CHECKING:
    from torch import nn

__all__ = ["BUNDLED", "Default", "Pretrained", "find", "first_line", "load_transformers", "placed"]

BUNDLED = "bundled"
_HUB_TIMEOUT = 3.0  # seconds; the default model is a convenience, not worth waiting for

M = TypeVar("M", bound="nn.Module")


@dataclass(frozen=True, slots=True)
class Pretrained:
    """A model that can be loaded.

    Attributes:
        name: What to write under ``client.model`` to get the same again: a hub name, a folder, or ``bundled``.
        location: What ``from_pretrained`` takes.
        why: One line for the user.
    """

    name: str
    location: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Default:
    """What an application takes where no model is named.

    Attributes:
        name: On the hub.
        bundled: Folder of the checkpoint that ships with SFL, for where that cannot be had at once.
        missing: Why the bundled one is taken, for people.
    """

    name: str
    bundled: Path
    missing: str


def find(name: str | None, default: Default) -> Pretrained:
    """Decide which model is meant, without loading it. Offline it never waits for a time-out.

    Args:
        name: A hub name, a local folder, ``bundled``, or ``None`` for the default where it can be had at once, else
            the bundled one.
        default: What the application takes where none is named.

    Raises:
        ModelError: If a folder is named that is not there.
    """
    folder = str(default.bundled)
    if name == BUNDLED:
        return Pretrained(BUNDLED, folder, f"model: bundled ({default.bundled.name})")
    if name is not None:
        return _named(name)
    if _is_cached(default.name):
        return Pretrained(default.name, default.name, f"model: {default.name}, from the local cache")
    if _hub_answers(default.name):
        return Pretrained(default.name, default.name, f"model: {default.name}, from the hub")
    return Pretrained(BUNDLED, folder, f"model: {default.missing}")


def load_transformers(extra: str) -> Any:
    """The module, quiet.

    Args:
        extra: Which extra of SFL brings it.

    Raises:
        MissingExtraError: If it is not installed.
    """
    keep_torch_in_cache()
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", extra) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def placed(model: M, device: str) -> M:
    """The model on a device.

    Raises:
        ConfigError: If the device is not there, or cannot hold it.
    """
    try:
        return cast("Any", model).to(device)
    except (RuntimeError, AssertionError) as error:  # torch was built without it, or its memory is full
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"device must be able to hold the model, got {device!r}: {reason}. Use --device cpu."
        ) from error


def first_line(error: Exception) -> str:
    """An error in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _named(name: str) -> Pretrained:
    if not _looks_like_path(name):
        return Pretrained(name, name, f"model: {name}")
    folder = Path(name).expanduser().resolve()
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"model must be a whole model, got the adapters in {name!r}. Merge them into their base first "
            "(merge_and_unload), or name the base."
        )
    if not (folder / "config.json").is_file():
        raise ModelError(f"model must be a folder with a config.json, got {name!r}. Check the path.")
    return Pretrained(str(folder), str(folder), f"model: {folder}")


def _looks_like_path(name: str) -> bool:
    return Path(name).expanduser().exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return all(
        any(isinstance(try_to_load_from_cache(name, file), str) for file in files)
        for files in (("config.json",), ("model.safetensors", "pytorch_model.bin"))
    )


def _hub_answers(name: str) -> bool:
    if is_offline() or hub_refusal():
        return False
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HfHubHTTPError, httpx  # pyright: ignore[reportPrivateImportUsage]

    try:
        HfApi().model_info(name, timeout=_HUB_TIMEOUT)
    except (httpx.HTTPError, HfHubHTTPError, OSError):
        return False
    return True
