"""Every error SFL raises on purpose, as one tree.

    SflError
    ├── ConfigError (ValueError)       an option, a YAML key or an argument is wrong
    │   └── CompositionError           parts of a recipe do not fit together; raised before anything runs
    ├── DataError (ValueError)         a data file is missing, unreadable or holds nothing usable
    ├── ModelError                     a model cannot be found or loaded
    ├── MissingExtraError (ImportError) an optional dependency is not installed
    ├── UpdateError (ValueError)       a site's reply broke the contract (names the site)
    ├── ClientApiError (RuntimeError)  a training script called the Client API out of order
    ├── ScriptError                    a site's training script failed, or ended too early
    ├── RoundError                     a round ended with fewer usable replies than its minimum
    ├── ProtocolError                  a site was asked for a step of a protocol that it must not take
    ├── EngineError                    the engine lost a worker or could not carry a task
    ├── CheckpointError                no usable checkpoint, or one that is torn or edited
    └── LedgerError                    the privacy ledger is broken, edited or cannot be written
        └── BudgetExhausted            the next exchange would pass the privacy budget

Messages follow one form: what must be, what was seen, what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SflError(Exception):
    """Base of every error that SFL raises on purpose."""


class ConfigError(SflError, ValueError):
    """An option, a YAML key or an argument is wrong."""


class CompositionError(ConfigError):
    """Parts of a recipe do not fit together; raised by ``build()``, before anything runs."""


class DataError(SflError, ValueError):
    """A data file is missing, unreadable, or holds nothing usable."""


class ModelError(SflError):
    """A model cannot be found or loaded."""


class MissingExtraError(SflError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} must be installed for this, and it is not. Run: pip install 'sfl[{extra}]'")
        self.package = package
        self.extra = extra

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str]]:
        """Pickle by the arguments of ``__init__``: an error must survive the way out of a worker process."""
        return type(self), (self.package, self.extra)


class UpdateError(SflError, ValueError):
    """A site's reply broke the contract; the message names the site."""


class ClientApiError(SflError, RuntimeError):
    """A training script called the Client API out of order, or with what cannot be sent."""


class ScriptError(SflError):
    """A site's training script failed, or ended too early. Its own error is the cause, or among the notes."""


class RoundError(SflError):
    """A round ended with fewer usable replies than its minimum."""


class ProtocolError(SflError):
    """A site was asked for a step of a protocol that it must not take; it sends nothing."""


class EngineError(SflError):
    """The engine lost a worker or could not carry a task."""


class CheckpointError(SflError):
    """There is no usable checkpoint, or one is torn or edited."""


class LedgerError(SflError):
    """The privacy ledger is broken, edited, or cannot be written."""


class BudgetExhausted(LedgerError):  # noqa: N818 - a run that ends at its budget ends normally
    """The next exchange would pass the privacy budget; the run ends normally before it."""


def check_rules(rules: Iterable[tuple[str, object, bool, str]]) -> None:
    """Refuse the first option whose rule does not hold.

    Args:
        rules: Name, value, whether it holds, and the rule in words.

    Raises:
        ConfigError: If there is one.
    """
    for name, value, holds, rule in rules:
        if not holds:
            raise ConfigError(f"{name} must be {rule}, got {value!r}.")


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy for a mistyped name: the nearest known one, or all of them.

    >>> nearest("num_round", ["num_rounds", "seed"])
    "Did you mean 'num_rounds'?"
    """
    choices = sorted(known)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"Known: {', '.join(choices)}."
