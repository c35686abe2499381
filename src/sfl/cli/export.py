"""Writing a job as a FLARE job folder, for plain FLARE tools."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from sfl.cli.applications import APPLICATIONS, CONFIGS, resolve_job
from sfl.cli.commands import warn
from sfl.cli.options import with_options
from sfl.errors import ConfigError
from sfl.types import FederationConfig, site_names
from sfl.utils.config import options_of

if TYPE_CHECKING:
    from sfl.recipe import Recipe

Output = Annotated[Path, Parameter(help="The job's folder; made anew.")]
Sites = Annotated[str, Parameter(help="Names of the sites, comma-separated; by default site-1, site-2 …")]
JobName = Annotated[Literal["esm2", "llm", "sum"], Parameter(help="The job, unless a training script is given.")]
CustomCode = Annotated[
    bool,
    Parameter(
        help="Whether the job is one with custom code even if it brings none: FLARE then builds SFL's components "
        "wherever the admin may bring code. Without, it builds them where a site's policy names them, as "
        "`sfl provision` writes it."
    ),
]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ScriptOptions:
    """A training script instead of a job of SFL's.

    Attributes:
        train_script: A script that uses the Client API; every site runs it.
        train_args: Its arguments, as one line.
        model_class: Where it begins: a torch module's class, such as pkg.mod.Net.
        initial_ckpt: Where it begins: a safetensors or .pt file of tensors.
        launch_external_process: Whether it runs as a process of its own.
    """

    train_script: Path | None = None
    train_args: Annotated[str, Parameter(allow_leading_hyphen=True)] = ""
    model_class: str = ""
    initial_ckpt: Path | None = None
    launch_external_process: bool = False

    def recipe(self, federation: FederationConfig) -> Recipe:
        """The recipe that runs it."""
        from sfl.recipe import FedAvgRecipe

        script = Path(str(self.train_script))
        return FedAvgRecipe(
            name=script.stem,
            federation=federation,
            train_script=str(script),
            train_args=self.train_args,
            model={"class_path": self.model_class} if self.model_class else None,
            initial_ckpt=None if self.initial_ckpt is None else str(self.initial_ckpt),
            launch_external_process=self.launch_external_process,
        )


_NO_SCRIPT = ScriptOptions()


def _export(
    *,
    output: Output,
    job: JobName = "esm2",
    sites: Sites = "",
    script: ScriptOptions = _NO_SCRIPT,
    custom_code: CustomCode = True,
    **overrides: object,
) -> int:
    """Write a job as a FLARE job folder, for plain FLARE tools to run or submit."""
    if script.train_script is None and script != _NO_SCRIPT:
        raise ConfigError("a script's options must come with --train-script, got none.")
    recipe, device = _recipe(job, script, overrides)
    from sfl.env.production import export_job

    count = recipe.resolved().federation.num_clients
    names = tuple(sorted(name.strip() for name in sites.split(","))) if sites else site_names(count)
    if len(set(names)) != count or not all(names):
        raise ConfigError(f"sites must be {count} different names, as num_clients, got {', '.join(names)}.")
    made = export_job(recipe, output, names, device=device, custom_code=custom_code)
    sys.stdout.write(
        f"{recipe.name} for {', '.join(names)} is in {made}; run it with plain FLARE:\n"
        f"  nvflare simulator {output} -w {output}-workspace -c {','.join(names)} -t {count}\n"
        f"  nvflare job submit -j {output} --startup-kit KIT\n"
    )
    return 0


export = with_options(CONFIGS, _export)


def _recipe(job: str, script: ScriptOptions, overrides: dict[str, object]) -> tuple[Recipe, str]:
    """The recipe, and the device of its sites."""
    applied = script.train_script is None and job in APPLICATIONS
    resolved = resolve_job(job if applied else "esm2", None, None, overrides)
    federation, device = resolved.config.federation, resolved.config.client.device
    if applied:
        return APPLICATIONS[job].load().job(resolved.config, warn), device
    options = options_of(APPLICATIONS["esm2"].config)
    odd = [options[name].flag for name in overrides if options[name].section == "client" and name != "device"]
    if odd:
        raise ConfigError(f"{', '.join(odd)} must come with the job esm2 or llm, got another. Leave it out.")
    if script.train_script is not None:
        return script.recipe(federation), device
    from sfl.server.app import sum_recipe

    return sum_recipe(num_clients=federation.num_clients, num_rounds=federation.num_rounds), device
