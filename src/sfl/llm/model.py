"""Which causal language model is meant, its loading through ``transformers``, and what of it is trained."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any, Final, cast

from torch import nn

from sfl.errors import ConfigError, MissingExtraError, ModelError
from sfl.io.tree import writing
from sfl.llm.config import LLMClientConfig
from sfl.train.pretrained import BUNDLED, Default, Pretrained, find, first_line, load_transformers

__all__ = [
    "BUNDLED",
    "DEFAULT",
    "Pretrained",
    "bundled_folder",
    "find_model",
    "load_model",
    "load_tokenizer",
    "save_model",
    "with_adapters",
]

DEFAULT: Final = "openai-community/gpt2"
_LOG = logging.getLogger("sfl.llm")
_EXTRA = "llm"


def bundled_folder() -> Path:
    """The folder of the checkpoint that ships with SFL."""
    return Path(__file__).parent / "bundled" / "model"


def find_model(name: str | None) -> Pretrained:
    """Decide which model is meant, without loading it; see `sfl.train.pretrained.find`."""
    missing = "the small bundled GPT-2 checkpoint (GPT-2 is not in the cache and the hub does not answer)"
    return find(name, Default(name=DEFAULT, bundled=bundled_folder(), missing=missing))


def load_model(source: Pretrained, *, dtype: str = "float32", seed: int = 0) -> nn.Module:
    """A causal language model, with SDPA attention where it has it; what a checkpoint lacks is random, with a warning.

    Args:
        source: Which model.
        dtype: What its weights are held in: float32 or bfloat16.
        seed: Of what the checkpoint lacks.

    Raises:
        ModelError: If it cannot be loaded, or is no causal language model.
    """
    transformers = load_transformers(_EXTRA)
    import torch

    torch.default_generator.manual_seed(seed)
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            source.location, dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # a foreign folder can break transformers in any way
        raise ModelError(
            f"model must be a causal language model that can be loaded, got {source.name!r}: {first_line(error)} "
            "Check the name; offline, use a local folder or --model bundled."
        ) from error
    lacking = sorted(info["missing_keys"])
    if lacking:
        _LOG.warning("model %s lacks %d arrays (%s …), which start at random", source.name, len(lacking), lacking[0])
    return model


def load_tokenizer(source: Pretrained) -> Any:
    """The model's own tokenizer.

    Raises:
        ModelError: If it has none that can be loaded.
    """
    transformers = load_transformers(_EXTRA)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.location)
    except Exception as error:  # as above
        raise ModelError(
            f"model must come with a tokenizer that can be loaded, got {source.name!r}: {first_line(error)}"
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # made up by transformers, where the files are missing
        raise ModelError(f"model must come with a tokenizer that has words, got {source.name!r} with an empty one.")
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer must have a token that ends a text, got {source.name!r} without any.")
    return tokenizer


def with_adapters(model: nn.Module, config: LLMClientConfig, *, seed: int = 0) -> nn.Module:
    """The model with what ``config.peft`` trains; all else is frozen. The whole model for ``none``.

    Args:
        model: A causal language model.
        config: Which adapters.
        seed: Of their random values.

    Raises:
        ConfigError: If the model has no module of a name that is given.
        MissingExtraError: If peft is not installed.
    """
    if config.peft == "none":
        return model
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError("peft", _EXTRA) from error
    import torch

    torch.default_generator.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it sets itself, such as fan_in_fan_out
            adapted = peft.get_peft_model(cast("Any", model), _adapters(peft, model, config))
    except ValueError as error:
        raise ConfigError(
            f"lora_targets must be names of the model's layers, got {config.lora_targets or 'none'}: "
            f"{first_line(error)}"
        ) from error
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    if config.lora_aggregation == "freeze-a" and any("lora_embedding" in name for name in trained):
        raise ConfigError(
            "lora_targets must be no embeddings with lora_aggregation=freeze-a: of theirs it is A that grows, got "
            f"{config.lora_targets}. Leave them out, or use another aggregation."
        )
    _warn_of_ties(cast("Any", model), trained)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return cast("nn.Module", adapted)


def _warn_of_ties(model: Any, trained: list[str]) -> None:
    """Of adapters on one of two layers that share a weight: merged, they change the other, too."""
    both = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    if len({id(getattr(layer, "base_layer", layer).weight) for layer in both}) == len(both):
        return
    adapted = {name for name, module in model.named_modules() if any(module is layer for layer in both)}
    if found := [name for name in adapted if any(f".{name}.lora_" in parameter for parameter in trained)]:
        _LOG.warning("%s shares its weight with another layer: do not merge its adapter, that changes both", found[0])


def _adapters(peft: Any, model: nn.Module, config: LLMClientConfig) -> Any:
    if config.peft == "lora":
        return peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=_targets(peft, model, config.lora_targets),
            fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
        )
    kind = peft.PromptTuningConfig if config.peft == "prompt" else peft.PromptEncoderConfig
    more = {} if config.peft == "prompt" else {"encoder_hidden_size": int(cast("Any", model).config.hidden_size)}
    return kind(task_type="CAUSAL_LM", num_virtual_tokens=config.prompt_tokens, **more)


def _targets(peft: Any, model: nn.Module, named: str) -> list[str] | str:
    if named.strip() == "all-linear":  # peft's own word
        return named.strip()
    if named:
        return [name.strip() for name in named.split(",") if name.strip()]
    known = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    return known.get(cast("Any", model).config.model_type, "all-linear")


def save_model(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write the model, or its adapters alone, and the tokenizer, so that ``peft`` and ``transformers`` load them."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        cast("Any", model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
