"""Keys of homomorphic encryption, and sealed models, from the command line."""

from __future__ import annotations

import sys
from pathlib import Path

from sfl.cli.applications import APPLICATIONS, job_of_run, resolve_job
from sfl.engine.nvflare.federation import NAME
from sfl.errors import ConfigError

__all__ = ["keys", "open_model"]

_SERVER = "server"


def keys(sites: str, *, out: Path = Path("he-keys"), holder: str = "") -> int:
    """Make the keys of a federation's homomorphic encryption: one context for each site, one for the server.

    Args:
        sites: Names of the sites, comma-separated.
        out: Folder for the files; new or empty.
        holder: The one site that can decrypt; by default all sites share one secret key.
    """
    from sfl.io.tree import write_secret
    from sfl.privacy.he.contexts import CLIENT_CONTEXT, SERVER_CONTEXT, make_contexts

    names = [name.strip() for name in sites.split(",") if name.strip()]
    if not names or len(set(names)) < len(names) or not all(map(NAME.fullmatch, names)) or _SERVER in names:
        raise ConfigError(
            f"sites must be names of letters, digits and . @ _ -, each once, separated by commas, and none of them "
            f"{_SERVER}, got {sites!r}."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out must be a new or empty folder, got {out}. Choose another: keys are not written over.")
    server, contexts = make_contexts(names, holder)
    write_secret(out / _SERVER / SERVER_CONTEXT, server)
    for name, content in contexts.items():
        write_secret(out / name / CLIENT_CONTEXT, content)
    who = f"{holder} can decrypt" if holder else "every site can decrypt"
    sys.stdout.write(f"{len(names)} sites' contexts in {out}: {who}; the server's holds no key\n")
    sys.stdout.write("Put each into the kit of its owner (FLARE: startup; Flower: the folder that kit=... names).\n")
    return 0


def open_model(run: Path, *, context: Path | None = None, out: Path | None = None) -> int:
    """Decrypt the model of a run with a site's key.

    Args:
        run: Folder of the run, or a checkpoint of it.
        context: A site's client_context.tenseal; by default that of a run whose sites were all on this machine.
        out: A file for the parameters, in safetensors' format. By default the model of an application's run is written
            as at the end of any run, and that of another one into model.safetensors in its folder.
    """
    from safetensors.numpy import save_file

    from sfl.io.checkpoint import Checkpoints, load_state
    from sfl.io.run_folder import RunFolder
    from sfl.io.site_store import SecretStore
    from sfl.io.tree import writing
    from sfl.privacy.he import CKKS
    from sfl.privacy.he.opening import opened

    place = run if run.is_dir() else run.parent.parent if run.parent.name == "checkpoints" else run.parent
    folder = RunFolder(place)
    found = Checkpoints(folder.checkpoints).paths() if run.is_dir() else [run]
    if not found or not found[-1].is_file():
        raise ConfigError(f"run must be the folder of a run with checkpoints, or one of them, got {run}.")
    key = context.read_bytes() if context is not None else CKKS().key(SecretStore(folder.sites / "any"))
    parameters = opened(load_state(found[-1]).parameters, key)
    if out is None and folder.config.is_file():
        job = job_of_run(place)
        config = resolve_job(job, None, place, {}).config
        APPLICATIONS[job].load().export(config, parameters, folder, lambda text: sys.stdout.write(f"{text}\n"))
        return 0
    target = out or place / "model.safetensors"
    with writing(target):
        save_file(parameters, target)
    sys.stdout.write(f"{len(parameters)} arrays in {target}\n")
    return 0
