"""The contract of a reply, checked on the site before it leaves and on the server when it arrives."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from sfl.core import arrays
from sfl.core.task import Update
from sfl.errors import UpdateError
from sfl.types import Array


def check_structure(site: str, got: object, expected: Mapping[str, Array], *, partial: bool = False) -> None:
    """Names, shapes and dtype kinds must be those of the parameters that were sent.

    Args:
        site: Named in the error.
        got: What the site returned.
        expected: The parameters it received.
        partial: Whether names may be missing (a transform dropped frozen layers).

    Raises:
        UpdateError: Naming the site, the array, what was expected and what was seen.
    """
    if not isinstance(got, Mapping):
        raise UpdateError(f"{site}: parameters must be a dict of named arrays, got {type(got).__name__}.")
    mapping: Mapping[object, object] = got  # pyright: ignore[reportUnknownVariableType]
    unexpected = [str(name) for name in mapping if name not in expected]
    missing = [] if partial else [name for name in expected if name not in mapping]
    if unexpected or missing:
        said = [f"missing {_names(missing)}"] if missing else []
        said += [f"unexpected {_names(unexpected)}"] if unexpected else []
        raise UpdateError(
            f"{site}: parameter names must be those that were sent ({len(expected)}), got {'; '.join(said)}. "
            "Return every array of `parameters` under its own name."
        )
    for name, value in mapping.items():
        _check_array(site, str(name), value, expected[str(name)])


def _check_array(site: str, name: str, value: object, like: Array) -> None:
    if not isinstance(value, np.ndarray):
        raise UpdateError(f"{site}: {name!r} must be a numpy array, got {type(value).__name__}.")
    if value.shape != like.shape:
        raise UpdateError(f"{site}: {name!r} must have shape {like.shape}, got {value.shape}.")
    if value.dtype.kind not in "fiub" or (like.dtype.kind in "iub") != (value.dtype.kind in "iub"):
        raise UpdateError(f"{site}: {name!r} must have a dtype like {like.dtype}, got {value.dtype}.")


def _names(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_finite(site: str, parameters: Mapping[str, Array]) -> None:
    """No array may hold NaN or inf.

    Raises:
        UpdateError: Naming the site and the first such array.
    """
    for name, value in parameters.items():
        if not arrays.is_finite(value):
            kind = "NaN" if bool(np.isnan(value).any()) else "inf"
            raise UpdateError(
                f"{site}: {name!r} must be finite, got {kind}. Lower the learning rate or look at the site's data."
            )


def check_count(site: str, count: object) -> int:
    """The number of examples must be a positive integer.

    Raises:
        UpdateError: Naming the site and what it returned.
    """
    if isinstance(count, bool) or not isinstance(count, int | np.integer) or int(count) < 1:
        raise UpdateError(f"{site}: num_examples must be a positive integer, got {count!r}.")
    return int(count)


def check_metrics(site: str, metrics: object) -> dict[str, float]:
    """Metrics must map names to numbers; non-finite numbers are kept and shown as they are.

    Raises:
        UpdateError: Naming the site and the metric.
    """
    if not isinstance(metrics, Mapping):
        raise UpdateError(f"{site}: metrics must be a dict of named numbers, got {type(metrics).__name__}.")
    mapping: Mapping[object, object] = metrics  # pyright: ignore[reportUnknownVariableType]
    clean: dict[str, float] = {}
    for name, value in mapping.items():
        if not isinstance(value, int | float | np.integer | np.floating):
            raise UpdateError(f"{site}: metric {name!r} must be a number, got {type(value).__name__}.")
        try:
            clean[str(name)] = float(value)
        except OverflowError:
            raise UpdateError(f"{site}: metric {name!r} must fit a float, got an integer past 1e308.") from None
    return clean


def check_update(update: Update, expected: Mapping[str, Array], *, known_finite: bool = False) -> None:
    """The server's own look at an update, whoever sent it: structure, finiteness, weight.

    Args:
        update: What arrived.
        expected: The parameters that were sent.
        known_finite: Skip the pass over the arrays: it was made on them already, on this machine.

    Raises:
        UpdateError: Naming the site and what broke the contract.
    """
    if not (math.isfinite(update.weight) and update.weight > 0):
        raise UpdateError(f"{update.site}: weight must be positive and finite, got {update.weight}.")
    check_structure(update.site, update.delta, expected, partial=True)
    if not known_finite:
        check_finite(update.site, update.delta)


def check_arrays(update: Update) -> None:
    """The server's look at the answer to a task of a workflow's own: named arrays of finite real numbers.

    Raises:
        UpdateError: Naming the site and what broke the contract.
    """
    if not (math.isfinite(update.weight) and update.weight > 0):
        raise UpdateError(f"{update.site}: weight must be positive and finite, got {update.weight}.")
    if not isinstance(update.delta, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UpdateError(f"{update.site}: arrays must be a dict of named arrays, got {type(update.delta).__name__}.")
    for name, value in update.delta.items():
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UpdateError(f"{update.site}: {name!r} must be an array of real numbers, got {value!r:.60}.")
    check_finite(update.site, update.delta)
