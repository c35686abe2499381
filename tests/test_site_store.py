"""What a site remembers: the state before the round that is repeated, for as long as it is kept."""

from pathlib import Path

import numpy as np
import pytest

from sfl.errors import CheckpointError
from sfl.io.site_store import SiteStore


def store(folder: Path, *rounds: int) -> SiteStore:
    kept = SiteStore(folder)
    for number in rounds:
        kept.save(number, {"after": number, "w": np.full(2, number)})
    return kept


def after(kept: SiteStore, before: int) -> int | None:
    state = kept.load(before)
    return None if state is None else state["after"]


def test_the_state_is_the_one_before_the_round(tmp_path: Path) -> None:
    kept = store(tmp_path, 1, 3, 4)
    assert [after(kept, n) for n in (1, 2, 3, 4, 5, 9)] == [None, 1, 1, 3, 4, 4]
    assert after(store(tmp_path / "new"), 4) is None


def test_the_newest_three_are_kept_and_older_ones_are_missed(tmp_path: Path) -> None:
    kept = store(tmp_path, 1, 2, 3, 4, 5)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        f"state-{n:06d}.safetensors" for n in (3, 4, 5)
    ]
    assert [after(kept, n) for n in (4, 5, 6)] == [3, 4, 5]
    with pytest.raises(CheckpointError, match=r"must hold the site's state before round 3, got rounds \[3, 4, 5\]"):
        kept.load(3)


def test_before_the_first_round_there_is_nothing_whatever_is_kept(tmp_path: Path) -> None:
    assert after(store(tmp_path, 1, 2, 3, 4, 5), 1) is None


def test_a_repeated_round_replaces_what_a_crash_left(tmp_path: Path) -> None:
    kept = store(tmp_path, 1, 2, 3)
    store(tmp_path, 2)
    assert [after(kept, n) for n in (2, 3, 9)] == [1, 2, 2]
    store(tmp_path, 1)
    assert after(kept, 9) == 1


def test_a_site_that_joins_late_had_nothing_before(tmp_path: Path) -> None:
    kept = store(tmp_path, 6, 7)
    assert [after(kept, n) for n in (5, 6, 7)] == [None, None, 6]


def test_a_torn_state_is_an_error(tmp_path: Path) -> None:
    kept = store(tmp_path, 1, 2)
    path = tmp_path / "state-000002.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError):
        kept.load(3)


def test_within_one_life_of_the_server_the_newest_state_counts(tmp_path: Path) -> None:
    kept = SiteStore(tmp_path)
    kept.save(1, {"after": 1}, "a")
    kept.save(2, {"after": 2}, "a")
    assert kept.load(2, "a")["after"] == 2  # a second task of round 2
    assert kept.load(2, "b")["after"] == 1  # round 2 repeated
    kept.save(2, {"after": 20}, "b")
    assert kept.load(2, "b")["after"] == 20
    assert kept.load(2, "a")["after"] == 1
