"""A site whose work is an ordinary training script."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol

from sfl.client.base import BaseFederatedClient
from sfl.client.inprocess import InProcessScript
from sfl.client.session import EVALUATE, STEPS, TRAIN, ScriptResult, ScriptSite, ScriptTask, logger
from sfl.core import rng
from sfl.core.terms import DRIFT, LEARNING_RATE, PROXIMAL
from sfl.errors import ConfigError, ScriptError, nearest
from sfl.types import ClientUpdate, Config, Evaluation, Parameters

ParamsFormat = Literal["numpy", "pytorch"]


@dataclass(frozen=True, kw_only=True)
class Script:
    """A training script and how it runs. Plain data: it travels to other processes as a dict.

    Attributes:
        path: The script's file.
        args: Its arguments.
        params_format: Whether it is handed numpy arrays or torch tensors.
        rounds: How many rounds the job has.
        job: The job's name.
        external: Whether it runs as a process of its own.
        command: What runs it then, such as ``torchrun --nproc_per_node=2``.
        close_timeout: Seconds in which it may end by itself when the job is over.
    """

    path: str
    args: tuple[str, ...] = ()
    params_format: ParamsFormat = "numpy"
    rounds: int | None = None
    job: str = ""
    external: bool = False
    command: str = "python3 -u"
    close_timeout: float = 3.0

    def __post_init__(self) -> None:
        if self.params_format not in ("numpy", "pytorch"):
            raise ConfigError(f"params_format must be numpy or pytorch, got {self.params_format!r}.")
        if not Path(self.path).is_file():
            raise ConfigError(f"the training script must be a file, got {self.path}. Give its path.")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Script:
        """From a plain dict.

        Raises:
            ConfigError: On an unknown key or a wrong value.
        """
        known = {field.name for field in fields(cls)}
        unknown = [name for name in given if name not in known]
        if unknown or "path" not in given:
            remedy = nearest(unknown[0], known) if unknown else "Add it."
            raise ConfigError(f"script must have a path and known keys, got {sorted(given)}. {remedy}")
        values: dict[str, Any] = {**given, "args": tuple(map(str, given.get("args", ())))}
        return cls(**values)


class RunningScript(Protocol):
    """One life of a script, in whichever process."""

    has_ended: bool

    def run(self, task: ScriptTask) -> ScriptResult:
        """Do one task."""
        ...

    def close(self, timeout: float) -> None:
        """Let it end, within ``timeout`` seconds."""
        ...


class ScriptClient(BaseFederatedClient):
    """Runs a training script as a site; every engine that runs clients runs scripts.

    A script that fails, or ends, starts anew with the next task, with the random state that the run's seed, the round
    and the site's name give it. What it keeps in variables is lost then, and by a resume.

    Args:
        client_id: Index of the site, from 0.
        device: Where the script should compute.
        script: The fields of ``Script``.
        **kwargs: None are known.

    Raises:
        ConfigError: If the script is not a file or a field is unknown.
    """

    lends_arrays = True  # what a script sent was copied when it sent it
    honours = frozenset({PROXIMAL, DRIFT, LEARNING_RATE})  # it is handed them; only the script knows what it does

    def __init__(self, client_id: int = 0, device: str = "cpu", *, script: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(client_id=client_id, device=device, **kwargs)
        self.script = Script.of(script)
        self._running: RunningScript | None = None
        self._has_warned: set[str] = set()

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        """What the script makes of the parameters; its weight is ``meta["NUM_STEPS_CURRENT_ROUND"]``, else 1.

        Raises:
            ScriptError: If the script failed, ended without an answer, or sent no parameters.
        """
        result = self._work(TRAIN, parameters, config)
        if result.parameters is None:
            raise ScriptError(f"{self._name} must answer a training task with params, got metrics alone.")
        self.travelled = result.travelled
        updated = _added(parameters, result.parameters) if result.is_diff else result.parameters
        if result.steps is None:
            self._warn_once(f'the script sent no meta["{STEPS}"]: its updates weigh 1')
        return updated, 1 if result.steps is None else result.steps, result.metrics

    def evaluate(self, parameters: Parameters, config: Config) -> Evaluation:
        """The figures that the script sends of the parameters; its ``loss`` metric, if any, is the loss.

        Raises:
            ScriptError: If the script failed or ended without an answer.
        """
        result = self._work(EVALUATE, parameters, config)
        if not result.metrics:
            self._warn_once("the script sent no metrics of the model that it was to evaluate")
        return result.metrics.get("loss"), 1 if result.steps is None else result.steps, result.metrics

    def close(self) -> None:
        """End the script: its loop sees ``is_running()`` become false, and has a moment to finish."""
        if self._running is not None:
            running, self._running = self._running, None
            running.close(self.script.close_timeout)

    @property
    def _name(self) -> str:
        return Path(self.script.path).name

    def _work(self, name: str, parameters: Parameters, config: Config) -> ScriptResult:
        if self._running is not None and self._running.has_ended:
            self._running = None
            raise ScriptError(
                f"{self._name} must go on while flare.is_running(), and had ended before this task. "
                "Put its rounds into a loop. It starts anew with the next task."
            )
        started = max(0, int(config.get("round", 1)) - 1)
        running = self._running = self._running or self._start(config)
        terms = self.terms.named() if name == TRAIN else {}
        task = ScriptTask(name=name, round=started, rounds=self.script.rounds, parameters=parameters, terms=terms)
        try:
            return running.run(task)
        except BaseException:
            self.close()
            raise

    def _start(self, config: Config) -> RunningScript:
        seed = rng.public_seed(int(config.get("seed", 0)), int(config.get("round", 0)), "script", self.site)
        site = ScriptSite(
            name=self.site,
            job=self.script.job,
            device=self.device,
            params_format=self.script.params_format,
            seed=seed,
        )
        path = Path(self.script.path).resolve()
        if self.script.external:
            from sfl.client.external import ExternalScript

            return ExternalScript(path, self.script.args, self.script.command, site)
        return InProcessScript(path, self.script.args, site)

    def _warn_once(self, text: str) -> None:
        if text not in self._has_warned:
            self._has_warned.add(text)
            logger.warning("%s: %s", self.site, text)


def _added(parameters: Parameters, diff: Parameters) -> Parameters:
    """The received parameters plus what the script sent; what cannot be added is left for the contract check."""
    return {
        name: (parameters[name] + value).astype(parameters[name].dtype, copy=False)
        if name in parameters and parameters[name].shape == value.shape and _same_kind(parameters[name], value)
        else value
        for name, value in diff.items()
    }


def _same_kind(one: Any, two: Any) -> bool:
    return (one.dtype.kind in "iub") == (two.dtype.kind in "iub")
