"""Which ESM2 model is meant, and its loading through ``transformers``."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfl.errors import MissingExtraError, ModelError
from sfl.esm2.alphabet import TOKENS
from sfl.io.tree import writing
from sfl.train.hub import hub_refusal, is_offline
from sfl.utils.cache import keep_torch_in_cache

if TYPE_CHECKING:
    from transformers import EsmForMaskedLM

DEFAULT = "facebook/esm2_t6_8M_UR50D"
BUNDLED = "bundled"
_LOG = logging.getLogger("sfl.esm2")
_HUB_TIMEOUT = 3.0  # seconds; the default model is a convenience, not worth waiting for


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that can be loaded.

    Attributes:
        name: What to write under ``client.model`` to get the same again: a hub name, a folder, or ``bundled``.
        location: What ``from_pretrained`` takes.
        why: One line for the user.
    """

    name: str
    location: str
    why: str


def bundled_folder() -> Path:
    """The folder of the checkpoint that ships with SFL."""
    return Path(__file__).parent / "bundled" / "model"


def find_model(name: str | None) -> ModelSource:
    """Decide which model is meant, without loading it. Offline it never waits for a time-out.

    Args:
        name: A hub name, a local folder, ``bundled``, or ``None`` for the 8M model where it can be had at once, else
            the bundled one.

    Raises:
        ModelError: If a folder is named that is not there.
    """
    if name == BUNDLED:
        return ModelSource(BUNDLED, str(bundled_folder()), f"model: bundled ({bundled_folder().name})")
    if name is not None:
        if _looks_like_path(name):
            folder = Path(name).expanduser().resolve()
            if not (folder / "config.json").is_file():
                raise ModelError(f"model must be a folder with a config.json, got {name!r}. Check the path.")
            return ModelSource(str(folder), str(folder), f"model: {folder}")
        return ModelSource(name, name, f"model: {name}")
    if _is_cached(DEFAULT):
        return ModelSource(DEFAULT, DEFAULT, f"model: {DEFAULT}, from the local cache")
    if _hub_answers(DEFAULT):
        return ModelSource(DEFAULT, DEFAULT, f"model: {DEFAULT}, from the hub")
    why = "model: the small bundled ESM2 checkpoint (the 8M model is not in the cache and the hub does not answer)"
    return ModelSource(BUNDLED, str(bundled_folder()), why)


def load_model(source: ModelSource, *, seed: int = 0) -> EsmForMaskedLM:
    """Load ``EsmForMaskedLM`` in float32 with SDPA attention; what has no gradient in MLM is frozen.

    A checkpoint without a masked-LM head, such as a classifier's trunk, is given a new one, with a warning.

    Args:
        source: Which model.
        seed: Of what the checkpoint lacks and starts at random.

    Raises:
        ModelError: If it cannot be loaded, or is not an ESM2 model.
    """
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(source.location)
    except Exception as error:  # a foreign config.json can break transformers in any way
        raise ModelError(
            f"model must be an ESM2 checkpoint that can be loaded, got {source.name!r}: {_first_line(error)} "
            "Check the name; offline, use a local folder or --model bundled."
        ) from error
    if config.model_type != "esm" or config.vocab_size != len(TOKENS):
        raise ModelError(
            f"model must be an ESM2 checkpoint with {len(TOKENS)} tokens, got {source.name!r} of type "
            f"{config.model_type!r} with {getattr(config, 'vocab_size', '?')}. Use e.g. {DEFAULT}."
        )
    import torch

    torch.default_generator.manual_seed(seed)
    try:
        model, info = transformers.EsmForMaskedLM.from_pretrained(
            source.location, dtype="float32", attn_implementation="sdpa", output_loading_info=True
        )
    except Exception as error:  # as above
        raise ModelError(f"model {source.name!r} must have loadable weights, got: {_first_line(error)}") from error
    model.esm.contact_head.requires_grad_(False)
    lacking = sorted(name for name in info["missing_keys"] if "contact_head" not in name)
    if lacking:
        _LOG.warning("model %s lacks %d arrays (%s …), which start at random", source.name, len(lacking), lacking[0])
    return model


def save_model(model: EsmForMaskedLM, folder: Path) -> None:
    """Write the model and its tokenizer so that ``transformers`` loads both back."""
    transformers = _transformers()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        vocabulary = folder / "vocab.txt"
        vocabulary.write_text("\n".join(TOKENS) + "\n", encoding="utf-8")
        transformers.EsmTokenizer(str(vocabulary), model_max_length=1024).save_pretrained(folder)


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


def _transformers() -> Any:
    keep_torch_in_cache()
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "esm2") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
