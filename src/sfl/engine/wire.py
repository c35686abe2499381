"""Tasks and replies as what a foreign engine carries: one JSON text, and named arrays beside it.

Nothing here trusts what arrives: a reply that cannot be read is a rejected reply, and no wire can claim that its arrays
were checked. No pickle.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sfl.core.task import Reply, Status, Task, Update
from sfl.errors import EngineError
from sfl.types import Config, Parameters

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Order:
    """One site's share of an exchange.

    Attributes:
        exchange: Number of the exchange, so that an answer to an earlier one is known as such.
        task: What to do.
        client_id: The site's index among all sites.
        life: Which life of the server sent it: after a crash and a resume it is another one.
    """

    exchange: int
    task: Task
    client_id: int
    life: str = ""


def pack_task(exchange: int, task: Task, clients: Mapping[str, int], life: str = "") -> tuple[str, Parameters]:
    """A task for all of ``clients`` (name to index): its text and its arrays."""
    text = {
        "format": FORMAT,
        "life": life,
        "exchange": exchange,
        "name": task.name,
        "round": task.round,
        "config": dict(task.config),
        "clients": dict(clients),
        "arrays": list(task.travels),
    }
    return json.dumps(text), task.travels


def unpack_task(text: str, parameters: Parameters, site: str) -> Order:
    """The task of ``site``.

    Raises:
        EngineError: If it is none of ours, or not for this site.
    """
    try:
        read: dict[str, Any] = json.loads(text)
        if read["format"] != FORMAT:
            raise EngineError(f"a task must have format {FORMAT}, got {read['format']}. Run one version everywhere.")
        config: Config = read["config"]
        task = Task(str(read["name"]), int(read["round"]), _ordered(parameters, read["arrays"]), config)
        return Order(int(read["exchange"]), task, int(read["clients"][site]), str(read["life"]))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise EngineError(f"{site}: a task must be one of ours, got {text!r:.80}: {error!r}.") from error


def pack_reply(exchange: int, reply: Reply) -> tuple[str, Parameters]:
    """A reply: its text and its arrays."""
    update = reply.update
    text = {
        "format": FORMAT,
        "exchange": exchange,
        "site": reply.site,
        "status": reply.status.value,
        "reason": reply.reason,
        "details": reply.details,
        "seconds": reply.seconds,
        "update": None if update is None else {"weight": update.weight, "metrics": update.metrics},
        "logs": list(reply.logs),
        "arrays": [] if update is None else list(update.delta),
    }
    return json.dumps(text), {} if update is None else update.delta


def unpack_reply(text: str, arrays: Parameters, site: str) -> tuple[int, Reply]:
    """The exchange that a reply belongs to, and the reply; one that cannot be read is rejected.

    Args:
        text: The text that arrived.
        arrays: The arrays that arrived.
        site: Who sent it, as the engine knows.
    """
    try:
        read: dict[str, Any] = json.loads(text)
        if read["format"] != FORMAT or read["site"] != site:
            raise ValueError(f"format {read['format']} of {read['site']!r}")
        given = read["update"]
        update = None
        if given is not None:
            metrics = {str(name): float(value) for name, value in given["metrics"].items()}
            update = Update(site, _ordered(arrays, read["arrays"]), float(given["weight"]), metrics)
        seconds = float(read["seconds"])
        reply = Reply(
            site,
            Status(read["status"]),
            update,
            reason=str(read["reason"]),
            seconds=seconds if math.isfinite(seconds) else 0.0,
            details=str(read["details"]),
            logs=tuple(map(str, read["logs"])),
        )
        return int(read["exchange"]), reply
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"{site}: a reply must be one of ours, got {text!r:.80}: {error!r}."
        return -1, Reply(site, Status.REJECTED, reason=reason)


def read_answer(text: str, arrays: Parameters, site: str, exchange: int) -> Reply:
    """The reply of ``site`` to this exchange; an answer to another one is rejected."""
    answered, reply = unpack_reply(text, arrays, site)
    if reply.status is not Status.REJECTED and answered != exchange:
        return Reply(site, Status.REJECTED, reason=f"{site}: answered exchange {answered}, not {exchange}.")
    return reply


def _ordered(arrays: Parameters, names: list[str]) -> Parameters:
    """Arrays in the order in which they were packed, which not every carrier keeps, and which norms depend on."""
    if sorted(names) != sorted(arrays):
        raise ValueError(f"{len(arrays)} arrays where {len(names)} were sent")
    return {name: arrays[name] for name in names}
