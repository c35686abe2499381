"""What a run says on the screen."""

from __future__ import annotations

import io
import json
import logging
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from sfl.core.events import (
    Event,
    Notice,
    RoundFinished,
    RunFinished,
    RunStarted,
    SiteFinished,
    StageStarted,
    TransferProgress,
)
from sfl.core.task import Status
from sfl.errors import ConfigError
from sfl.io import words
from sfl.io.console import console_observer
from sfl.io.progress import LiveBar
from sfl.types import LogFormat
from sfl.utils.logging import setup_logging

SITES = ("site-1", "site-2")
FORMATS: tuple[LogFormat, ...] = ("rich", "simple", "json")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")


def site(number: int, name: str, status: Status = Status.USED, stage: str = "fit", **fields: object) -> SiteFinished:
    metrics = {"loss": 3.0 - number} if status is Status.USED else {}
    return SiteFinished(
        round=number, stage=stage, site=name, status=status, metrics=metrics, num_examples=5, nbytes=1000, **fields
    )  # pyright: ignore[reportArgumentType]


def run(rounds: int = 2, bad: str = "", loss: float = 2.0, reason: str = "") -> Iterator[Event]:
    yield RunStarted(
        job="demo", clients=SITES, rounds=rounds, done=0, num_parameters=250, nbytes=1000, engine="in-process"
    )
    for number in range(rounds + 1):
        entries: list[SiteFinished] = []
        for stage in ("fit", "evaluate") if number else ("evaluate",):
            yield StageStarted(round=number, stage=stage, cohort=SITES)
            for name in SITES:
                failed = bad and name == "site-2" and stage == "fit" and number == 1
                entry = site(number, name, stage=stage)
                if failed:
                    entry = site(number, name, Status.FAILED, stage, reason=bad, details="Traceback\n  deep inside")
                entries.append(entry)
                yield entry
        metrics = {"masked_accuracy": 0.1 + number / 10, "loss": loss - number / 10, "perplexity": math.e}
        yield RoundFinished(
            round=number,
            fit={},
            evaluation=metrics,
            central={},
            sites=tuple(entries),
            seconds={"fit": 10.0, "evaluate": 2.3},
            bytes_down=2000 if number else 0,
            bytes_up=1000 if bad else 2000,
        )
    yield RunFinished(rounds=rounds, seconds=75.0, reason=reason)


def said(events: Iterator[Event], format: LogFormat = "simple", verbose: bool = False) -> str:
    stream = io.StringIO()
    with console_observer(format, verbose, stream) as observer:
        for event in events:
            observer(event)
    return stream.getvalue()


def test_a_run_in_plain_lines() -> None:
    lines = said(run()).splitlines()
    assert lines[0] == "demo · 2 sites · 2 rounds · 250 parameters (1.0 kB) · in-process"
    assert lines[1].startswith("before     sites loss 2.0000 · perplexity 2.72 · masked accuracy 10.0 %")
    assert lines[2] == (
        "round 1/2  sites loss 1.9000 · perplexity 2.72 · masked accuracy 20.0 %  2 used · 12.3 s · "
        "2 \N{MULTIPLICATION SIGN} 1.0 kB each way"
    )
    assert lines[-1] == "done · 2 rounds in 1 min 15 s"


def test_the_end_compares_before_and_after() -> None:
    text = said(run())
    assert re.search(r"all sites\s+2\.0000 → 1\.8000\s+2\.72 → 2\.72\s+10\.0 % → 30\.0 %", text)
    assert re.search(r"site-1\s+3\.0000 → 1\.0000", text)


def test_failures_are_said_by_name_with_their_reason() -> None:
    text = said(run(bad="OutOfMemory: [red]no[/red] room"))
    assert "! site-2 failed in fit, round 1: OutOfMemory: [red]no[/red] room\n" in text
    assert "1 used, 1 failed (site-2)" in text
    assert "2 \N{MULTIPLICATION SIGN} 1.0 kB down, 1.0 kB up" in text
    assert "deep inside" not in text


def test_verbose_adds_sites_and_tracebacks() -> None:
    text = said(run(bad="boom"), verbose=True)
    assert "deep inside" in text
    assert "    site-1 fit  loss 2.0000  5 examples" in text


@pytest.mark.parametrize("format", FORMATS)
def test_foreign_text_cannot_move_the_cursor(format: LogFormat) -> None:
    text = said(run(bad="bad\x1b[2J\x07\r\nsecond line"), format, verbose=True)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "second line" in text


def test_an_early_end_says_why() -> None:
    assert "stopped early · 2 rounds in 1 min 15 s · the budget is spent" in said(run(reason="the budget is spent"))


def test_nan_metrics_and_rounds_without_any() -> None:
    assert "loss nan" in said(run(loss=math.nan))
    empty = RoundFinished(
        round=1, fit={}, evaluation={}, central={}, seconds={}, bytes_down=0, bytes_up=0,
        sites=tuple(site(1, name, Status.LATE) for name in "abcde"),
    )  # fmt: skip
    assert "no metrics  0 used, 5 late (a, b, c, +2)" in said(iter([empty]))


def test_json_is_one_object_an_event() -> None:
    events = [json.loads(line) for line in said(run(loss=math.nan, bad="x"), "json").splitlines()]
    assert events[0] | {"time": ""} == {
        "event": "RunStarted", "time": "", "job": "demo", "clients": ["site-1", "site-2"], "rounds": 2, "done": 0,
        "num_parameters": 250, "nbytes": 1000, "engine": "in-process",
    }  # fmt: skip
    assert next(e for e in events if e.get("status") == "failed")["reason"] == "x"
    assert events[-1]["event"] == "RunFinished"
    assert events[-2]["evaluation"]["loss"] == "NaN"


def moving(site: str, done: int, direction: str = "down") -> TransferProgress:
    return TransferProgress(site=site, direction=direction, done=done, total=10**9)


def test_the_live_line_says_how_far_large_transfers_are_until_they_are_there() -> None:
    start, *_ = run()
    assert isinstance(start, RunStarted)
    bar = LiveBar(Console(file=io.StringIO()), start)
    try:
        bar.stage(StageStarted(round=1, stage="fit", cohort=("a", "b", "c")))
        for site_, done in (("a", 3 * 10**8), ("b", 10**8), ("a", 4 * 10**8)):
            bar.transfer(moving(site_, done))
        assert bar._note() == "to a 40% of 1.0 GB, to b 10% of 1.0 GB"
        bar.transfer(moving("c", 5))
        assert bar._note().endswith("to b 10% of 1.0 GB, …")
        for site_ in "ac":
            bar.transfer(moving(site_, 10**9))
        bar.transfer(moving("b", 6 * 10**8, "up"))
        assert bar._note() == "from b 60% of 1.0 GB"
        bar.site(site(1, "b"))
        assert bar._note() == "waiting for a, c"
    finally:
        bar.stop()


def test_transfers_are_events_for_programs_and_no_lines_for_people() -> None:
    assert json.loads(said(iter([moving("a", 5, "up")]), "json")) | {"time": ""} == {
        "event": "TransferProgress", "time": "", "site": "a", "direction": "up", "done": 5, "total": 10**9,
    }  # fmt: skip
    assert said(iter([moving("a", 5)]), "simple", verbose=True) == ""


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_on_a_terminal_there_are_a_bar_colours_and_no_line_too_long(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    with console_observer("rich", False, stream) as observer:
        for event in run(bad="a long reason " * 12, reason="because"):
            observer(event)
            observer(Notice(text="careful", level="warning")) if isinstance(event, StageStarted) else None
            observer(moving("site-1", 5)) if isinstance(event, StageStarted) else None
    text = stream.getvalue()
    assert "\x1b[?25l" in text
    assert text.rindex("\x1b[?25h") > text.rindex("━"), "the bar is gone and the cursor is back"
    assert "\x1b[33m" in text
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", text)
    assert max(len(line) for line in plain.splitlines()) <= columns


def test_no_color_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    with console_observer("rich", False, stream) as observer:
        for event in run(bad="boom"):
            observer(event)
    assert not re.search(r"\x1b\[[0-9;]*(3[0-7]|9[0-7])m", stream.getvalue())


def test_rich_off_a_terminal_is_plain() -> None:
    assert said(run(bad="boom"), "rich") == said(run(bad="boom"), "simple")


def test_an_error_in_the_run_gives_the_screen_back() -> None:
    stream = Terminal()

    def fail() -> None:
        with console_observer("rich", False, stream) as observer:
            for event in run():
                observer(event)
                if isinstance(event, StageStarted):
                    raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert stream.getvalue().rstrip().endswith("\x1b[2K")
    assert "\x1b[?25h" in stream.getvalue()


def test_closing_twice_is_harmless() -> None:
    observer = console_observer("rich", False, Terminal())
    observer(next(run()))
    observer.close()
    observer.close()


def test_a_stream_without_utf8_is_no_reason_to_fail() -> None:
    raw = io.BytesIO()
    with console_observer("simple", False, io.TextIOWrapper(raw, "ascii", write_through=True)) as observer:
        for event in run(bad="caf\u00e9"):
            observer(event)
    assert b"2 x 1.0 kB" in raw.getvalue()
    assert b"2.0000 > 1.8000" in raw.getvalue()


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"logging\.format must be rich, simple or json, got 'xml'"):
        console_observer("xml")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="got 'xml'"):
        setup_logging("xml")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("value", "text"),
    [(math.inf, "inf"), (1234567.0, "1.23e+06"), (0.00012, "0.00012"), (0.0, "0.0000"), (99, "99.00")],
)
def test_metric_values(value: float, text: str) -> None:
    assert words.metric_value("loss", value) == text


def test_words_at_their_edges() -> None:
    assert words.size(999_960) == "1.0 MB"
    assert words.size(5e15) == "5000.0 TB"
    assert words.span(math.nan) == "? s"
    assert words.span(59.97) == "1 min 00 s"
    assert words.outcomes([]) == ""
    assert words.outcomes([site(1, "a", Status.USED), site(1, "a", Status.LATE, "evaluate")]) == (
        "1 used, 1 late in evaluate (a)"
    )


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    log = logging.getLogger("sfl")
    handlers, level = list(log.handlers), log.level
    log.handlers[:] = [
        handler for handler in handlers if isinstance(handler, logging.NullHandler)
    ]  # as in a new process
    yield log
    for handler in [handler for handler in log.handlers if handler not in handlers]:
        log.removeHandler(handler)
        handler.close()
    log.handlers[:] = handlers
    log.setLevel(level)


def test_logging_touches_only_its_own_logger(logger: logging.Logger) -> None:
    root = logging.getLogger()
    before = (list(root.handlers), root.level)
    mine = len(logger.handlers)
    for format in FORMATS:
        assert setup_logging(format) is logger
    assert (list(root.handlers), root.level) == before
    assert len(logger.handlers) == mine + 1


def test_logging_as_json(logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("json")
    child = logging.getLogger("sfl.io.x")
    child.debug("quiet")
    try:
        raise ValueError("boom")
    except ValueError:
        child.exception("it %s", "failed", extra={"site": "a"})
    line = json.loads(capsys.readouterr().err)
    assert line.pop("traceback").endswith("ValueError: boom")
    assert line.pop("time").endswith("+00:00")
    assert line == {"level": "error", "logger": "sfl.io.x", "message": "it failed", "site": "a"}


@pytest.mark.parametrize("format", ["rich", "simple"])
def test_logging_for_people(logger: logging.Logger, capsys: pytest.CaptureFixture[str], format: LogFormat) -> None:
    setup_logging(format, verbose=True)
    logger.debug("hello [there]")
    out = capsys.readouterr()
    assert "hello [there]" in out.err
    assert out.out == ""


def test_logging_into_a_file(logger: logging.Logger, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("simple", file=tmp_path / "run.log")
    logger.debug("only there")
    assert "DEBUG sfl: only there" in (tmp_path / "run.log").read_text()
    assert "only there" not in capsys.readouterr().err
    with pytest.raises(ConfigError, match="logging file must be writable"):
        setup_logging("simple", file=tmp_path)


def test_a_log_line_goes_above_the_live_bar(logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    setup_logging("rich")
    with console_observer("rich", False, stream) as observer:
        observer(next(run()))
        logger.warning("above the bar")
    before = stream.getvalue().split("above the bar")[0]
    assert "\x1b[2K" in before, "the bar is wiped before the line is written"
