"""Small causal language models of several architectures, with the bundled tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sfl.llm.model import bundled_folder

VOCABULARY = 2048
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def save_tiny(
    folder: Path, architecture: str = "gpt2", *, layers: int = 2, width: int = 16, positions: int = 64
) -> Path:
    """A model with random weights, always the same."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    config: Any = {
        "gpt2": lambda: GPT2Config(
            vocab_size=VOCABULARY, n_embd=width, n_layer=layers, n_head=2, n_positions=positions, bos_token_id=0,
            eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        ),
        "llama": lambda: LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=positions, bos_token_id=0,
            eos_token_id=0, pad_token_id=0,
        ),
    }[architecture]()  # fmt: skip
    torch.default_generator.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copyfile(bundled_folder() / name, folder / name)
    return folder
