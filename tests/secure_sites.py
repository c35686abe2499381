"""A round of a secure sum in which a test plays the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sfl.core.secure import Step, Summing, Total
from sfl.core.task import Task, Update
from sfl.errors import ProtocolError, UpdateError


def played(summing: Summing, answer: Callable[[str, Task], Update | None], refused: dict[str, str]) -> Total:
    """What the server's half makes of it.

    Args:
        summing: The server's half.
        answer: What a site answers a task; ``None`` if it is lost.
        refused: Filled with what was wrong, by site: what it would not do, or what the server would not take.
    """

    def answers(step: Step) -> Iterator[Update]:
        for name, task in step.tasks.items():
            try:
                update = answer(name, task)
                if update is None:
                    continue
                step.check(update)
            except (ProtocolError, UpdateError) as error:
                refused[name] = str(error)
                continue
            yield update

    step = next(summing)
    while True:
        try:
            step = summing.send(answers(step))
        except StopIteration as end:
            return end.value
