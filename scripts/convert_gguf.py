"""Write a GGUF file of a language model as a folder that ``transformers`` loads.

python scripts/convert_gguf.py MODEL.gguf FOLDER      # needs the package gguf
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(file: Path, folder: Path) -> None:
    reading: Any = gguf
    reading.GGUFReader = functools.cache(gguf.GGUFReader)  # it takes half a minute, and would be made four times
    named = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    loaded = AutoModelForCausalLM.from_pretrained(**named)
    if hasattr(loaded.config, "quantization_config"):  # its weights are plain by now, and it may not be saved
        del loaded.config.quantization_config
    plain = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    partial = folder.with_name(folder.name + ".partial")
    plain.save_pretrained(partial)
    AutoTokenizer.from_pretrained(**named).save_pretrained(partial)
    partial.rename(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
