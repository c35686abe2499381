"""``@flare.train`` and ``@flare.evaluate``, for scripts written with them; a loop says the same more plainly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

from sfl.client import api
from sfl.client.session import Session, current, no_init
from sfl.errors import ClientApiError
from sfl.types import FLModel

__all__ = ["evaluate", "train"]

_figures: WeakKeyDictionary[Session, Mapping[str, Any]] = WeakKeyDictionary()
"""What an evaluation found of the received model, until the trained one is sent."""

Function = Callable[..., Any]


def train(function: Function | None = None, **_options: Any) -> Any:
    """Let a function be given the received model as its first argument, and send the ``FLModel`` that it returns.

    Args:
        function: The function; its other arguments are the caller's.
        **_options: Taken for compatibility.

    Raises:
        ClientApiError: When it is called, if it returns no ``FLModel``.
    """

    def call(work: Function, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        model = _given_the_received(work, args, options)
        if not hasattr(model, "params"):
            raise ClientApiError(f"{work.__name__}() must return an FLModel, got {type(model).__name__}.")
        found = _figures.pop(_session("train"), None)
        model.metrics = model.metrics if found is None else dict(found)
        api.send(model)
        return model

    return _decorated(function, call)


def evaluate(function: Function | None = None, **_options: Any) -> Any:
    """Let a function be given the received model; the figures that it returns go with the trained model, or alone.

    Args:
        function: The function, called before the one that trains; its other arguments are the caller's.
        **_options: Taken for compatibility.

    Raises:
        ClientApiError: When it is called, if it returns no dict of figures.
    """

    def call(work: Function, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        figures = _given_the_received(work, args, options)
        if not isinstance(figures, Mapping):
            raise ClientApiError(f"{work.__name__}() must return a dict of figures, got {type(figures).__name__}.")
        if api.is_train():
            _figures[_session("evaluate")] = figures
        else:
            api.send(FLModel(metrics=dict(figures)))
        return figures

    return _decorated(function, call)


def _decorated(function: Function | None, call: Callable[[Function, tuple[Any, ...], dict[str, Any]], Any]) -> Any:
    def decorate(work: Function) -> Function:
        @functools.wraps(work)
        def wrapper(*args: Any, **options: Any) -> Any:
            return call(work, args, options)

        return wrapper

    return decorate if function is None else decorate(function)


def _given_the_received(work: Function, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    first = next(iter(signature(work).parameters))
    others = {name: value for name, value in options.items() if name != first}
    return work(api.receive(), *args[1:], **others)


def _session(called: str) -> Session:
    session = current()
    if session is None:
        raise no_init(called)
    return session
