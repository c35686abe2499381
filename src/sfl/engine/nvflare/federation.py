"""Who takes part in a provisioned federation, as a short YAML file says it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from sfl.errors import ConfigError, check_rules, nearest

T = TypeVar("T")
ADMIN, SERVER = "admin@sfl.poc", "server"
"""Names of a federation on this machine."""
ROLES = ("project_admin", "org_admin", "lead", "member")
_EMAIL = re.compile(r"[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\.[A-Za-z]{2,}")
_ORG = re.compile(r"[A-Za-z0-9_]+")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.@_-]{0,62}")
"""What a participant may be called."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """The server of a federation.

    Attributes:
        name: Its name in its certificate.
        host: The host that sites and admins reach it by; its name by default.
        port: The port it listens on, for sites and admins alike.
        org: Its organisation.
    """

    name: str = "server"
    host: str = ""
    port: int = 8002
    org: str = "server"


@dataclass(frozen=True, kw_only=True)
class Member:
    """A site or an admin.

    Attributes:
        name: Its name in its certificate.
        org: Its organisation.
        role: Of an admin: project_admin, org_admin, lead or member; empty for a site.
    """

    name: str
    org: str = "sites"
    role: str = ""


@dataclass(frozen=True, kw_only=True)
class Federation:
    """Who takes part in a provisioned federation.

    Attributes:
        name: Name of the project.
        server: The server.
        sites: The sites.
        admins: Who may submit jobs; one must be a project_admin.
        valid_days: For how many days a new root certificate is valid.
        he_holder: The one site that can decrypt under homomorphic encryption; by default all share its key.
    """

    name: str
    server: Server
    sites: tuple[Member, ...]
    admins: tuple[Member, ...]
    valid_days: int = 360
    he_holder: str = ""

    def __post_init__(self) -> None:
        everyone = [self.server.name, *(m.name for m in (*self.sites, *self.admins))]
        for name in (self.name, *everyone):
            if not NAME.fullmatch(name):
                raise ConfigError(f"a participant's name must be of letters, digits and . @ _ -, got {name!r}.")
        twice = sorted({name for name in everyone if everyone.count(name) > 1})
        if twice:
            raise ConfigError(f"participants must have names of their own, got {', '.join(twice)} twice. Rename one.")
        if not self.sites:
            raise ConfigError("sites must name at least one site, got none.")
        rules = (
            ("server.port", self.server.port, 1 <= self.server.port <= 65535, "between 1 and 65535"),
            ("he_holder", self.he_holder, self.he_holder in {"", *(m.name for m in self.sites)}, "the name of a site"),
        )
        check_rules(rules)
        orgs = {self.server.org, *(m.org for m in (*self.sites, *self.admins))}
        odd = sorted(org for org in orgs if not _ORG.fullmatch(org))
        if odd:
            raise ConfigError(f"an org must be of letters, digits and _, got {', '.join(map(repr, odd))}.")
        nameless = [m.name for m in self.admins if not _EMAIL.fullmatch(m.name)]
        if nameless:
            raise ConfigError(f"the name of an admin must be an email address, got {', '.join(nameless)}.")
        wrong = [f"{m.name}: {m.role!r}" for m in self.admins if m.role not in ROLES]
        if wrong:
            raise ConfigError(f"the role of an admin must be one of {', '.join(ROLES)}, got {'; '.join(wrong)}.")
        if not any(m.role == "project_admin" for m in self.admins):
            raise ConfigError("admins must hold a project_admin, got none. Give one of them that role.")


def on_this_machine(sites: Sequence[str], port: int) -> Federation:
    """A federation whose participants all are processes of this machine, with one admin, ``ADMIN``.

    Args:
        sites: Names of the sites.
        port: A port of the loopback interface.
    """
    return Federation(
        name="poc",
        server=Server(name=SERVER, host="localhost", port=port),
        sites=tuple(Member(name=name) for name in sites),
        admins=(Member(name=ADMIN, role="project_admin"),),
    )


def read_project(path: Path) -> Federation:
    """Read a project file.

    ```yaml
    name: lung
    server: {name: fl-server, host: fl.example.org, port: 8002, org: hub}
    sites:
      - {name: hospital-a, org: a}
      - {name: hospital-b, org: b}
    admins:
      - {name: boss@example.org, org: hub, role: project_admin}
    ```

    Raises:
        ConfigError: Naming the key or the value that is wrong.
    """
    import yaml

    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the project must be a file that can be read, got {path}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} must be YAML, got: {' '.join(str(error).split())}.") from error
    given = _known(Federation, said, str(path))
    options = {key: given[key] for key in ("name", "valid_days", "he_holder") if key in given}
    return Federation(
        **options,
        server=Server(**_known(Server, given.get("server", {}), f"{path}: server")),
        sites=_members(given.get("sites"), f"{path}: sites"),
        admins=_members(given.get("admins"), f"{path}: admins"),
    )


def _members(said: object, what: str) -> tuple[Member, ...]:
    if not isinstance(said, list):
        raise ConfigError(f"{what} must be a list, got {type(said).__name__}.")
    return tuple(Member(**_known(Member, entry, f"{what}[{place}]")) for place, entry in enumerate(said))


def _known(cls: type[T], said: object, what: str) -> dict[str, Any]:
    """The keys of a mapping, all of them fields of ``cls``, and those that it needs among them."""
    if not isinstance(said, Mapping):
        raise ConfigError(f"{what} must be a mapping, got {type(said).__name__}.")
    declared: Mapping[str, Any] = {item.name: item for item in fields(cls)}  # pyright: ignore[reportArgumentType]
    for key, value in said.items():
        if key not in declared:
            raise ConfigError(f"{what} must have known keys, got {key!r}. {nearest(str(key), declared)}")
        wanted = declared[key].type
        if wanted in ("str", "int") and (type(value).__name__ != wanted):
            raise ConfigError(f"{what}: {key} must be of type {wanted}, got {value!r}.")
    if "name" not in said and cls is not Server:
        raise ConfigError(f"{what} must have a name, got none.")
    return dict(said)
