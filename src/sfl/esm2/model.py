"""Which ESM2 model is meant, and its loading through ``transformers``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from sfl.errors import ModelError
from sfl.esm2.alphabet import TOKENS
from sfl.io.tree import writing
from sfl.train.pretrained import BUNDLED, Default, Pretrained, find, first_line, load_transformers

if TYPE_CHECKING:
    from transformers import EsmForMaskedLM

__all__ = ["BUNDLED", "DEFAULT", "Pretrained", "bundled_folder", "find_model", "load_model", "save_model"]

DEFAULT = "facebook/esm2_t6_8M_UR50D"
_LOG = logging.getLogger("sfl.esm2")


def bundled_folder() -> Path:
    """The folder of the checkpoint that ships with SFL."""
    return Path(__file__).parent / "bundled" / "model"


def find_model(name: str | None) -> Pretrained:
    """Decide which model is meant, without loading it; see `sfl.train.pretrained.find`."""
    missing = "the small bundled ESM2 checkpoint (the 8M model is not in the cache and the hub does not answer)"
    return find(name, Default(name=DEFAULT, bundled=bundled_folder(), missing=missing))


def load_model(source: Pretrained, *, seed: int = 0) -> EsmForMaskedLM:
    """Load ``EsmForMaskedLM`` in float32 with SDPA attention; what has no gradient in MLM is frozen.

    A checkpoint without a masked-LM head, such as a classifier's trunk, is given a new one, with a warning.

    Args:
        source: Which model.
        seed: Of what the checkpoint lacks and starts at random.

    Raises:
        ModelError: If it cannot be loaded, or is not an ESM2 model.
    """
    transformers = load_transformers("esm2")
    try:
        config = transformers.AutoConfig.from_pretrained(source.location)
    except Exception as error:  # a foreign config.json can break transformers in any way
        raise ModelError(
            f"model must be an ESM2 checkpoint that can be loaded, got {source.name!r}: {first_line(error)} "
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
        raise ModelError(f"model {source.name!r} must have loadable weights, got: {first_line(error)}") from error
    model.esm.contact_head.requires_grad_(False)
    lacking = sorted(name for name in info["missing_keys"] if "contact_head" not in name)
    if lacking:
        _LOG.warning("model %s lacks %d arrays (%s …), which start at random", source.name, len(lacking), lacking[0])
    return model


def save_model(model: EsmForMaskedLM, folder: Path) -> None:
    """Write the model and its tokenizer so that ``transformers`` loads both back."""
    transformers = load_transformers("esm2")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        vocabulary = folder / "vocab.txt"
        vocabulary.write_text("\n".join(TOKENS) + "\n", encoding="utf-8")
        transformers.EsmTokenizer(str(vocabulary), model_max_length=1024).save_pretrained(folder)
