"""A run that was stopped, at whatever moment, and resumed has the bits of one that was not."""

import csv
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clients
from sfl.core.events import Notice, RunFinished, RunStarted
from sfl.env import SimEnv
from sfl.errors import CheckpointError, ConfigError
from sfl.recipe import FedAvgRecipe, RunResult
from sfl.types import FederationConfig

ROUNDS = 3


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports and TensorBoard events are made of the files that are compared here; each costs more than a run."""
    monkeypatch.setattr("sfl.server.session.write_report", lambda out: None)
    monkeypatch.setattr("sfl.io.metrics._open_scalars", lambda folder: None)


def recipe(rounds: int = ROUNDS, client: Any = clients.Wanderer, **federation: Any) -> FedAvgRecipe:
    return FedAvgRecipe(
        name="test",
        client=client,
        initial_parameters=clients.many_dtypes,
        aggregator=clients.Remembers(),
        transforms=(clients.ErrorFeedback(), clients.DropNames("f4", "f8", "i8", "scalar")),
        federation=FederationConfig(num_clients=4, num_rounds=rounds, fraction_fit=0.5, seed=11, **federation),
        central=lambda parameters: {"loss": float(parameters["f8"].sum())},
    )


def run(out: Path, resume: bool = False, stop_at: int | None = None, rounds: int = ROUNDS) -> clients.Recorder:
    recorder = clients.Recorder(stop_at)
    recipe(rounds).execute(SimEnv(device="cpu"), out=out, resume=resume, observers=(recorder,))
    return recorder


def left(out: Path) -> dict[str, Any]:
    """All that a run leaves and that a resume must not change: everything but seconds."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"]
        for site in line["sites"]:
            del site["seconds"]
    rows = list(csv.reader((out / "metrics.csv").read_text().splitlines()))
    checkpoints = {p.name: p.read_bytes() for p in sorted((out / "checkpoints").rglob("*")) if not p.is_dir()}
    sites = {str(p.relative_to(out)): p.read_bytes() for p in sorted((out / "sites").rglob("*.safetensors"))}
    return {
        "jsonl": lines,
        "csv": [row for row in rows if row[1] != "time" and row[4] != "seconds"],
        "checkpoints": checkpoints,
        "sites": sites,
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sfl.server.session.write_report", lambda out: None)
        patch.setattr("sfl.io.metrics._open_scalars", lambda folder: None)
        return out, len(run(out).events)


def test_the_run_holds_what_a_resume_could_lose(whole: tuple[Path, int]) -> None:
    out, events = whole
    assert events > 30
    found = left(out)
    assert [line["round"] for line in found["jsonl"]] == [0, 1, 2, 3]
    assert len(found["checkpoints"]) == 4
    assert len({name.split("/")[1] for name in found["sites"]}) >= 3
    assert len({tuple(s["site"] for s in line["sites"] if s["stage"] == "fit") for line in found["jsonl"]}) > 2


def test_stopped_at_any_event_and_resumed_it_is_the_same(whole: tuple[Path, int], tmp_path: Path) -> None:
    expected = left(whole[0])
    for event in range(whole[1]):
        out = tmp_path / f"stopped-{event}"
        with pytest.raises(InterruptedError):
            run(out, stop_at=event)
        run(out, resume=True)
        assert left(out) == expected, f"stopped at event {event}"


def test_stopped_again_and_again(whole: tuple[Path, int], tmp_path: Path) -> None:
    out, stops = tmp_path / "run", 0
    while stops < 10:
        try:
            run(out, resume=stops > 0, stop_at=18)
            break
        except InterruptedError:
            stops += 1
    assert 2 <= stops < 10
    assert left(out) == left(whole[0])


def test_more_rounds_continue_a_finished_run(whole: tuple[Path, int], tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(out, rounds=2)
    recorder = run(out, resume=True)
    started = recorder.events[0]
    assert isinstance(started, RunStarted)
    assert started.done == 2
    assert left(out)["checkpoints"] == left(whole[0])["checkpoints"]


def test_a_finished_run_that_is_resumed_does_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(out)
    before = left(out)
    assert [type(event) for event in run(out, resume=True).events] == [RunStarted, RunFinished]
    assert left(out) == before


def test_a_torn_checkpoint_is_said_and_the_one_before_it_used(whole: tuple[Path, int], tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(out, rounds=2)
    newest = sorted((out / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    recorder = run(out, resume=True)
    notice = recorder.events[0]
    assert isinstance(notice, Notice)
    assert notice.level == "warning"
    assert notice.text.endswith("Using the checkpoint before it.")
    assert left(out) == left(whole[0])


def test_when_every_checkpoint_is_torn_the_run_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(out, rounds=1)
    for path in (out / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="must hold a whole checkpoint"):
        run(out, resume=True)


def test_back_to_the_very_first_checkpoint_the_sites_start_anew(whole: tuple[Path, int], tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(out)
    for path in sorted((out / "checkpoints").iterdir())[1:]:
        path.unlink()
    run(out, resume=True)
    found, expected = left(out), left(whole[0])
    assert (found["jsonl"], found["checkpoints"]) == (expected["jsonl"], expected["checkpoints"])


def test_a_new_run_does_not_take_the_folder_of_another(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(out, rounds=1)
    before = left(out)
    with pytest.raises(ConfigError, match="out must be the folder of a new run"):
        run(out)
    assert left(out) == before


def test_a_resume_needs_a_folder() -> None:
    with pytest.raises(ConfigError, match="out must be the folder of the run to resume, got none"):
        recipe().execute(SimEnv(device="cpu"), resume=True)


def test_a_result_tells_its_own_part_of_the_run(tmp_path: Path) -> None:
    first: RunResult = recipe(2).execute(SimEnv(device="cpu"), out=tmp_path / "run")
    second = recipe(4).execute(SimEnv(device="cpu"), out=tmp_path / "run", resume=True)
    assert [r.round for r in first.rounds] == [0, 1, 2]
    assert [r.round for r in second.rounds] == [3, 4]
    assert (second.state.round, second.folder) == (4, tmp_path / "run")


SCRIPT = """
import sys
from pathlib import Path
import clients
import test_resume
from sfl.env import SimEnv
import sfl.io.metrics, sfl.server.session

if __name__ == "__main__":
    sfl.server.session.write_report = lambda out: None
    sfl.io.metrics._open_scalars = lambda folder: None
    recipe = test_resume.recipe(12, clients.SlowWanderer)
    recipe.execute(SimEnv(device="cpu", num_threads=2), out=Path(sys.argv[1]), resume=sys.argv[2] == "resume")
"""


def _checkpoints(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("*")) if out.exists() else []


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_bytes_of_a_whole_run(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}

    def start(out: Path, how: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, str(script), str(out), how], env=env)

    with start(tmp_path / "whole", "new") as process:
        assert process.wait() == 0
    out, draw, kills = tmp_path / "run", random.Random(), 0
    # Each is killed a moment after it went a checkpoint on, however slow the machine; some earlier, as they begin.
    for further in (1, 0, 1, 1, 0, 1):
        kept = len(_checkpoints(out))
        with start(out, "resume") as process:
            while process.poll() is None and len(_checkpoints(out)) < kept + further:
                time.sleep(0.005)
            time.sleep(draw.uniform(0.0, 0.15 if further else 2.0))
            kills += process.poll() is None
            process.kill()
    with start(out, "resume") as process:
        assert process.wait() == 0
    assert kills >= 1
    assert left(out) == left(tmp_path / "whole")


def test_workers_leave_the_same_files(whole: tuple[Path, int], tmp_path: Path) -> None:
    recipe().execute(SimEnv(device="cpu", num_threads=2), out=tmp_path / "run")
    assert left(tmp_path / "run") == left(whole[0])


def test_a_state_of_numpy_scalars_says_what_to_do(tmp_path: Path) -> None:
    class Scalars(clients.Base):
        def compute_update(self, parameters: Any, config: Any) -> Any:
            self.state = {"n": np.float32(1.0)}
            return super().compute_update(parameters, config)

    with pytest.raises(Exception, match="got float32"):
        recipe(1, Scalars).execute(SimEnv(device="cpu"), out=tmp_path / "run")


def test_checkpoints_that_were_taken_away_are_not_a_new_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(out, rounds=2)
    before = left(out)
    for path in (out / "checkpoints").iterdir():
        path.rename(out / path.name)
    with pytest.raises(CheckpointError, match=r"must hold the checkpoints of the rounds in metrics\.jsonl, got none"):
        run(out, resume=True)
    assert left(out)["jsonl"] == before["jsonl"]


def test_what_sites_remember_and_was_taken_away_is_missed(whole: tuple[Path, int], tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(out, rounds=2)
    site = next(path for path in sorted((out / "sites").iterdir()))
    site.rename(tmp_path / "aside")
    with pytest.raises(CheckpointError, match=rf"must hold what its sites remember, got nothing of {site.name}\. Put"):
        run(out, resume=True)
    (tmp_path / "aside").rename(site)
    run(out, resume=True)
    assert left(out) == left(whole[0])


def test_fewer_rounds_than_are_done_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(out)
    with pytest.raises(ConfigError, match=r"num_rounds must be at least the 3 rounds .* got 2"):
        run(out, resume=True, rounds=2)


def test_a_report_that_cannot_be_written_does_not_hide_why_the_run_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise CheckpointError("no room for the report")

    monkeypatch.setattr("sfl.server.session.write_report", full)
    with pytest.raises(InterruptedError):
        run(tmp_path / "run", stop_at=18)
    assert any(isinstance(e, Notice) and "no room" in e.text for e in run(tmp_path / "run", resume=True).events)
