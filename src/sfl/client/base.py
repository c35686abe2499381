"""The typed base for anyone's own client."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from sfl.core.mechanism import DpEvent
from sfl.core.terms import NO_TERMS
from sfl.types import ClientUpdate, Config, Evaluation, Parameters


class BaseFederatedClient(ABC):
    """One site's training code. Subclass it, implement two methods, hand the class to a recipe.

    Example:
        >>> import numpy as np
        >>> class Mean(BaseFederatedClient):
        ...     def compute_update(self, parameters, config):
        ...         return {"w": parameters["w"] + 1.0}, 10, {"loss": 0.5}
        ...     def evaluate(self, parameters, config):
        ...         return float(parameters["w"].sum()), 10, {}
        >>> Mean(client_id=3).client_id
        3

    Attributes:
        client_id: Index of the site, from 0.
        site: Its name, e.g. ``"site-1"``; set by the engine before the first task.
        device: Where it should compute.
        state: What this site must remember from one round to the next (arrays, numbers, strings, in dicts and lists).
            It is checkpointed with the run after ``compute_update``; ``evaluate`` only reads it. Anything kept
            elsewhere on ``self`` is lost by a resume, and after a task that failed.
        terms: What the run's algorithm adds to this site's training; set by the engine before ``compute_update``.
        travelled: The sum of the learning rates of the last ``compute_update``'s steps, for algorithms that ask how
            far a site went (SCAFFOLD); such a client sets it.
        honours: Which ``terms`` the client's training heeds: of ``"proximal"``, ``"drift"``, ``"learning_rate"``. An
            algorithm that needs others is refused.
        lends_arrays: Whether the arrays that ``compute_update`` returns may be overwritten by the caller. A client
            that trains a resident model sets it, and spares one copy of the model; no two of the arrays may then
            share memory.
        worker_imports: A tuple of modules that take long to import and that every site will use. Where sites are
            spread over worker processes, they are imported once, before the workers fork (for the first job of a
            process). Importing one must start no thread of Python's and touch no GPU.
    """

    lends_arrays: ClassVar[bool] = False
    worker_imports: ClassVar[tuple[str, ...]] = ()
    honours: frozenset[str] = frozenset()

    def __init__(self, client_id: int = 0, device: str = "cpu", **kwargs: Any) -> None:
        """Take the identity that the engine hands out.

        Raises:
            TypeError: On a keyword that no class on the way consumed; almost always a misspelling.
        """
        if kwargs:
            names = ", ".join(sorted(kwargs))
            raise TypeError(f"{type(self).__name__} got unexpected arguments: {names}. Consume them in __init__.")
        self.client_id = client_id
        self.device = device
        self.site = f"site-{client_id + 1}"
        self.state: dict[str, Any] = {}
        self.terms = NO_TERMS
        self.travelled = 0.0

    @abstractmethod
    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        """Train locally.

        Args:
            parameters: The global parameters; read-only, shared by all clients of a worker, and valid until this
                method returns: copy what you keep.
            config: ``round``, ``seed`` and the recipe's own scalars.

        Returns:
            The updated parameters (same names and shapes), the positive number of examples, and metrics.
        """

    @abstractmethod
    def evaluate(self, parameters: Parameters, config: Config) -> Evaluation:
        """Evaluate the parameters on local held-out data: mean loss, over how many examples, metrics.

        A client that has no loss returns ``None`` in its place.
        """

    def privacy_event(self, config: Config) -> DpEvent | None:
        """What the training of this task costs each example of this site; ``None`` if it promises nothing.

        The site writes it to its own ledger before ``compute_update`` is called, and does not call it where the budget
        would be passed. It must follow from the configuration and the number of examples alone.
        """
        return None

    def run_task(self, name: str, parameters: Parameters, config: Config) -> ClientUpdate:
        """Do a task of a workflow's own, which is neither training nor evaluation.

        Returns:
            Named arrays of any shape, the positive number of examples behind them, and metrics. They leave as they
            are: a job with protections refuses such tasks.

        Raises:
            NotImplementedError: Unless a subclass knows the task.
        """
        raise NotImplementedError(f"{type(self).__name__}.run_task must be defined to do {name!r}.")

    def close(self) -> None:  # noqa: B027 - most clients hold nothing that outlives them
        """Let go of what outlives this object, such as a process. Called when the site is done; safe to call twice."""
