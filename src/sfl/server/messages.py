"""What sites are sent, in fewer bits where the federation asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sfl.core import arrays, quantise
from sfl.core.task import Task
from sfl.types import StateTree

__all__ = ["lowered"]


def lowered(
    task: Task, form: str, memory: StateTree = None, *, remembers: bool = False
) -> tuple[Task, dict[str, Any] | None]:
    """The task with what travels of it; its parameters become what sites make of that.

    Args:
        task: Its parameters are packed once, for all sites that get it.
        form: As for ``quantise.packed``.
        memory: What the rounds before have left out.
        remembers: Whether that goes with this task, and what it leaves out with the next.

    Returns:
        The task, and what has been left out so far; ``None`` if nothing is remembered.

    Raises:
        UpdateError: If a parameter is NaN or inf.
    """
    left: dict[str, Any] | None = None
    if remembers:
        kept: Mapping[str, Any] | None = memory if isinstance(memory, dict) else None
        packed, received, left = quantise.remembering(task.parameters, kept, form)
    else:
        packed = quantise.packed(task.parameters, form)
        received = quantise.unpacked(packed, task.parameters)
    return replace(task, parameters=arrays.read_only(received), packed=packed), left
