"""FLARE's controller as an engine: the loop runs in the server's job process, tasks are FLARE's own."""

from __future__ import annotations

import gc
import json
import queue
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask
from nvflare.apis.controller_spec import Task as FlareTask
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from sfl.core.events import TransferProgress
from sfl.core.task import Reply, Status, Task
from sfl.engine.base import Engine
from sfl.engine.freight import Freight, Key, Ready
from sfl.engine.kit import use_server_kit
from sfl.engine.launch import Launch, resolve_server
from sfl.engine.nvflare.carried import bring_home, carried_by_server, given_launch
from sfl.engine.nvflare.messages import OTHER, TASKS, pack, unpack
from sfl.engine.ports import own_ports
from sfl.engine.wire import pack_task, read_answer
from sfl.errors import EngineError
from sfl.types import Parameters

EVENTS = "sfl.events"
"""Name under which an admin asks a running job for its events."""

_CHECK = 0.05  # seconds between two looks at the abort signal
_SWEPT = 16  # pieces after which circles are swept: what FLARE keeps of a message refers to itself, the piece in it
_MOST_EVENTS = 1 << 20  # bytes of events in one answer


class SflController(Controller):
    """Runs one job of SFL as a FLARE workflow.

    Args:
        launch: The folder of the run; empty if the job carries it.
        what: The engine in words.
    """

    def __init__(self, launch: str, what: str = "NVIDIA FLARE") -> None:
        super().__init__(task_check_period=_CHECK)
        self._launch, self._what = launch, what

    def start_controller(self, fl_ctx: FLContext) -> None:
        """No site of a simulator, whoever started it, is to lose its port to another process."""
        keep_ports()

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """The whole job."""
        use_server_kit(cast("Any", fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)).get_startup_kit_dir())
        launch = given_launch(self._launch) if self._launch else carried_by_server(fl_ctx)
        cast("Any", fl_ctx.get_engine()).register_app_command(EVENTS, partial(_events_since, launch))
        names = list(launch.read_settings()["names"])
        resolve_server()(launch, lambda: FlareEngine(self, fl_ctx, abort_signal, names, self._what))
        if not self._launch:
            bring_home(launch)
            self._must_have_ended_well(launch)

    def _must_have_ended_well(self, launch: Launch) -> None:
        """Let FLARE, and whoever asks it, know that the job has failed.

        Raises:
            EngineError: With the job's own words.
        """
        error = launch.read_error()
        if error:
            raise EngineError(error)

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Nothing is held.

        FLARE now imports torch, which takes seconds, to look for tensors that it is still sending. There are none.
        """
        sys.modules.setdefault("nvflare.app_opt.pt.tensor_downloader", cast("Any", None))  # what cannot be imported

    def process_result_of_unknown_task(
        self, client: Client, task_name: str, client_task_id: str, result: Shareable, fl_ctx: FLContext
    ) -> None:
        """A site that was late: its round is over."""
        self.log_info(fl_ctx, f"late result of {task_name} from {client.name} left out")


def keep_ports() -> None:
    """In a process that is FLARE's simulator, give each site a port that is its own.

    FLARE closes a port before it gives it out: another site or process may have it by then, and its site is lost, for
    which a run without a limit of time waits for good.
    """
    runner = sys.modules.get("nvflare.private.fed.app.simulator.simulator_runner")
    if runner is not None:
        cast("Any", runner).get_open_ports = own_ports


def _events_since(launch: Launch, topic: str, data: Any, fl_ctx: FLContext) -> dict[str, Any]:
    """FLARE's answer to an admin who asks how the job goes: the lines of events past an offset."""
    offset = int((data or {}).get("offset", 0))
    if not launch.events.exists():
        return {"text": "", "offset": offset}
    with launch.events.open("rb") as file:
        file.seek(offset)
        text = file.read(_MOST_EVENTS)
    whole = text[: text.rfind(b"\n") + 1]
    return {"text": whole.decode(), "offset": offset + len(whole)}


class FlareEngine(Engine):
    """Carries tasks as broadcasts of a FLARE controller.

    Args:
        controller: Whose tasks they are.
        context: FLARE's context of the job.
        abort: Triggered when the job is aborted.
        names: The planned sites, in the order of their ``client_id``.
        what: The engine in words.
    """

    def __init__(
        self, controller: Controller, context: FLContext, abort: Signal, names: Sequence[str], what: str
    ) -> None:
        self._controller, self._context, self._abort, self._what = controller, context, abort, what
        self._ids = {name: index for index, name in enumerate(names)}
        self._last, self._life = 0, secrets.token_hex(8)
        self._open: dict[int, set[str]] = {}  # by ticket, the sites that have not answered
        self._tasks: dict[Key, list[FlareTask]] = {}  # by ticket, or of a piece
        self._behind: list[tuple[int, Task, str]] = []  # each waits until what was sent before is at its site
        self._arrived: queue.SimpleQueue[tuple[Key, str, Any]] = queue.SimpleQueue()
        self._aside: list[Reply] = []  # known, and not drawn
        self._posted = self._answered = 0  # pieces
        self._freight = Freight(self._post, self._life, self._oldest)

    def clients(self) -> list[str]:
        """Names of the planned sites, sorted."""
        return sorted(self._ids)

    def send(self, task: Task, clients: Sequence[str]) -> int:
        """Schedule one broadcast; sites fetch what stands for them in the order in which it was sent."""
        self._last += 1
        self._open[self._last] = set(clients)
        self._behind += [(self._last, task, site) for site in clients]
        self._go_on()
        return self._last

    def _go_on(self) -> None:
        """Send what waits for a site to which nothing is being loaded, what is the same for several at once."""
        loading, waiting = self._freight.loading(), self._behind
        self._behind, free = [], dict[int, tuple[Task, list[str]]]()
        for ticket, task, site in waiting:
            if site in loading:
                self._behind.append((ticket, task, site))
            else:
                free.setdefault(ticket, (task, []))[1].append(site)
                if self._freight.is_large(task.parameters):
                    loading.add(site)
        for ticket, (task, sites) in free.items():
            self._push(ticket, task, sites)

    def _push(self, ticket: int, task: Task, sites: Sequence[str]) -> None:
        text, arrays = pack_task(ticket, task, {site: self._ids[site] for site in sites}, self._life)
        text = self._freight.text(text, task, ticket)
        if not self._freight.is_large(arrays):
            self._broadcast(ticket, sites, TASKS.get(task.name, OTHER), pack(text, arrays))
            return
        for site in sites:
            self._freight.load(ticket, site, text, arrays)

    def _broadcast(self, key: Key, sites: Sequence[str], name: str, data: Shareable) -> None:
        """Schedule a task of FLARE's; what comes of it is queued under ``key``."""

        def received(client_task: ClientTask, fl_ctx: FLContext) -> None:
            self._arrived.put((key, client_task.client.name, client_task.result))
            client_task.result = None  # the queue holds the only copy

        def done(task: FlareTask, fl_ctx: FLContext) -> None:
            why = str(getattr(task.completion_status, "value", task.completion_status))
            for site in sites:
                self._arrived.put((key, site, why))

        task = FlareTask(name=name, data=data, result_received_cb=received, task_done_cb=done)
        self._tasks.setdefault(key, []).append(task)
        if not isinstance(key, int):  # of a piece that is broadcast, FLARE would make a copy
            self._controller.send(task, self._context, targets=list(sites))
        else:
            self._controller.broadcast(task, self._context, targets=list(sites), min_responses=len(sites))

    def _post(self, site: str, text: str, arrays: Parameters) -> Key:
        """Schedule what carries a piece, or asks for one."""
        self._posted += 1
        key = (site, self._posted)
        self._broadcast(key, [site], OTHER, pack(text, arrays))
        return key

    def _oldest(self) -> int:
        """The oldest ticket of which something is outstanding."""
        return min({self._last, *self._open, *self._freight.tickets()})

    def replies(self, timeout: float | None = None, *, ticket: int | None = None) -> Iterator[Reply]:
        """Replies as they arrive. A task that FLARE gives up fails the sites that have not answered.

        Raises:
            EngineError: If the job is aborted.
        """
        for reply in self.incoming(timeout, ticket=ticket):
            yield self.drawn(reply, timeout)

    def incoming(self, timeout: float | None = None, *, ticket: int | None = None) -> Iterator[Reply]:
        """See ``Engine.incoming``.

        Raises:
            EngineError: If the job is aborted.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            for at, reply in enumerate(self._aside):
                if ticket in (None, reply.ticket):
                    del self._aside[at]
                    yield reply
                    break
            else:
                if not (self._open if ticket is None else ticket in self._open):
                    return
                if not self._pump() and deadline is not None and time.monotonic() >= deadline:
                    return

    def drawn(self, reply: Reply, timeout: float | None = None) -> Reply:
        """See ``Engine.drawn``."""
        return self._freight.whole(reply, self._pump, timeout)

    def watch(self, listener: Callable[[TransferProgress], object]) -> None:
        """See ``Engine.watch``."""
        self._freight.tell(listener)

    def _pump(self) -> bool:
        """Note what comes next; whether anything has come."""
        if self._abort.triggered:
            raise EngineError("the job must run to its end, got an abort from FLARE. Its server log says why.")
        try:
            self._take(*self._arrived.get(timeout=_CHECK))
        except queue.Empty:
            return False
        return True

    def _take(self, key: Key, site: str, result: Any) -> None:
        """Note what has come: a site's result, or the word that FLARE is through with its task."""
        content = f"FLARE gave its task up: {result}" if isinstance(result, str) else _content(result)
        if not isinstance(key, int):
            self._carried(key, content)
        elif site in self._open.get(key, set()):
            self._end(self._read(key, site, content))

    def _carried(self, key: Key, answer: tuple[str, Parameters] | str) -> None:
        self._tasks.pop(key, None)
        self._answered += 1
        if self._answered % _SWEPT == 0:
            gc.collect()
        follows = self._freight.came(key, answer)
        if isinstance(follows, Ready):
            name = TASKS.get(json.loads(follows.text)["name"], OTHER)
            self._broadcast(follows.ticket, [follows.site], name, pack(follows.text, {}))
        elif follows is not None:
            self._end(follows)
        if follows is not None:
            self._go_on()

    def _end(self, reply: Reply) -> None:
        """A site has answered a ticket, in whatever way."""
        waiting = self._open.get(reply.ticket, set())
        waiting.discard(reply.site)
        self._aside.append(reply)
        if not waiting:
            self._open.pop(reply.ticket, None)
            self._tasks.pop(reply.ticket, None)

    def _read(self, ticket: int, site: str, content: tuple[str, Parameters] | str) -> Reply:
        if isinstance(content, str):
            return Reply(site, Status.FAILED, reason=f"{site}: {content}", ticket=ticket)
        noted = self._freight.noted(ticket, site, content[0])
        return noted or replace(read_answer(*content, site, ticket), ticket=ticket)

    def cancel(self, ticket: int) -> None:
        """Forget what is outstanding of a ticket, and end its task for sites that have not fetched or answered it."""
        self._open.pop(ticket, None)
        self._behind = [entry for entry in self._behind if entry[0] != ticket]
        self._freight.cancel(ticket)
        self._aside = [reply for reply in self._aside if reply.ticket != ticket]
        wanted = {*self._open, *self._freight.keys}
        for key in [key for key in self._tasks if key not in wanted]:
            for task in self._tasks.pop(key):
                if task.completion_status is None:
                    self._controller.cancel_task(task)
        self._go_on()

    def describe(self) -> str:
        """The engine in words."""
        return self._what

    def close(self) -> None:
        """Leave no standing task behind."""
        for ticket in (*self._open, self._last):
            self.cancel(ticket)


def _content(result: Any) -> tuple[str, Parameters] | str:
    """The text and the arrays of a result, or why there are none."""
    try:
        return unpack(result)
    except ValueError as error:
        return str(error)
