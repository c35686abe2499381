"""Metric files: complete, parseable, and after a resume those of a run that was never stopped."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from sfl.core.events import Notice, RoundFinished, SiteFinished
from sfl.core.task import Status
from sfl.errors import CheckpointError, DataError
from sfl.io.jsonable import to_float, to_jsonable
from sfl.io.metrics import CSV_HEADER, MetricsWriter, read_metrics, read_rounds


def finished(number: int, loss: float = 2.0) -> RoundFinished:
    used = SiteFinished(
        round=number, stage="fit", site="a", status=Status.USED, seconds=1.5, nbytes=8, num_examples=3,
        metrics={"loss": loss},
    )  # fmt: skip
    failed = SiteFinished(
        round=number, stage="fit", site='b, "quoted"', status=Status.FAILED, reason="no\nmemory", details="trace"
    )
    return RoundFinished(
        round=number,
        fit={"loss": loss},
        evaluation={"loss": loss + 0.1, "perplexity": math.exp(loss)},
        central={"loss": loss + 0.2},
        sites=(used, failed),
        seconds={"fit": 1.5, "aggregate": 0.25},
        bytes_down=16,
        bytes_up=8,
    )


def write(folder: Path, events: list[RoundFinished], resume_after: int = -1) -> None:
    with MetricsWriter(folder, resume_after=resume_after) as writer:
        for event in events:
            writer(event)


def texts(folder: Path) -> list[str]:
    return [(folder / name).read_text() for name in ("metrics.jsonl", "metrics.csv")]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numpy and protobuf versions, inside tensorboard
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

        (path,) = (folder / "tensorboard").iterdir()
        out: dict[str, list[tuple[int, float]]] = {}
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                out.setdefault(value.tag, []).append((event.step, value.simple_value))
    return out


def test_events_come_back_as_they_were(tmp_path: Path) -> None:
    events = [finished(0), finished(1, 1.5), finished(2, 1.0)]
    write(tmp_path, events)
    assert read_rounds(tmp_path) == events
    assert [entry["round"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    assert read_metrics(tmp_path)[0]["sites"][1]["reason"] == "no\nmemory"


def test_other_events_are_not_written(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer(Notice(text="hello"))
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_stays_parseable(tmp_path: Path, value: float) -> None:
    write(tmp_path, [finished(1, value)])

    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert isinstance(line["fit"]["loss"], str)
    read = read_metrics(tmp_path)[0]["fit"]["loss"]
    assert read == value or (math.isnan(read) and math.isnan(value))
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert str(float(rows[0]["value"])) == str(value)


def test_csv_is_tidy(tmp_path: Path) -> None:
    write(tmp_path, [finished(1)])
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert tuple(rows[0]) == CSV_HEADER
    assert ["1", "evaluate", "global", "", "loss", "2.2"] in rows
    assert ["1", "fit", "a", "used", "loss", "2.0"] in rows
    assert ["1", "fit", 'b, "quoted"', "failed", "num_examples", "0.0"] in rows
    assert ["1", "traffic", "all", "", "bytes_up", "8.0"] in rows
    assert {len(row) for row in rows} == {6}


@pytest.mark.parametrize("torn", ["", '{"round": 3, "fit"', '{"round": 3}\n', "\x00\x00\x00"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_resume_equals_uninterrupted(tmp_path: Path, after: int, torn: str) -> None:
    events = [finished(number, 2.0 - number / 7) for number in range(5)]
    write(tmp_path / "whole", events)
    broken = tmp_path / "broken"
    write(broken, events[:3])
    with (broken / "metrics.jsonl").open("a") as file:
        file.write(torn)
    with (broken / "metrics.csv").open("a") as file:
        file.write("3,fit,a,us")
    write(broken, events[after + 1 :], resume_after=after)
    assert texts(broken) == texts(tmp_path / "whole")
    assert scalars(broken) == scalars(tmp_path / "whole")


def test_scalars_have_their_tags_and_steps(tmp_path: Path) -> None:
    write(tmp_path, [finished(0, 3.0), finished(1, 2.0)])
    found = scalars(tmp_path)
    assert found["loss/fit"] == [(0, 3.0), (1, 2.0)]
    assert found["loss/fit/a"] == [(0, 3.0), (1, 2.0)]
    assert found["traffic/bytes_up"] == [(0, 8.0), (1, 8.0)]


def test_a_fresh_writer_begins_empty(tmp_path: Path) -> None:
    write(tmp_path, [finished(1)])
    write(tmp_path, [])
    assert read_metrics(tmp_path) == []


def test_a_lost_round_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, [finished(1)])
    with caplog.at_level("WARNING", logger="sfl"):
        write(tmp_path, [], resume_after=2)
    assert "round 2 was lost" in caplog.text


def test_a_line_broken_in_the_middle_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, [finished(1)])
    path = tmp_path / "metrics.jsonl"
    path.write_text("rubbish\n" + path.read_text())
    with pytest.raises(DataError, match="line 1 must be a finished round"):
        MetricsWriter(tmp_path, resume_after=1)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_metrics(tmp_path)


def test_a_round_of_another_version_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, [finished(1)])
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"new": 1}) + "\n")
    with pytest.raises(DataError, match="new"):
        read_rounds(path)


def test_without_tensorboard_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    with caplog.at_level("WARNING", logger="sfl"):
        write(tmp_path, [finished(1), finished(2)])
    assert [record.getMessage() for record in caplog.records].count(caplog.records[0].getMessage()) == 1
    assert "pip install 'sfl[report]'" in caplog.text
    assert len(read_metrics(tmp_path)) == 2
    assert not (tmp_path / "tensorboard").exists()


def test_import_is_cheap_and_writing_needs_no_torch_or_tensorflow(tmp_path: Path) -> None:
    code = (
        "import sys, sfl.io.metrics, sfl.io.console, sfl.io.report, sfl.utils.logging\n"
        "heavy = {'torch', 'tensorflow', 'tensorboard', 'plotly', 'jinja2', 'rich'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        f"sfl.io.metrics.MetricsWriter({str(tmp_path)!r}).close()\n"
        "assert not {'torch', 'tensorflow'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_jsonable_takes_numpy_and_odd_values() -> None:
    import numpy as np

    assert to_jsonable({"a": np.float32(0.5), 1: (None, True, Path("x"))}) == {"a": 0.5, "1": [None, True, "x"]}
    assert math.isnan(to_float(None))
    assert math.isnan(to_float("word"))


@pytest.mark.parametrize("field", ["bytes_down", "fit", "sites"])
def test_a_line_that_lacks_a_field_is_broken(tmp_path: Path, field: str) -> None:
    write(tmp_path, [finished(0), finished(1), finished(2)])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    entry = json.loads(lines[1])
    del entry[field]
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0], json.dumps(entry), lines[2]]) + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl line 2 must be a finished round"):
        MetricsWriter(tmp_path, resume_after=2)


@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.csv"])
def test_figures_that_cannot_be_written_are_a_clear_error(tmp_path: Path, name: str) -> None:
    with MetricsWriter(tmp_path) as writer:
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
        with pytest.raises(CheckpointError, match=rf"{name} must be writable, got: Is a directory"):
            writer(finished(1))
