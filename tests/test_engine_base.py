"""``exchange`` on an engine that loses, delays, repeats and lends: one reply for each planned site, in cohort order."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfl.core.task import FIT, Reply, Status, Task, Update
from sfl.engine.base import Engine
from sfl.engine.ports import own_ports

TASK = Task(FIT, 1, {"w": np.zeros(2)})
COHORT = [f"site-{i}" for i in range(1, 6)]


class FakeEngine(Engine):
    """Replies with the sites of ``arrivals``, in that order, all in one lent buffer. Remembers what happened."""

    def __init__(self, arrivals: Sequence[str], failing: Sequence[str] = ()) -> None:
        self.arrivals = list(arrivals)
        self.failing = set(failing)
        self.log: list[str] = []
        self.buffer = {"w": np.zeros(2)}

    def clients(self) -> list[str]:
        return sorted(set(self.arrivals))

    def send(self, task: Task, clients: Sequence[str]) -> int:
        assert task is TASK
        self.log.append(f"send {len(clients)}")
        return 7

    def cancel(self, ticket: int) -> None:
        assert ticket == 7

    def replies(self, timeout: float | None = None, *, ticket: int | None = None) -> Iterator[Reply]:
        assert ticket == 7
        for site in self.arrivals:
            self.log.append(f"draw {site}")
            self.buffer["w"][:] = number(site)
            if site in self.failing:
                yield Reply(site, Status.FAILED, reason="ValueError: no data", seconds=1.5, details="traceback")
            else:
                yield Reply(site, Status.USED, Update(site, self.buffer, number(site)), seconds=2.0)
        self.buffer["w"][:] = -1.0

    def describe(self) -> str:
        return "fake"


def number(site: str) -> float:
    return float(site.removeprefix("site-"))


def outcome(engine: FakeEngine, cohort: Sequence[str], timeout: float | None = None) -> list[tuple[str, Status]]:
    """What came of each site, looking into each update before the next is drawn, as a streaming consumer does."""
    ends: list[tuple[str, Status]] = []
    for reply in engine.exchange(TASK, cohort, timeout):
        if reply.update is not None:
            assert reply.update.site == reply.site
            assert (reply.update.delta["w"] == number(reply.site)).all(), "a lent array was overwritten"
        ends.append((reply.site, reply.status))
    return ends


@given(st.permutations(COHORT), st.sets(st.sampled_from(COHORT)), st.sets(st.sampled_from(COHORT)))
def test_each_site_ends_once_in_cohort_order(arrivals: list[str], lost: set[str], failing: set[str]) -> None:
    engine = FakeEngine([site for site in arrivals if site not in lost], sorted(failing))
    expected = [Status.LATE if s in lost else Status.FAILED if s in failing else Status.USED for s in COHORT]
    assert outcome(engine, COHORT, 3.0) == list(zip(COHORT, expected, strict=True))


@given(st.permutations(COHORT))
def test_the_order_is_the_cohorts_whatever_it_is(cohort: list[str]) -> None:
    assert [site for site, _ in outcome(FakeEngine(COHORT), cohort)] == cohort


def test_replies_in_order_stream() -> None:
    engine = FakeEngine(COHORT[:3])
    for position, reply in enumerate(engine.exchange(TASK, COHORT[:3])):
        assert engine.log == ["send 3", *(f"draw {site}" for site in COHORT[: position + 1])]
        assert reply.update is not None
        assert reply.update.delta is engine.buffer  # in order: lent, no copy


def test_an_early_reply_waits_and_is_a_copy() -> None:
    engine = FakeEngine(["site-2", "site-1", "site-3"])
    rounds = engine.exchange(TASK, COHORT[:3])
    first = next(rounds)
    assert first.site == "site-1"
    assert engine.log[-1] == "draw site-1"
    second = next(rounds)
    assert engine.log[-1] == "draw site-1"  # it was there already
    assert second.update is not None
    assert second.update.delta is not engine.buffer
    assert (second.seconds, second.update.weight) == (2.0, 2.0)


def test_an_early_failure_keeps_its_reason() -> None:
    second = list(FakeEngine(["site-2", "site-1"], ["site-2"]).exchange(TASK, COHORT[:2]))[1]
    assert (second.status, second.reason, second.details) == (Status.FAILED, "ValueError: no data", "traceback")


@pytest.mark.parametrize(
    ("timeout", "reason", "seconds"), [(None, "no reply", 0.0), (0.5, "no reply within 0.5 s", 0.5)]
)
def test_a_silent_site_is_late_and_says_so(timeout: float | None, reason: str, seconds: float) -> None:
    late = list(FakeEngine([]).exchange(TASK, ["site-1"], timeout))
    assert late == [Reply("site-1", Status.LATE, reason=reason, seconds=seconds)]


def test_strangers_and_repetitions_are_not_part_of_the_round() -> None:
    arrivals = ["site-9", "site-3", "site-1", "site-1", "site-3", "site-2", "site-9", "site-1"]
    assert outcome(FakeEngine(arrivals), COHORT[:3]) == [(site, Status.USED) for site in COHORT[:3]]


def test_of_two_early_replies_the_first_counts() -> None:
    engine = FakeEngine(["site-2", "site-2", "site-1"])
    assert outcome(engine, COHORT[:2]) == [("site-1", Status.USED), ("site-2", Status.USED)]


def test_an_empty_cohort_is_an_empty_round() -> None:
    assert outcome(FakeEngine([]), []) == []


def test_with_closes_and_closing_twice_is_safe() -> None:
    class Counting(FakeEngine):
        closed = 0

        def close(self) -> None:
            super().close()
            self.closed += 1

    with Counting([]) as engine:
        assert engine.closed == 0
    assert engine.closed == 1
    with pytest.raises(KeyError), Counting([]) as engine:
        raise KeyError
    assert engine.closed == 1
    engine.close()


def test_ports_of_ones_own_are_given_once_from_many_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(16) as pool:
        given = [port for ports in pool.map(own_ports, [5] * 200) for port in ports]
    assert len(set(given)) == len(given) == 1000
    assert 10240 <= min(given) < max(given) < 32768
