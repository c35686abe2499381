"""One run of an application, from a resolved configuration to the final model in its folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from sfl.application.config import RunConfig
from sfl.application.kept import Kept
from sfl.core.events import Event, Notice, Observer, RunStarted
from sfl.errors import ConfigError
from sfl.io.console import console_observer
from sfl.io.run_folder import RunFolder
from sfl.privacy.he.opening import opened
from sfl.privacy.he.packing import is_sealed
from sfl.privacy.runner_utils import calibrated
from sfl.recipe import Environment, Recipe
from sfl.train.devices import count_gpus, plan_workers
from sfl.train.pretrained import Pretrained
from sfl.train.sources import absolute
from sfl.types import Parameters
from sfl.utils.config import Resolved
from sfl.utils.logging import setup_logging

if TYPE_CHECKING:
    from sfl.application.workload import Workload

__all__ = ["Application", "MakeRecipe"]

C = TypeVar("C", bound=RunConfig)
CIn = TypeVar("CIn", bound=RunConfig, contravariant=True)


class MakeRecipe(Protocol[CIn]):
    """Makes an application's recipe."""

    def __call__(self, config: CIn, model: Pretrained, *, device: str = "cpu") -> Recipe:
        """The recipe of a configuration; ``device`` is where the server evaluates."""
        ...


@dataclass(frozen=True, kw_only=True)
class Application(Generic[C]):
    """What the command line runs under a name.

    Attributes:
        name: Its name.
        find_model: Decides which model is meant.
        workload: What is trained, of a configuration and a model. It loads torch, so it is called late.
        recipe: The job.
    """

    name: str
    find_model: Callable[[str | None], Pretrained]
    workload: Callable[[C, Pretrained], Workload[Any, Any]]
    recipe: MakeRecipe[C]

    def run(self, resolved: Resolved[C], env: Environment, *, resume: Path | None = None) -> int:
        """Run, or go on with the run in ``resume``.

        Args:
            resolved: The configuration and where each value came from.
            env: Where to run.
            resume: Folder of the run to go on with.

        Returns:
            The exit code: 0, also when the privacy budget ended the run.
        """
        config = resolved.config
        setup_logging(config.logging.format, config.logging.verbose, None)
        with console_observer(config.logging.format, config.logging.verbose) as console:
            model = self.find_model(config.client.model)
            console(Notice(text=model.why))
            pinned = self._pinned(config, model, resume)
            folder = RunFolder.existing(resume) if resume else RunFolder.create(Path(str(pinned.logging.out)))
            write_config = self._kept(folder, resume).begin(pinned, self.workload(pinned, model), resolved, console)

            def went_on(event: Event) -> None:
                if resume and isinstance(event, RunStarted):
                    write_config()

            try:
                recipe = self._recipe(pinned, model)
                result = recipe.execute(env, out=folder.path, resume=resume is not None, observers=(console, went_on))
                said = partial(_tell, console)
                self.export(pinned, result.parameters, folder, said, key=result.key)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(str(folder.path)) from None  # says which run can be resumed
            console(Notice(text=f"report: {folder.path / 'report.html'}"))
        return 0

    def begin(
        self, resolved: Resolved[C], say: Callable[[str], object], *, resume: Path | None = None
    ) -> tuple[Recipe, Path, Callable[[], None]]:
        """For who does not wait for a run: what is to run, and a folder for it with its configuration.

        Args:
            resolved: The configuration and where each value came from.
            say: Called with what a person should know.
            resume: Folder of the run to go on with.

        Returns:
            The recipe, the run's folder, and what to call once it is submitted: it writes down the flags of this call.
        """
        model = self.find_model(resolved.config.client.model)
        say(model.why)
        pinned = self._pinned(resolved.config, model, resume)
        folder = RunFolder.existing(resume) if resume else RunFolder.create(Path(str(pinned.logging.out)))
        workload = self.workload(pinned, model)
        kept = self._kept(folder, resume)
        write_config = kept.begin(pinned, workload, resolved, lambda event: _say_notice(event, say))
        return self._recipe(pinned, model), folder.path, write_config

    def job(self, config: C, say: Callable[[str], object]) -> Recipe:
        """The recipe alone, after a look at model and data."""
        if config.aggregation.attack is not None:
            raise ConfigError(
                f"attack must be none in a job for others, got {config.aggregation.attack}. Leave it out."
            )
        model = self.find_model(config.client.model)
        say(model.why)
        pinned = self._pinned(config, model, None)
        for line in self.workload(pinned, model).data()[1].warnings():
            say(line)
        return self._recipe(pinned, model)

    def export(
        self,
        config: C,
        parameters: Parameters,
        folder: RunFolder,
        say: Callable[[str], object],
        *,
        key: bytes | None = None,
    ) -> None:
        """Write the final model into a run's folder, and what it says into the report, if anybody here can read it.

        Args:
            config: The run's.
            parameters: As the server has them.
            folder: The run's.
            say: Called with what a person should know.
            key: What opens parameters that sites have sealed.
        """
        from sfl.application.server import WorkloadServer

        if is_sealed(parameters):
            if key is None:
                say(f"the model is sealed; who has a site's key opens it: sfl he open {folder.path} --context FILE")
                return
            say("the model is sealed; a site's key that is here has opened it")
            parameters = opened(parameters, key)
        model = self.find_model(config.client.model)
        server = WorkloadServer(workload=self.workload(config, model), device=_own_device(config))
        server.export(parameters, folder)
        say(f"model:  {folder.model}")

    def _kept(self, folder: RunFolder, resume: Path | None) -> Kept:
        return Kept(self.name, folder, resume=resume is not None)

    def _recipe(self, config: C, model: Pretrained) -> Recipe:
        return self.recipe(config, model, device=_own_device(config))

    def _pinned(self, config: C, model: Pretrained, resume: Path | None) -> C:
        """The configuration with everything that depends on today, this folder or the hub written out."""
        out = str(resume) if resume else config.logging.out or f"runs/{self.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        return replace(
            config,
            client=replace(config.client, model=model.name, data=absolute(config.client.data)),
            privacy=calibrated(config.privacy, config.federation),
            logging=replace(config.logging, out=out),
        )


def _own_device(config: RunConfig) -> str:
    """Where the server evaluates."""
    return plan_workers(1, 1, config.client.device, count_gpus(), 1)[0]


def _tell(console: Observer, text: str) -> None:
    console(Notice(text=text))


def _say_notice(event: Event, say: Callable[[str], object]) -> None:
    if isinstance(event, Notice):
        say(event.text)
