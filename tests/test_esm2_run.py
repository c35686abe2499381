"""The main job, from the command line to the folder it leaves."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sfl.cli import main
from sfl.io.checkpoint import Checkpoints
from sfl.io.metrics import read_metrics
from sfl.io.tree import load_tree

torch = pytest.importorskip("torch")

TINY = ["--local-steps", "2", "--batch-size", "2", "--max-length", "16", "--eval-proteins", "4"]
TWO = ["--num-rounds", "2"]


@pytest.fixture(scope="module", autouse=True)
def offline() -> Any:
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_OFFLINE", "1")
    yield
    patch.undo()


def run(*flags: str) -> int:
    return main(["run", "esm2", *flags])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert run(*TINY, *TWO, "--workers", "1", "--format", "simple", "--out", str(out)) == 0
    return out


def test_the_run_folder_is_complete(finished: Path) -> None:
    for name in ("config.yaml", "environment.json", "metrics.csv", "metrics.jsonl", "data.json", "report.html"):
        assert (finished / name).stat().st_size > 0
    assert list((finished / "tensorboard").iterdir())
    assert [p.name for p in Checkpoints(finished / "checkpoints").paths()] == [
        f"round-{r:06d}.safetensors" for r in range(3)
    ]
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["client"]["model"] == "bundled"
    assert config["federation"]["num_rounds"] == 2
    assert "num_rounds: 2  # --num-rounds" in (finished / "config.yaml").read_text()


def test_metrics_are_there_before_and_after_per_site_and_global(finished: Path) -> None:
    rounds = read_metrics(finished / "metrics.jsonl")
    assert [entry["round"] for entry in rounds] == [0, 1, 2]
    for entry in rounds:
        for metrics in (entry["evaluation"], entry["central"]):
            assert set(metrics) == {"loss", "perplexity", "masked_accuracy"}
            assert metrics["perplexity"] == pytest.approx(np.exp(metrics["loss"]))
        evaluated = [s["site"] for s in entry["sites"] if s["stage"] == "evaluate"]
        assert evaluated == ["site-1", "site-2"]


def test_transformers_loads_the_final_model(finished: Path) -> None:
    from transformers import EsmForMaskedLM

    from sfl.train.module import copy_parameters

    model = EsmForMaskedLM.from_pretrained(finished / "model")
    parameters = copy_parameters(model)
    for name, value in load_tree(finished / "checkpoints" / "round-000002.safetensors")["parameters"].items():
        assert np.array_equal(parameters[name], value), name


@pytest.mark.slow
def test_workers_do_not_change_the_bits(finished: Path, tmp_path: Path) -> None:
    assert run(*TINY, *TWO, "--workers", "2", "--format", "json", "--out", str(tmp_path / "two")) == 0
    name = "checkpoints/round-000002.safetensors"
    assert (tmp_path / "two" / name).read_bytes() == (finished / name).read_bytes()


def test_resume_goes_on_to_the_same_bits(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert run(*TINY, "--workers", "1", "--num-rounds", "1", "--out", str(out)) == 0
    assert run("--resume", str(out), "--num-rounds", "2") == 0
    name = "checkpoints/round-000002.safetensors"
    assert (out / name).read_bytes() == (finished / name).read_bytes()
    assert [entry["round"] for entry in read_metrics(out / "metrics.jsonl")] == [0, 1, 2]


def test_a_torn_checkpoint_is_said_and_the_one_before_is_used(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    last = out / "checkpoints" / "round-000002.safetensors"
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    assert run("--resume", str(out)) == 0
    assert "Using the checkpoint before it" in capsys.readouterr().out
    assert last.read_bytes() == whole


def test_resume_refuses_other_data(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    described = json.loads((out / "data.json").read_text())
    (out / "data.json").write_text(json.dumps({**described, "digest": "other"}))
    assert run("--resume", str(out)) == 2
    assert "data must be what the run began with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data", "nowhere.fasta"], "nowhere.fasta"),
        (["--model", "./nowhere"], "config.json"),
        (["--partition", "dirchlet:1"], "partition must be"),
        (["--num-clients", "0"], "num_clients must be"),
        (["--learning-rate", "nan"], "learning_rate must be"),
        (["--max-length", "4"], "max_length must be"),
        (["--device", "cuda:7"], "device must be"),
        (["--model", "x" * 300], "too long"),
        (["--resume", "nowhere"], "--resume must name"),
    ],
)
def test_bad_input_is_one_clear_line(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [] if "--resume" in flags else ["--out", str(tmp_path / "run"), "--workers", "1"]
    assert run(*flags, *out) in (1, 2)
    streams = capsys.readouterr()
    assert said in streams.err
    assert "Traceback" not in streams.err + streams.out


def test_an_occupied_folder_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*TINY, "--out", str(finished)) == 2
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("data.json", '{"sites', "data.json must be whole JSON"),
        ("data.json", "[1]", "data.json must hold a JSON object"),
        ("data.json", "{}", "data must be what the run began with"),
        ("config_sources.json", '{"options', "config_sources.json must be whole JSON"),
        ("config.yaml", "client: {learning_rate: 0.01", "got client.learning_rate 0.01 instead of 0.0005"),
        ("config.yaml", "federation: {seed: 3", "got federation.seed 3 instead of 0"),
    ],
)
def test_a_resume_of_an_edited_folder_is_one_clear_line(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, said: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    if name == "config.yaml":
        option, value = text.rpartition("{")[2].split(": ")
        text = re.sub(rf"{option}: \S+", f"{option}: {value}", (out / name).read_text())
    (out / name).write_text(text)
    assert run("--resume", str(out), "--num-rounds", "3") in (1, 2)
    assert said in capsys.readouterr().err


def test_flags_that_a_resume_refuses_are_not_written_down(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    before = (out / "config.yaml").read_bytes()
    assert run("--resume", str(out), "--num-rounds", "1") == 2
    assert "num_rounds must be at least the 2 rounds" in capsys.readouterr().err
    assert run("--resume", str(out), "--device", "cuda:77") == 2
    assert (out / "config.yaml").read_bytes() == before
    assert run("--resume", str(out), "--format", "simple") == 0


def test_a_device_that_torch_cannot_use_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: torch.nn.Module, device: str) -> torch.nn.Module:
        raise RuntimeError(f"PyTorch is not linked with support for {device} devices")

    monkeypatch.setattr(torch.nn.Module, "to", refused)  # whatever this machine has
    assert run(*TINY, "--device", "mps", "--workers", "1", "--out", str(tmp_path / "run")) == 2
    assert "device must be able to hold the model, got 'mps'" in capsys.readouterr().err


def test_natural_keys_and_labels_partition_the_sample(tmp_path: Path) -> None:
    for index, partition in enumerate(("dirichlet:0.5", "key:organism", "key:genus")):
        out = tmp_path / str(index)
        flags = ["--num-clients", "3", "--num-rounds", "1", "--partition", partition, "--workers", "1"]
        assert run(*TINY, *flags, "--out", str(out)) == 0
        sites = json.loads((out / "data.json").read_text())["sites"]
        assert len(sites) == 3
        assert all(site["train"] >= 1 and site["heldout"] >= 1 for site in sites)


def test_site_files(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        records = ["".join(generator.choice(list("LAGVSERTIDPKQNFYMHWC"), 60)) for _ in range(20)]
        (tmp_path / f"{name}.fasta").write_text("".join(f">{name}{i}\n{s}\n" for i, s in enumerate(records)))
    data = f"{tmp_path / 'a.fasta'},{tmp_path / 'b.fasta'}"
    flags = ["--data", data, "--partition", "files", "--workers", "1", "--out", str(tmp_path / "run")]
    assert run(*TINY, *TWO, *flags) == 0
    names = [site["name"] for site in json.loads((tmp_path / "run" / "data.json").read_text())["sites"]]
    assert names == ["site-1 (a)", "site-2 (b)"]


@pytest.mark.slow
def test_kill_9_at_any_moment_and_resume_gives_the_same_bits(finished: Path, tmp_path: Path) -> None:
    """A real process with two workers, killed as soon as each of these files appears, or a little later.

    ``test_resume`` kills a run of numbers at moments that nobody has chosen.
    """
    out = tmp_path / "run"
    flags = [*TINY, *TWO, "--workers", "2", "--format", "simple", "--out", str(out)]
    code = "import sys; from sfl.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "run", "esm2"]
    moments = [("checkpoints/round-000001.safetensors", 0.05), ("model/config.json", 0.0)]
    for file, delay in moments:
        begun = (out / "config.yaml").is_file()
        process = subprocess.Popen([*command, *(["--resume", str(out)] if begun else flags)], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and not (out / file).exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(delay)
        process.kill()
        process.wait()
        assert (out / file).exists()
    assert subprocess.run([*command, "--resume", str(out)], check=False, stdout=subprocess.DEVNULL).returncode == 0
    for name in ("checkpoints/round-000002.safetensors", "model/model.safetensors"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()
    assert [entry["round"] for entry in read_metrics(out / "metrics.jsonl")] == [0, 1, 2]
