"""What of a run leaves this machine with a job for provisioned sites: recipe, sites' program, the user's code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sfl.client.script_code import script_files, unplaced
from sfl.client.site import SiteProgram
from sfl.engine.launch import Launch
from sfl.env.modules import own_modules
from sfl.io.tree import save_tree, write_text
from sfl.recipe import FedAvgRecipe, Recipe
from sfl.server.job import Job
from sfl.train.model_source import ModelSource
from sfl.utils.plain import describe, names_in


@dataclass(frozen=True, slots=True)
class Cargo:
    """What travels.

    Attributes:
        recipe: The recipe, without paths of this machine.
        program: What every site runs, likewise.
        code: The user's own code: where it lies in the job's code, and where it lies here.
    """

    recipe: Recipe
    program: SiteProgram
    code: Mapping[str, Path]

    @classmethod
    def of(cls, recipe: Recipe, job: Job) -> Cargo:
        """From a recipe and what it builds.

        The initial parameters of a script's job are made here: neither a checkpoint nor the code of a model has to lie
        on the server.

        Raises:
            ConfigError: If something cannot travel, or a module cannot be found.
            ModelError: If the initial parameters cannot be made.
        """
        code: dict[str, Path] = {}
        if isinstance(recipe, FedAvgRecipe) and recipe.train_script is not None:
            script = Path(recipe.train_script).absolute()
            code |= script_files(script)
            source: ModelSource = recipe.model
            made = ModelSource(arrays=source(), is_torch=source.is_torch)
            recipe = replace(recipe, train_script=script.name, model=made, initial_ckpt=None)
        program = unplaced(job.program)
        named = names_in([describe(recipe, "the recipe"), describe(program, "the job")])
        for name, path in own_modules(named).items():
            code[name if path.is_dir() else f"{name}.py"] = path
        return cls(recipe, program, code)

    def write(self, launch: Launch, settings: Mapping[str, Any]) -> None:
        """Write what a job carries into ``launch``."""
        save_tree(launch.recipe, describe(self.recipe, "the recipe"))
        launch.write_program(self.program)
        code = {place: str(source) for place, source in self.code.items()}
        write_text(launch.settings, json.dumps({**settings, "code": code}, indent=1) + "\n")


def carried_settings(job: Job, device: str) -> dict[str, Any]:
    """What server and sites are told of a job: nothing of this machine."""
    federation = job.federation
    return {
        "names": [],
        "out": "",
        "resume": False,
        "sites": "",
        "workers": 1,
        "gpus": 0,
        "devices": [device],
        "num_clients": federation.num_clients,
        "threads": federation.threads,
        "job": job.name,
        "run": "",
    }
