"""The ``sfl`` command. Importing it, and every ``--help``, loads nothing heavy: commands import what they run.

Exit codes: 0 the run ended well, 1 it failed, 2 an option, a config or the command line is wrong, 130 Ctrl-C.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sfl import __version__
from sfl.errors import ConfigError, SflError

if TYPE_CHECKING:
    from cyclopts import App

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
INTERRUPTED: Final = 130


def entry() -> None:
    """The console script: run the command line and exit with its code."""
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: Arguments without the program's name; by default those of the process.

    Returns:
        The exit code: 0, 1, 2 or 130, as the module says.
    """
    from cyclopts import CycloptsError

    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _app()(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except (CycloptsError, ConfigError) as error:
        return _say_error(str(error), USAGE)
    except SflError as error:
        return _say_error(str(error), FAILED)
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        return _say_error(str(error), FAILED)
    except KeyboardInterrupt as interrupt:
        go_on = f"; go on with: {_resume_command(Path(str(interrupt.args[0])))}" if interrupt.args else ""
        sys.stderr.write(f"\ninterrupted{go_on}\n")
        return INTERRUPTED
    return code if isinstance(code, int) else OK


def _app() -> App:
    """The tree of commands. Their functions are named, not imported, so that only the one that is called loads."""
    from cyclopts import App

    app = App(
        name="sfl",
        help="Federated learning whose privacy claim is part of the result.",
        version=__version__,
        help_format="plaintext",
        suppress_keyboard_interrupt=False,
    )
    run = App(name="run", help="Run a federated job.")
    run.command("sfl.cli.commands:esm2", help="Train ESM2, a protein language model, on several sites.")
    run.command("sfl.cli.commands:llm", help="Fine-tune a causal language model on several sites.")
    run.command("sfl.cli.commands:sum_demo", name="sum", help="Add up one number per site: the smallest federated job.")
    config = App(name="config", help="Look at the configuration.")
    config.command("sfl.cli.commands:show", help="Show every option, its value, and where the value comes from.")
    app.command("sfl.cli.provision:provision", help="Write the kits of a federation: certificates, scripts, policies.")
    submit = App(name="submit", help="Submit a job to a provisioned federation, and do not wait for it.")
    submit.command("sfl.cli.submit:esm2", help="Train ESM2, a protein language model, on several sites.")
    submit.command("sfl.cli.submit:llm", help="Fine-tune a causal language model on several sites.")
    submit.command("sfl.cli.submit:sum_demo", name="sum", help="Add up one number per site.")
    app.command("sfl.cli.export:export", help="Write a job as a FLARE job folder, for plain FLARE tools.")
    app.command("sfl.cli.jobs:status", help="Show a federation's server, sites and jobs.")
    app.command("sfl.cli.jobs:abort", help="End a job of a federation.")
    app.command("sfl.cli.jobs:download", help="Bring home what a submitted job has made.")
    privacy = App(name="privacy", help="Look at differential privacy.")
    privacy.command(
        "sfl.cli.privacy:plan", help="What noise a budget needs, or what noise costs, before anything runs."
    )
    app.command("sfl.cli.audit:audit", help="Measure a lower bound on a run's ε with canaries, beside its ledger's.")
    he = App(name="he", help="Homomorphic encryption: keys, and models that sites have sealed.")
    he.command("sfl.cli.encryption:keys", name="keys", help="Make the keys of a federation.")
    he.command("sfl.cli.encryption:open_model", name="open", help="Decrypt the model of a run with a site's key.")
    for tree in (run, submit, config, privacy, he, _poc()):
        app.command(tree)
    return app


def _poc() -> App:
    from cyclopts import App

    poc = App(name="poc", help="A federation on this machine to rehearse with, until it is stopped.")
    poc.command("sfl.cli.poc:prepare", help="Provision its server, sites and admin.")
    poc.command("sfl.cli.poc:start", help="Start server and sites, and wait until they are connected.")
    poc.command("sfl.cli.poc:status", help="Show which of them run, and their jobs.")
    poc.command("sfl.cli.poc:stop", help="End them, with all that they have started.")
    poc.command("sfl.cli.poc:clean", help="Remove its folder.")
    submit = App(name="submit", help="Submit a job to it, and do not wait for it.")
    submit.command("sfl.cli.poc:esm2", help="Train ESM2, a protein language model, on several sites.")
    submit.command("sfl.cli.poc:llm", help="Fine-tune a causal language model on several sites.")
    submit.command("sfl.cli.poc:sum_", name="sum", help="Add up one number per site.")
    poc.command(submit)
    return poc


def _resume_command(run: Path) -> str:
    from sfl.cli.applications import job_of_run

    return shlex.join(["sfl", "run", job_of_run(run), "--resume", str(run)])


def _say_error(message: str, code: int) -> int:
    from rich.console import Console

    console = Console(stderr=True, soft_wrap=True, markup=False, emoji=False, highlight=False)
    console.print(f"error: {' '.join(message.split())}", style="red")
    return code
