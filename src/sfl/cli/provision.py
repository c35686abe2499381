"""Provisioning from the command line."""

from __future__ import annotations

import sys
from pathlib import Path

from sfl.engine.nvflare.federation import read_project
from sfl.env.checks import require


def provision(project: Path, *, out: Path = Path("kits")) -> int:
    """Write one kit for each participant of a federation.

    Args:
        project: YAML file with name, server, sites and admins.
        out: Folder for the kits. The certificate authority's key stays in it, under the project's name, in state.
    """
    federation = read_project(project)
    require("nvflare")
    from sfl.engine.nvflare.provision import provision as write
    from sfl.privacy.he.contexts import CLIENT_CONTEXT

    kits = write(federation, out)
    everyone = [federation.server, *federation.sites, *federation.admins]
    width = max(len(member.name) for member in everyone)
    sys.stdout.write(f"{federation.name}: {len(everyone)} kits in {kits}\n")
    for member in everyone:
        what = "server" if member is federation.server else getattr(member, "role", "") or "site"
        start = "" if getattr(member, "role", "") else f"  start it with: {kits / member.name}/startup/start.sh"
        sys.stdout.write(f"  {member.name:<{width}}  {what:<13}{start}\n")
    if (kits / federation.sites[0].name / "startup" / CLIENT_CONTEXT).exists():
        whose = f"{federation.he_holder} can decrypt" if federation.he_holder else "every site can decrypt"
        sys.stdout.write(f"Keys for homomorphic encryption are in the sites' kits: {whose}, the server cannot.\n")
    sys.stdout.write(f"Hand each kit to its owner alone. The authority's key is in {kits.parent / 'state'}: keep it.\n")
    return 0
