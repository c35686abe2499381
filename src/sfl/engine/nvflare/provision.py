"""Kits for a FLARE federation, made with FLARE's own builders: certificates, scripts, and a policy with our names."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any

from nvflare.lighter.constants import CtxKey, ProvisionMode
from nvflare.lighter.entity import Project, participant_from_dict
from nvflare.lighter.impl.cert import CertBuilder
from nvflare.lighter.impl.signature import SignatureBuilder
from nvflare.lighter.impl.static_file import StaticFileBuilder
from nvflare.lighter.impl.workspace import WorkspaceBuilder
from nvflare.lighter.provisioner import Provisioner

from sfl.engine.nvflare.federation import Federation
from sfl.engine.nvflare.policy import allow_components, store_jobs_in
from sfl.errors import ConfigError, EngineError, MissingExtraError
from sfl.io.tree import write_secret
from sfl.privacy.he.contexts import CLIENT_CONTEXT, SERVER_CONTEXT, make_contexts

_LOOPBACK = ("localhost", "127.0.0.1")
_STORAGE = Path("/tmp/nvflare")


def provision(federation: Federation, folder: Path, *, storage: Path | None = None) -> Path:
    """Write one kit for each participant.

    The certificate authority's private key stays in ``folder/<project>/state``: keep that on the machine of whoever
    provisions. Provisioning again with the same folder keeps the authority and makes new kits.

    Args:
        federation: Who takes part.
        folder: Where the project's folder is made.
        storage: Where the server will keep jobs and snapshots; by default a folder beside FLARE's that no other
            authority's federation shares, ``/tmp/nvflare/<project>-<authority>``: a server runs the jobs it finds.

    Returns:
        The folder that holds a kit under each participant's name.

    Raises:
        ConfigError: If FLARE refuses a participant.
        EngineError: If it cannot build the kits.
    """
    builders = [WorkspaceBuilder(), StaticFileBuilder(config_folder="config"), CertBuilder(federation.valid_days)]
    project = Project(name=federation.name, description="", props={"api_version": 3})
    for definition in _participants(federation):
        try:
            project.add_participant(participant_from_dict(definition))
        except ValueError as error:
            raise ConfigError(f"FLARE must accept every participant, got: {error}. Rename it.") from error
    said = io.StringIO()
    before = os.umask(0o077)  # keys, the authority's among them, are for this user alone
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            context = Provisioner(str(folder), [*builders, SignatureBuilder()]).provision(project, ProvisionMode.NORMAL)
    finally:
        os.umask(before)
    made = context.get(CtxKey.CURRENT_PROD_DIR)
    if context.get(CtxKey.BUILD_ERROR) or not made:
        raise EngineError(f"FLARE must be able to provision {federation.name}, got:\n{said.getvalue()}")
    kits = Path(str(made))
    for participant in (federation.server, *federation.sites):
        allow_components(kits / participant.name / "local")
    if federation.server.host in _LOOPBACK:
        _listen_on(federation.server.host, kits / federation.server.name / "startup" / "fed_server.json")
    _add_contexts(federation, kits)
    authority = (kits / federation.server.name / "startup" / "rootCA.pem").read_bytes()
    own = _STORAGE / f"{federation.name}-{hashlib.sha256(authority).hexdigest()[:12]}"
    store_jobs_in(kits / federation.server.name / "local", storage or own)
    return kits


def _add_contexts(federation: Federation, kits: Path) -> None:
    """Keys of homomorphic encryption, where the library for them is there."""
    try:
        server, sites = make_contexts([member.name for member in federation.sites], federation.he_holder)
    except MissingExtraError:
        if federation.he_holder:
            raise
        return
    write_secret(kits / federation.server.name / "startup" / SERVER_CONTEXT, server)
    for name, content in sites.items():
        write_secret(kits / name / "startup" / CLIENT_CONTEXT, content)


def _listen_on(host: str, file: Path) -> None:
    """FLARE's server listens on every interface, unless it is told of a host of the loopback interface."""
    config = json.loads(file.read_text(encoding="utf-8"))
    service = config["servers"][0]["service"]
    service["target"] = f"{host}:{service['target'].rpartition(':')[2]}"
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _participants(federation: Federation) -> list[dict[str, Any]]:
    server = federation.server
    host = server.host or server.name
    definition = {
        "name": server.name,
        "type": "server",
        "org": server.org,
        "fed_learn_port": server.port,
        "admin_port": server.port,
        "default_host": host,
        "host_names": [host],
    }
    sites = [{"name": m.name, "type": "client", "org": m.org} for m in federation.sites]
    admins = [{"name": m.name, "type": "admin", "org": m.org, "role": m.role} for m in federation.admins]
    return [definition, *sites, *admins]


def service_command(kit: Path, python: str) -> list[str]:
    """The command that a kit's own start script runs, without the script's loop.

    Args:
        kit: The kit of a server or a site.
        python: The interpreter to run it with.

    Raises:
        EngineError: If it is no such kit.
    """
    kind = next((name for name in ("server", "client") if (kit / "startup" / f"fed_{name}.json").is_file()), None)
    script = kit / "startup" / "sub_start.sh"
    started = re.search(r"-m (nvflare\.private\S+) -m \S+ (-s .*)", script.read_text()) if script.is_file() else None
    if kind is None or started is None:
        raise EngineError(f"{kit} must be the kit of a server or a site, got a folder without its start script.")
    return [python, "-u", "-m", started[1], "-m", str(kit), *started[2].split()]
