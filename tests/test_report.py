"""The report: one page from the run's folder, offline, safe, and there even when everything failed."""

from __future__ import annotations

import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sfl.core.events import RoundFinished, SiteFinished
from sfl.core.task import Status
from sfl.errors import DataError, MissingExtraError
from sfl.io.metrics import MetricsWriter
from sfl.io.report import write_report

EVIL = "<script>alert(1)</script>"


def finished(number: int, loss: float = 2.0, failing: bool = False, sites: int = 2) -> RoundFinished:
    metrics = {} if failing else {"loss": loss, "perplexity": loss * 5, "masked_accuracy": 0.25}
    status = Status.FAILED if failing else Status.USED
    stages = ("fit", "evaluate") if number else ("evaluate",)
    entries = tuple(
        SiteFinished(
            round=number, stage=stage, site=f"site-{n}", status=status, reason=EVIL if failing else "",
            details=f"trace {EVIL}" if failing else "", metrics=metrics, nbytes=10, seconds=1.0,
        )
        for stage in stages
        for n in range(sites)
    )  # fmt: skip
    return RoundFinished(
        round=number, fit=metrics if number else {}, evaluation=metrics, central=metrics, sites=entries,
        seconds={"fit": 1.0, "other": 0.5} if number else {}, bytes_down=20, bytes_up=20,
    )  # fmt: skip


def folder_of(path: Path, rounds: list[RoundFinished], full: bool = True) -> Path:
    with MetricsWriter(path) as writer:
        for event in rounds:
            writer(event)
    if full:
        (path / "config.yaml").write_text("job: demo\nfederation:\n  num_rounds: 5  # from a flag\n")
        environment = {"started": "2026-01-01", "packages": {"numpy": "2"}, "git": None, "command": ["sfl", EVIL]}
        (path / "environment.json").write_text(json.dumps(environment))
        sites = [{"name": "site-0", "train": 1200, "heldout": 10, "residues": 9, "top": [[f"Homo {EVIL}", 3]]}]
        data = {"sites": [*sites, {"name": EVIL, "train": 3}], "global_heldout": 77, "notes": [f"note {EVIL}"]}
        (path / "data.json").write_text(json.dumps(data))
    return path


def page(path: Path) -> str:
    out = write_report(path)
    assert out == path / "report.html"
    return out.read_text(encoding="utf-8")


class Loads(HTMLParser):
    """What a page would fetch, and its scripts that are longer than an attack."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.ids: list[str] = []
        self.headings: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.urls += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(tag)


def parsed(text: str) -> Loads:
    loads = Loads()
    loads.feed(text)
    return loads


def without_scripts(text: str) -> str:
    return re.sub(r"<script[ >].*?</script>", "", text, flags=re.DOTALL)


def test_it_says_what_happened(tmp_path: Path) -> None:
    text = without_scripts(page(folder_of(tmp_path, [finished(0, 3.0), finished(1, 2.0), finished(2, 1.5)])))
    assert "<h1>demo</h1>" in text
    assert re.search(r"2\s+of 5 rounds", " ".join(text.split()))
    assert "3.0000 →" in text
    assert "-50.0 %" in text
    assert "Nothing: every planned site was used in every round." in text
    assert "# from a flag" in text
    assert "1,200" in text
    assert "77 examples are held out globally" in text
    assert "No formal guarantee:" in text
    assert "this run used no differential privacy or secure aggregation. Updates left the" in text


def test_it_loads_nothing(tmp_path: Path) -> None:
    text = page(folder_of(tmp_path, [finished(0), finished(1)]))
    loads = parsed(text)
    assert loads.urls == ["data:,"]
    assert "http://" not in without_scripts(text)
    assert "https://" not in without_scripts(text)
    assert "@import" not in without_scripts(text)
    assert "url(" not in without_scripts(text)
    assert {"chart-loss", "chart-perplexity", "chart-masked-accuracy", "chart-sizes", "chart-time"} <= set(loads.ids)
    assert len(loads.ids) == len(set(loads.ids))
    assert loads.headings[:2] == ["h1", "h2"]


def test_foreign_text_is_escaped(tmp_path: Path) -> None:
    text = page(folder_of(tmp_path, [finished(0), finished(1, failing=True)]))
    assert EVIL not in text
    assert without_scripts(text).count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 6


def test_when_everything_failed(tmp_path: Path) -> None:
    text = page(folder_of(tmp_path, [finished(n, failing=True) for n in range(3)]))
    assert "No metric was reported" in text
    assert "chart-loss" not in text
    assert without_scripts(text).count('<td class="bad">failed</td>') == 10


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_when_a_figure_is_not_finite(tmp_path: Path, loss: float) -> None:
    text = page(folder_of(tmp_path, [finished(0, loss), finished(1, loss)]))
    assert "not a finite figure" in text
    assert not re.search(r"[:,\[] ?(NaN|-?Infinity)[,\]]", text.split("</style>")[1].split("<main>")[1])


def test_with_nothing_but_metrics(tmp_path: Path) -> None:
    folder = tmp_path / "esm2-20260101"
    text = page(folder_of(folder, [finished(0), finished(1)], full=False))
    assert "<h1>esm2-20260101</h1>" in text
    assert 'id="config"' not in text
    assert 'id="data"' not in text


def test_before_the_first_round(tmp_path: Path) -> None:
    assert "No round was finished" in page(folder_of(tmp_path, []))


def test_only_training_figures_and_resumed(tmp_path: Path) -> None:
    import dataclasses

    rounds = [dataclasses.replace(finished(n, 3.0 - n / 2), evaluation={}, central={}, sites=()) for n in (2, 3)]
    text = without_scripts(page(folder_of(tmp_path, rounds, full=False)))
    assert "training: after round 2 → after round 3" in text


def test_many_sites_stay_out_of_the_legend(tmp_path: Path) -> None:
    assert '"showlegend":false' in page(folder_of(tmp_path, [finished(0, sites=12), finished(1, sites=12)]))


def test_a_privacy_statement_is_shown_instead(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [finished(0)])
    (folder / "privacy.json").write_text(json.dumps({"epsilon": EVIL}))
    text = page(folder)
    assert "No formal guarantee" not in text
    assert EVIL not in text


@pytest.mark.parametrize(
    ("name", "content"),
    [("data.json", b"{"), ("data.json", b"[]"), ("config.yaml", b"a: [1"), ("environment.json", b"\xff\xfe")],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    folder = folder_of(tmp_path, [finished(0)])
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        write_report(folder)


def test_no_metrics_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="metrics"):
        write_report(tmp_path)


@pytest.mark.parametrize(("module", "package"), [("plotly.offline", "plotly"), ("jinja2", "jinja2")])
def test_a_missing_extra_names_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, package: str
) -> None:
    folder = folder_of(tmp_path, [])
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=f"{package} must be installed.*sfl\\[report\\]"):
        write_report(folder)


def test_epsilon_over_the_rounds_and_of_each_sites_examples(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [finished(0)])
    spent = [
        {"round": round, "unit": "site", "adversary": "server_trusted", "epsilon": 0.5 * round} for round in (1, 2, 3)
    ]
    privacy = {
        "statement": ["privacy: ε = 1.5 at δ = 1e-05 for each site"],
        "over_rounds": [*spent, {"round": 3, "unit": "site", "adversary": "server_curious", "epsilon": None}],
        "budget": {"max_epsilon": 2.0, "delta": 1e-5},
        "examples": {"sites": {"site-1": 3.25, "site-2": None}, "budget": {"max_epsilon": 4.0, "delta": 1e-6}},
    }
    (folder / "privacy.json").write_text(json.dumps(privacy))
    text = page(folder)
    assert "chart-epsilon" in text
    assert "each site, server trusted" in text
    assert "server curious" not in text
    assert "3.250" in text
    assert "no formal guarantee" in text


def test_what_differential_privacy_promises_is_said_in_words(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [finished(0)])
    statement = ["privacy: ε = 8 at δ = 1e-05 for each site", "hidden: whether any one site took part"]
    (folder / "privacy.json").write_text(json.dumps({"statement": statement, "guarantees": []}))
    text = page(folder)
    assert "<strong>ε = 8 at δ = 1e-05 for each site</strong>" in text
    assert "hidden: whether any one site took part" in text
    assert "No formal guarantee" not in text
