"""From the runner's options to an aggregator and an attack, and the runs that they make."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from sfl.cli import main
from sfl.core.aggregator import Aggregator, WeightedMean
from sfl.errors import CompositionError, ConfigError
from sfl.esm2.config import ESM2RunConfig
from sfl.server.attacks import ATTACKS, Attack
from sfl.server.robust import (
    NNM,
    AggregationConfig,
    Bucketing,
    Bulyan,
    CenteredClipping,
    CoordinateMedian,
    CosineTrust,
    FLTrust,
    FoundationFL,
    GeometricMedian,
    Krum,
    MultiKrum,
    NormBound,
    PreAggregated,
    TrimmedMean,
    build_aggregator,
    build_attack,
)
from sfl.server.robust.config import AttackName, Rule
from sfl.types import FederationConfig
from sfl.utils.config import resolve

TEN = FederationConfig(num_clients=10)
ROOT: dict[str, Any] = {}


def built(root: Any = None, **options: Any) -> Aggregator:
    return build_aggregator(AggregationConfig(**options), TEN, root)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, WeightedMean),
        ({"aggregation": "krum", "krum_byzantine": 3}, Krum(3)),
        ({"aggregation": "multi-krum", "krum_projection": 50}, MultiKrum(1, projection=50)),
        ({"aggregation": "bulyan"}, Bulyan(1)),
        ({"aggregation": "trimmed-mean", "trim_ratio": 0.3}, TrimmedMean(0.3)),
        ({"aggregation": "median"}, CoordinateMedian()),
        ({"aggregation": "geometric-median"}, GeometricMedian()),
        ({"aggregation": "centered-clipping", "clip_radius": 0.5, "clip_iterations": 3}, CenteredClipping(0.5, 3)),
        ({"aggregation": "foundation-fl-ndss", "krum_byzantine": 2}, FoundationFL(2)),
        ({"aggregation": "median", "pre_aggregation": "nnm"}, PreAggregated(CoordinateMedian(), NNM(1))),
        ({"aggregation": "median", "pre_aggregation": "bucketing"}, PreAggregated(CoordinateMedian(), Bucketing(2))),
        ({"aggregation": "median", "max_update_norm": 2.0}, NormBound(CoordinateMedian(), 2.0)),
    ],
)
def test_options_become_aggregators(options: dict[str, Any], expected: Any) -> None:
    got = built(**options)
    assert isinstance(got, expected) if isinstance(expected, type) else got == expected


def test_rules_that_need_a_root_update() -> None:
    trust = built(ROOT, aggregation="foundation-fl", ffl_threshold=0.4)
    assert isinstance(trust, CosineTrust)
    assert (trust.threshold, trust.root_update) == (0.4, ROOT)
    assert isinstance(built(ROOT, aggregation="fltrust"), FLTrust)
    free = built(aggregation="foundation-fl", allow_untrusted_reference=True)
    assert isinstance(free, CosineTrust)
    assert free.allow_untrusted_reference
    for rule in ("foundation-fl", "fltrust"):
        with pytest.raises(CompositionError, match=f"aggregation={rule} must have a root update"):
            built(aggregation=rule)


def test_too_few_planned_sites_are_refused_with_the_numbers() -> None:
    with pytest.raises(CompositionError, match=r"n >= 2f \+ 3 = 11 .* got n = 10"):
        built(aggregation="krum", krum_byzantine=4)
    with pytest.raises(CompositionError, match=r"floor\(0.05 \* 10\) = 0"):
        built(aggregation="trimmed-mean", trim_ratio=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"krum_byzantine": -1}, "krum_byzantine must be 0 or more"),
        ({"trim_ratio": 0.5}, r"trim_ratio must be in \[0, 0.5\)"),
        ({"max_update_norm": 0.0}, "max_update_norm must be positive"),
        ({"allow_untrusted_reference": True}, "must come with aggregation=foundation-fl, got mean"),
        ({"attack_scale": 2.0}, "attack_scale must come with an attack"),
        ({"attackers": 0}, "attackers must be at least 1"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AggregationConfig(**options)


def test_names_are_those_that_there_are() -> None:
    assert set(get_args(AttackName)) == set(ATTACKS)
    for rule in get_args(Rule):
        assert isinstance(built(ROOT, aggregation=rule), Aggregator)


def test_flags_and_environment_reach_the_section() -> None:
    flags = {"aggregation": "multi-krum", "krum_byzantine": "2", "attack": "alie", "attackers": "3"}
    config = resolve(ESM2RunConfig, environ={"SFL_TRIM_RATIO": "0.25"}, overrides=flags).config.aggregation
    assert (config.aggregation, config.krum_byzantine, config.trim_ratio) == ("multi-krum", 2, 0.25)
    assert build_attack(config, 7) == Attack("alie", 3, None, 7)
    assert build_attack(AggregationConfig(), 7) is None


def test_attacks_are_simulated_alone() -> None:
    with pytest.raises(ConfigError, match="attack must come with backend=sim, where sites are simulated, got nvflare"):
        resolve(ESM2RunConfig, environ={}, overrides={"attack": "alie", "backend": "nvflare"})


TINY = ["--local-steps", "1", "--batch-size", "2", "--max-length", "16", "--eval-proteins", "4", "--num-rounds", "1"]


def run(out: Path, *flags: str) -> int:
    return main(["run", "esm2", *TINY, "--workers", "1", "--format", "simple", "--out", str(out), *flags])


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--num-clients", "5", "--aggregation", "multi-krum", "--attack", "sign-flip"],
        ["--num-clients", "3", "--aggregation", "fltrust"],
        ["--num-clients", "3", "--aggregation", "foundation-fl", "--ffl-threshold", "0.05"],
        ["--num-clients", "3", "--aggregation", "centered-clipping", "--pre-aggregation", "nnm"],
    ],
    ids=lambda flags: flags[3],
)
def test_esm2_runs_under_a_robust_rule(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    assert run(tmp_path / "run", *flags) == 0
    assert ("UNDER ATTACK: sign-flip by site-5" in capsys.readouterr().out) is ("--attack" in flags)


@pytest.mark.slow
def test_esm2_says_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    assert run(tmp_path / "a", "--num-clients", "3", "--attack", "label-flip") != 0
    assert "must be played by a client with flips_labels" in capsys.readouterr().err
    assert run(tmp_path / "b", "--num-clients", "4", "--aggregation", "krum") != 0
    assert "n >= 2f + 3 = 5" in capsys.readouterr().err
