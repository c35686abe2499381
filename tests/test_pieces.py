"""Large arrays travel piece by piece: the same bits, no message above a piece, nothing held before its turn."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
from flwr.common import Message  # noqa: TID251 - the engine is given what it would be given by a grid
from hypothesis import given
from hypothesis import strategies as st

import engine_clients as clients
from sfl import FedAvgRecipe, FederationConfig
from sfl.client.base import BaseFederatedClient
from sfl.client.site import SiteProgram
from sfl.core.events import Event, TransferProgress
from sfl.core.task import FIT, Reply, Status, Task, Update
from sfl.engine import freight, pieces, shared, site_process
from sfl.engine.flower.messages import pack, unpack
from sfl.engine.flower.server import FlowerEngine
from sfl.engine.freight import Freight, Ready
from sfl.engine.holding import Holding
from sfl.engine.host import HostSettings, SiteHost
from sfl.engine.local import LocalEngine
from sfl.engine.pieces import Source, Target, layout_of, spans
from sfl.engine.wire import pack_reply, pack_task
from sfl.env import SimEnv
from sfl.errors import EngineError
from sfl.privacy.dp import GaussianMechanism
from sfl.server.run import Hooks, Run
from sfl.types import ClientUpdate, Config, Evaluation, Parameters
from test_flower_greeting import a_task  # noqa: F401 - a fixture

NAMES = ["site-1", "site-2", "site-3"]
SIZE = 64


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "ABOVE", 100)
    monkeypatch.setattr(pieces, "SIZE", SIZE)


def odd() -> Parameters:
    """Arrays whose memory is in no order of ours."""
    return {
        **clients.many_kinds(),
        "turned": np.arange(12.0).reshape(3, 4).T,
        "strided": np.arange(20, dtype=np.int16)[::3],
        "foreign": np.arange(5, dtype=">f4"),
        "bytes": np.arange(7, dtype=np.uint8),
        "truth": np.array([True, False, True]),
    }


def same(left: Parameters, right: Parameters) -> bool:
    return list(left) == list(right) and all(
        left[name].dtype.newbyteorder("=") == right[name].dtype.newbyteorder("=")
        and left[name].shape == right[name].shape
        and np.array_equal(left[name], right[name])
        for name in left
    )


@given(size=st.integers(1, 2000), order=st.randoms(use_true_random=False))
def test_pieces_of_any_size_in_any_order_make_the_same_arrays(size: int, order: Any) -> None:
    source = Source(odd())
    todo = list(spans(source.nbytes, size))
    order.shuffle(todo)
    target = Target(source.nbytes)
    for start, stop in [*todo, *todo[:1]]:  # one comes twice
        piece = pieces.of_piece(source.read(start, stop))
        assert piece.size <= size
        target.write(start, piece)
    arrays = target.arrays(json.loads(json.dumps(source.said)))
    assert same(arrays, odd())
    assert not any(value.flags.writeable for value in arrays.values())


def test_what_has_not_all_come_is_no_array() -> None:
    source = Source({"w": np.ones(100)})
    target = Target(source.nbytes)
    target.write(0, np.zeros(64, np.uint8))
    with pytest.raises(ValueError, match="832 bytes of arrays must come, got 64 of 832"):
        target.arrays(source.said)
    for start, length in ((-1, 3), (830, 3), (0, 833)):
        with pytest.raises(ValueError, match="a piece must lie within 832 bytes"):
            target.write(start, np.zeros(length, np.uint8))


@pytest.mark.parametrize(
    "said",
    [
        None,
        3,
        [["w", "<f4"]],
        [["w", "O", [3]]],
        [["w", "<f4", [-1]]],
        [["w", "<f4", [1 << 40, 1 << 40]]],
        [["w", "no", [1]]],
        [["w", "<f4", ["x"]]],
        [["w", "<f4", [4]], ["w", "<f4", [4]]],
    ],
)
def test_what_says_no_arrays_of_ours_is_refused_before_anything_is_allocated(said: object) -> None:
    with pytest.raises(ValueError, match="arrays must be said by name, dtype and shape"):
        layout_of(said)


class Grid:
    """A SuperLink whose nodes pass messages to one process of sites, in the order that ``turn`` gives them."""

    def __init__(
        self, client: Callable[..., BaseFederatedClient] = clients.Remembers, *, backwards: bool = False
    ) -> None:
        self.host = SiteHost(HostSettings(program=lambda: SiteProgram(client=client)))
        self.holding, self.backwards = Holding(), backwards
        self.sent: dict[str, Message] = {}
        self.largest = 0
        self.log: list[tuple[str, str]] = []
        self.spoil: Callable[[str, dict[str, Any]], tuple[str, Parameters] | None] = lambda _site, _said: None

    def get_node_ids(self) -> list[int]:
        return [0, 1, 2]

    def push_messages(self, messages: Any) -> list[str]:
        for message in messages:
            number = f"m{len(self.log)}"
            message.metadata.__dict__["_message_id"] = number
            self.sent[number] = message
            self.log.append(("push", number))
            self._look(message)
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, ids: Any) -> list[Message]:
        known = [number for number in ids if number in self.sent]
        answers = [self._answer(self.sent.pop(number)) for number in (known[::-1] if self.backwards else known)]
        return [answer for answer in answers if answer is not None]

    def _answer(self, message: Message) -> Message:
        site = NAMES[message.metadata.dst_node_id]
        text, arrays = unpack(message.content)
        said = json.loads(text)
        if "hello" in said:
            return Message(pack(json.dumps({"site": site}), {}), reply_to=message)
        self.log.append((next((kind for kind in ("load", "draw") if kind in said), said.get("name", "?")), site))
        spoiled = self.spoil(site, said)
        if spoiled is None:
            raw = site_process.save(arrays)
            passed = site_process._passed(self.holding, site, text, raw)
            answer, delta = passed or site_process._answer(self.host, self.holding, site, text, raw)
            spoiled = answer, site_process.load(delta)
        answered = Message(pack(*spoiled), reply_to=message)
        self._look(answered)
        return answered

    def _look(self, message: Message) -> None:
        _, arrays = unpack(message.content)
        self.largest = max(self.largest, sum(value.nbytes for value in arrays.values()))


def update_of(replies: Iterator[Reply]) -> dict[str, tuple[Status, str, Parameters]]:
    return {
        reply.site: (reply.status, reply.reason, {} if reply.update is None else dict(reply.update.delta))
        for reply in replies
    }


def task(round: int = 1) -> Task:
    return Task(FIT, round, clients.many_kinds())


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("abreast", [None, 1, 2])
def test_a_round_in_pieces_has_the_bits_of_a_round_in_process(
    small_pieces: None, backwards: bool, abreast: int | None
) -> None:
    grid = Grid(backwards=backwards)
    engine = FlowerEngine(grid, NAMES, abreast=abreast)  # pyright: ignore[reportArgumentType]
    local = LocalEngine(SiteProgram(client=clients.Remembers), NAMES)
    for round in (1, 2):
        found = update_of(engine.exchange(task(round), NAMES))
        wanted = update_of(local.exchange(task(round), NAMES))
        assert list(found) == NAMES
        assert all(found[site][0] is Status.USED and same(found[site][2], wanted[site][2]) for site in NAMES)
    assert 0 < grid.largest <= SIZE
    assert not grid.holding._kept


def test_replies_are_drawn_in_the_order_of_the_cohort_and_not_before_their_turn(small_pieces: None) -> None:
    grid = Grid(backwards=True)
    engine = FlowerEngine(grid, NAMES)  # pyright: ignore[reportArgumentType]
    for number, reply in enumerate(engine.exchange(task(), NAMES)):
        drawn = list(dict.fromkeys(site for kind, site in grid.log if kind == "draw"))
        assert drawn == NAMES[: number + 1]
        assert reply.site == NAMES[number]


def test_only_so_many_sites_are_busy_with_large_tasks_at_a_time(small_pieces: None) -> None:
    grid = Grid()
    engine = FlowerEngine(grid, NAMES, abreast=1)  # pyright: ignore[reportArgumentType]
    for number, _ in enumerate(engine.exchange(task(), NAMES)):
        assert {site for kind, site in grid.log if kind == "load"} == set(NAMES[: number + 1])


def test_replies_are_whole_where_nobody_plans_an_exchange(small_pieces: None) -> None:
    engine = FlowerEngine(Grid(), NAMES)  # pyright: ignore[reportArgumentType]
    first, second = engine.send(task(1), NAMES[:2]), engine.send(task(2), NAMES)
    assert [len(found[2]) for found in update_of(engine.replies(ticket=second)).values()] == [6, 6, 6]
    assert [len(found[2]) for found in update_of(engine.replies(ticket=first)).values()] == [6, 6]
    assert not engine._freight.keys


def test_a_site_that_loses_its_process_between_pieces_and_task_has_failed(small_pieces: None) -> None:
    grid = Grid()

    def dies(site: str, said: dict[str, Any]) -> None:
        if site == "site-2" and "held" in said:
            grid.holding = Holding()

    grid.spoil = dies
    found = update_of(FlowerEngine(grid, NAMES).exchange(task(), NAMES[1:2]))  # pyright: ignore[reportArgumentType]
    assert found["site-2"][0] is Status.FAILED
    assert "site-2: its process has lost the task's arrays" in found["site-2"][1]


ANSWER = {"format": 1, "site": "site-2", "exchange": 1}


@pytest.mark.parametrize(
    ("kind", "answer", "words"),
    [
        ("load", ("no", {}), "site-2: "),
        ("load", (json.dumps({"reason": "its process died"}), {}), "site-2: its process died"),
        ("load", (json.dumps(ANSWER | {"at": 1}), {}), "site-2: another piece"),
        ("load", (json.dumps([]), {}), "site-2: a piece must be answered with what was asked"),
        ("draw", (json.dumps(ANSWER | {"at": 64}), {"piece": np.zeros(3, np.uint8)}), "must have 64 bytes, got 3"),
        ("draw", (json.dumps(ANSWER | {"at": 64}), {"piece": np.zeros(16, np.float32)}), "must carry one piece"),
        ("draw", (json.dumps(ANSWER | {"at": 64}), {}), "must carry one piece"),
    ],
)
def test_a_site_that_answers_something_else_has_failed_and_the_others_have_not(
    small_pieces: None, kind: str, answer: tuple[str, Parameters], words: str
) -> None:
    grid = Grid()
    grid.spoil = lambda site, said: answer if site == "site-2" and kind in said and said[kind][0] != 0 else None
    engine = FlowerEngine(grid, NAMES)  # pyright: ignore[reportArgumentType]
    found = update_of(engine.exchange(task(), NAMES))
    assert [found[site][0] for site in NAMES] == [Status.USED, Status.FAILED, Status.USED]
    assert words in found["site-2"][1]
    assert not engine._freight.keys


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ([["w", "<f8", [1 << 20]]], "a reply must hold at most"),
        ([["w", "<f4", [40]], ["x", "<f4", [40]]], "a reply must be one of ours"),
        ([["w", "O", [40]]], "arrays must be said by name"),
    ],
)
def test_a_site_that_says_it_holds_something_else_is_rejected(small_pieces: None, held: object, words: str) -> None:
    grid, update = Grid(), Update("site-2", {"w": np.zeros(40, np.float32)}, 1.0)
    text, _ = pack_reply(1, Reply("site-2", Status.USED, update))
    lie = json.dumps({**json.loads(text), "held": held})

    def lies(site: str, said: dict[str, Any]) -> tuple[str, Parameters] | None:
        if site != "site-2" or "load" in said:
            return None
        if "draw" in said:
            start, stop = said["draw"]
            return json.dumps(ANSWER | {"at": start}), {"piece": np.zeros(stop - start, np.uint8)}
        return lie, {}

    grid.spoil = lies
    found = update_of(FlowerEngine(grid, NAMES).exchange(task(), NAMES))  # pyright: ignore[reportArgumentType]
    assert [found[site][0] for site in NAMES] == [Status.USED, Status.REJECTED, Status.USED]
    assert words in found["site-2"][1]


class Clock:
    """Time goes on by one second whenever somebody asks for it."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now


def test_a_limit_is_on_each_piece_and_not_on_the_whole(monkeypatch: pytest.MonkeyPatch, small_pieces: None) -> None:
    monkeypatch.setattr(freight, "time", clock := Clock())
    source, posted = Source({"w": np.arange(800.0)}), list[str]()

    def post(site: str, text: str, arrays: Parameters) -> int:
        posted.append(text)
        return len(posted)

    def drawn(pieces_that_come: int) -> Reply:
        posted.clear()
        carried = Freight(post, "life", lambda: 1)
        text, _ = pack_reply(1, Reply("site-1", Status.USED, Update("site-1", {"w": np.zeros(800)}, 1.0)))
        noted = carried.noted(1, "site-1", json.dumps({**json.loads(text), "held": source.said}))
        assert noted is not None
        answered = 0
        waited = 0

        def pump() -> bool:
            nonlocal answered, waited
            waited += 1
            if waited % 4 or answered >= pieces_that_come:
                return False
            start, stop = json.loads(posted[answered])["draw"]
            answered += 1
            carried.came(answered, (json.dumps(ANSWER | {"site": "site-1", "at": start}), source.read(start, stop)))
            return True

        return carried.whole(noted, pump, 10.0)

    begun = clock.now
    whole = drawn(100)
    assert whole.update is not None
    assert np.array_equal(whole.update.delta["w"], np.arange(800.0))
    assert clock.now - begun > 50.0
    stalled = drawn(20)
    assert (stalled.status, stalled.reason) == (Status.LATE, "no reply within 10 s")


def test_a_process_of_sites_lets_go_of_what_is_over() -> None:
    holding = Holding()

    def say(exchange: int, oldest: int, life: str = "a", **more: object) -> dict[str, Any]:
        return {"exchange": exchange, "oldest": oldest, "life": life, **more}

    piece = {"piece": np.zeros(64, np.uint8)}
    for exchange in (1, 2):
        holding.passed("site-1", say(exchange, 1, load=[0, 64]), piece)
        holding.kept("site-1", say(exchange, 1, above=1), pack_reply(exchange, Reply("s", Status.USED))[0], odd())
    assert (set(holding._loaded), set(holding._kept)) == ({1, 2}, {(1, "site-1"), (2, "site-1")})
    holding.passed("site-1", say(3, 2, load=[0, 64]), piece)
    assert (set(holding._loaded), set(holding._kept)) == ({2, 3}, {(2, "site-1")})
    holding.passed("site-1", say(1, 1, "another", load=[0, 64]), piece)
    assert (set(holding._loaded), set(holding._kept)) == ({1}, set())
    with pytest.raises(EngineError, match="site-1: a piece must fit what it is of"):
        holding.passed("site-1", say(1, 1, "another", draw=[0, 64]), {})


def test_what_a_client_lends_is_kept_as_it_was_when_the_next_task_begins() -> None:
    holding, lent = Holding(), {"w": np.ones(100)}
    said = {"exchange": 1, "above": 1}
    holding.kept("site-1", said, pack_reply(1, Reply("site-1", Status.USED))[0], lent)
    holding.before_work()
    lent["w"][:] = 7.0
    source, _ = holding._kept[1, "site-1"]
    assert np.array_equal(pieces.of_piece(source.read(0, 800)).view(np.float64), np.ones(100))


def test_progress_is_told_to_the_end_of_every_large_transfer(
    monkeypatch: pytest.MonkeyPatch, small_pieces: None
) -> None:
    monkeypatch.setattr(freight, "_SHOWN", 100)
    monkeypatch.setattr(freight, "_PAUSE", 0.0)
    job = FedAvgRecipe(
        name="told",
        client=clients.Remembers,
        initial_parameters=clients.many_kinds,
        evaluate_every=0,
        federation=FederationConfig(num_clients=3, num_rounds=1),
    ).build()
    events: list[Event] = []
    engine = FlowerEngine(Grid(), NAMES)  # pyright: ignore[reportArgumentType]
    run = Run(job, engine, Hooks(observers=[events.append]))
    run.gather(task(), NAMES)
    told = [event for event in events if isinstance(event, TransferProgress)]
    for direction in ("down", "up"):
        for site in NAMES:
            steps = [e.done for e in told if (e.site, e.direction) == (site, direction)]
            assert steps == sorted(set(steps))
            assert len(steps) > 1
            assert steps[-1] == next(e.total for e in told if (e.site, e.direction) == (site, direction))


@pytest.mark.parametrize(("where", "shown"), [("none", 2), ("local", 2), ("central", 1)])
def test_how_long_an_update_is_that_only_a_sum_protects_is_told_to_nobody(where: str, shown: int) -> None:
    noise = GaussianMechanism(clip_norm=1.0, noise_multiplier=1.0, where="local" if where == "local" else "central")
    recipe = FedAvgRecipe(
        name="hidden",
        client=clients.Remembers,
        initial_parameters={"w": np.zeros(3, np.float32)},
        mechanisms=() if where == "none" else (noise,),
        federation=FederationConfig(num_clients=3, num_rounds=1),
    )
    events: list[Event] = []
    engine = FlowerEngine(Grid(), NAMES)  # pyright: ignore[reportArgumentType]
    Run(recipe.build(), engine, Hooks(observers=[events.append]))
    for direction in ("down", "up"):
        told = TransferProgress(site="site-1", direction=direction, done=1, total=2)
        engine._freight._listen(told)  # pyright: ignore[reportOptionalCall]
    assert len(events) == shown


class Remembered(BaseFederatedClient):
    """Looks whether what the site before it has sent is still there."""

    lends_arrays = True
    sent: ClassVar[list[weakref.ref[Any]]] = []
    alive: ClassVar[list[int]] = []

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        Remembered.alive.append(sum(ref() is not None for ref in Remembered.sent))
        updated = {"w": parameters["w"] + 1.0}
        Remembered.sent.append(weakref.ref(updated["w"]))
        return updated, 1, {}

    def evaluate(self, parameters: Parameters, config: Config) -> Evaluation:
        return 0.0, 1, {}


def test_an_update_is_gone_when_the_next_site_works() -> None:
    Remembered.sent.clear()
    Remembered.alive.clear()
    FedAvgRecipe(
        name="gone",
        client=Remembered,
        initial_parameters={"w": np.zeros(5)},
        federation=FederationConfig(num_clients=4, num_rounds=2),
    ).execute(SimEnv())
    assert Remembered.alive == [0] * 8


def test_shared_memory_that_is_left_keeps_what_lies_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_LARGE", 0)
    values = clients.many_kinds()
    published = shared.Published(shared.Layout.of(values))
    published.write(values)
    assert same(published._views, values)


def test_a_load_of_a_site_that_cannot_be_reached_is_a_failure(small_pieces: None) -> None:
    def gone(site: str, text: str, arrays: Parameters) -> int:
        raise ValueError("its node has left the federation")

    carried = Freight(gone, "life", lambda: 1)
    text, arrays = pack_task(1, task(), {"site-1": 0})
    failed = carried.load(1, "site-1", text, arrays)
    assert failed is not None
    assert (failed.status, failed.reason) == (Status.FAILED, "site-1: its node has left the federation")
    assert not isinstance(carried.came(1, "too late"), Ready)


@pytest.mark.parametrize(("seconds", "most"), [(0.1, 1), (0.5, 4)])
def test_where_answers_take_long_messages_carry_more_pieces(
    monkeypatch: pytest.MonkeyPatch, small_pieces: None, seconds: float, most: int
) -> None:
    class Watch:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

    monkeypatch.setattr(freight, "time", watch := Watch())
    waiting, sizes, model = dict[int, int](), list[int](), {"w": np.arange(4001.0)}
    target = Target(Source(model).nbytes)

    def post(site: str, text: str, arrays: Parameters) -> int:
        number = 1 + len(sizes)
        waiting[number] = json.loads(text)["load"][0]
        sizes.append(pieces.of_piece(arrays).size)
        target.write(waiting[number], pieces.of_piece(arrays))
        return number

    carried = Freight(post, "life", lambda: 1)
    assert carried.load(1, "site-1", json.dumps({"format": 1}), model) is None
    while waiting:
        assert len(waiting) <= 2
        number = min(waiting)
        watch.now += seconds
        carried.came(number, (json.dumps(ANSWER | {"site": "site-1", "at": waiting.pop(number)}), {}))
    assert max(sizes) == most * SIZE
    assert same(target.arrays(Source(model).said), model)


def test_sites_of_one_process_may_be_sent_other_pieces_of_the_same_model(small_pieces: None) -> None:
    model = {"w": np.arange(64.0)}
    source, target = Source(model), Target(512)
    for start, stop in ((0, SIZE), (0, 2 * SIZE), (SIZE, 4 * SIZE), (3 * SIZE, 512), (2 * SIZE, 3 * SIZE)):
        target.write(start, pieces.of_piece(source.read(start, stop)))
    assert target.done == 512
    assert same(target.arrays(source.said), model)
