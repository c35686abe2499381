"""FLARE's controller as an engine: the loop runs in the server's job process, tasks are FLARE's own."""

from __future__ import annotations

import queue
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask
from nvflare.apis.controller_spec import Task as FlareTask
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from sfl.core.task import Reply, Status, Task
from sfl.engine.base import Engine
from sfl.engine.launch import Launch, resolve_server
from sfl.engine.nvflare.carried import bring_home, carried_by_server, given_launch
from sfl.engine.nvflare.messages import OTHER, TASKS, pack, unpack
from sfl.engine.wire import pack_task, read_answer
from sfl.errors import EngineError

EVENTS = "sfl.events"
"""Name under which an admin asks a running job for its events."""

_CHECK = 0.05  # seconds between two looks at the abort signal
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
        """Nothing to prepare."""

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """The whole job."""
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
        """Nothing is held."""

    def process_result_of_unknown_task(
        self, client: Client, task_name: str, client_task_id: str, result: Shareable, fl_ctx: FLContext
    ) -> None:
        """A site that was late: its round is over."""
        self.log_info(fl_ctx, f"late result of {task_name} from {client.name} left out")


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
        self._tasks: dict[int, FlareTask] = {}
        self._arrived: queue.SimpleQueue[tuple[int, str, Any]] = queue.SimpleQueue()
        self._aside: list[Reply] = []  # known, and not drawn

    def clients(self) -> list[str]:
        """Names of the planned sites, sorted."""
        return sorted(self._ids)

    def send(self, task: Task, clients: Sequence[str]) -> int:
        """Schedule one broadcast; sites fetch what stands for them in the order in which it was sent."""
        self._last += 1
        ticket = self._last

        def received(client_task: ClientTask, fl_ctx: FLContext) -> None:
            self._arrived.put((ticket, client_task.client.name, client_task.result))
            client_task.result = None  # the queue holds the only copy

        def done(task: FlareTask, fl_ctx: FLContext) -> None:
            self._arrived.put((ticket, "", str(getattr(task.completion_status, "value", task.completion_status))))

        data = pack(*pack_task(ticket, task, {site: self._ids[site] for site in clients}, self._life))
        name = TASKS.get(task.name, OTHER)
        flare_task = FlareTask(name=name, data=data, result_received_cb=received, task_done_cb=done)
        self._open[ticket], self._tasks[ticket] = set(clients), flare_task
        self._controller.broadcast(flare_task, self._context, targets=list(clients), min_responses=len(clients))
        return ticket

    def replies(self, timeout: float | None = None, *, ticket: int | None = None) -> Iterator[Reply]:
        """Replies as they arrive. A task that FLARE gives up fails the sites that have not answered.

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
                if self._abort.triggered:
                    raise EngineError("the job must run to its end, got an abort from FLARE. Its server log says why.")
                try:
                    self._take(*self._arrived.get(timeout=_CHECK))
                except queue.Empty:
                    if deadline is not None and time.monotonic() >= deadline:
                        return

    def _take(self, ticket: int, site: str, result: Any) -> None:
        """Note what has come: a site's result, or, without a site, the word that FLARE is through with a task."""
        waiting = self._open.get(ticket, set())
        if not site:
            for lost in sorted(waiting):
                reason = f"{lost}: FLARE gave its task up: {result}"
                self._aside.append(Reply(lost, Status.FAILED, reason=reason, ticket=ticket))
            waiting.clear()
        elif site in waiting:
            waiting.discard(site)
            self._aside.append(replace(_read(ticket, site, result), ticket=ticket))
        if not waiting:
            self._open.pop(ticket, None)
            self._tasks.pop(ticket, None)

    def cancel(self, ticket: int) -> None:
        """Forget what is outstanding of a ticket, and end its task for sites that have not fetched or answered it."""
        self._open.pop(ticket, None)
        task = self._tasks.pop(ticket, None)
        self._aside = [reply for reply in self._aside if reply.ticket != ticket]
        if task is not None and task.completion_status is None:
            self._controller.cancel_task(task)

    def describe(self) -> str:
        """The engine in words."""
        return self._what

    def close(self) -> None:
        """Leave no standing task behind."""
        for ticket in list(self._tasks):
            self.cancel(ticket)


def _read(ticket: int, site: str, result: Any) -> Reply:
    try:
        text, arrays = unpack(result)
    except ValueError as error:
        return Reply(site, Status.FAILED, reason=f"{site}: {error}")
    return read_answer(text, arrays, site, ticket)
