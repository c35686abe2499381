"""What a run writes down of its options and data as it begins, and checks when it goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sfl.application.config import RESUMABLE, RunConfig
from sfl.core.events import Notice, Observer
from sfl.errors import ConfigError
from sfl.io.run_folder import RunFolder
from sfl.io.tree import write_text
from sfl.train.federated import Federated
from sfl.types import site_names
from sfl.utils.config import Resolved, dump_yaml, to_dict

if TYPE_CHECKING:
    from sfl.application.workload import Workload

__all__ = ["Kept", "job_of"]

_BEGAN = "config_sources.json"
_OLDEST = "esm2"  # the only job of runs that do not say which


def job_of(folder: RunFolder) -> str:
    """Which application's run lies in a folder."""
    return str((folder.read_json(_BEGAN) or {}).get("job", _OLDEST))


@dataclass(frozen=True)
class Kept:
    """The record of a run's beginning.

    Attributes:
        job: The application's name.
        folder: The run's folder.
        resume: Whether the run goes on.
    """

    job: str
    folder: RunFolder
    resume: bool

    def begin(
        self, config: RunConfig, workload: Workload[Any, Any], resolved: Resolved[Any], console: Observer
    ) -> Callable[[], None]:
        """Look at options and data, and write them down; a folder in which nothing could begin does not stay.

        A new run's configuration is written here, so that whatever happens next it can be resumed. That of a run that
        goes on is written when it does, by what is returned: flags that it refuses must not stay.

        Raises:
            ConfigError: If the options or the data are not those that the run began with.
        """
        try:
            return self._begin(config, workload, resolved, console)
        except BaseException:
            self.folder.discard_if_empty()
            raise

    def _begin(
        self, config: RunConfig, workload: Workload[Any, Any], resolved: Resolved[Any], console: Observer
    ) -> Callable[[], None]:
        fixed = _fixed(config)
        began = (self.folder.read_json(_BEGAN) or {}) if self.resume else {}
        self._require_as_began(began, fixed)
        workload.forget()
        shared, report = workload.data()
        for line in report.warnings():
            console(Notice(text=line, level="warning"))
        described = _described(shared, workload)
        before = self.folder.read_json("data.json")
        if self.resume and before is not None and before.get("digest") != described["digest"]:
            raise ConfigError(
                f"data must be what the run began with, got others in {config.client.data or 'the sample'!r}. "
                "Put the data back, or start a new run."
            )
        given = dict(resolved.sources)
        if self.resume:  # what the run began with stays as it was said; only flags of this call are new
            given = {**_mapping(began, "sources"), **_flags(given)}

        def write() -> None:
            self.folder.write_json(_BEGAN, {"job": self.job, "sources": given, "options": fixed})
            write_text(self.folder.config, dump_yaml(config, given))

        if not self.resume:
            write()
        self.folder.write_json("data.json", described)
        return write

    def _require_as_began(self, began: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        changed = [
            f"{name} {now[name]!r} instead of {value!r}"
            for name, value in _mapping(began, "options").items()
            if name in now and now[name] != value
        ]
        if changed:
            raise ConfigError(
                f"{self.folder.config} must say what the run began with, got {', '.join(changed)}. "
                "Change it back, or start a new run."
            )


def _fixed(config: RunConfig) -> dict[str, Any]:
    """The options that make the run what it is. Where data and model lie may change; what they are is checked."""
    free = {*RESUMABLE, "out", "data", "model"}
    return {
        f"{section}.{name}": value
        for section, options in to_dict(config).items()
        for name, value in options.items()
        if name not in free
    }


def _mapping(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = tree.get(name)
    return found if isinstance(found, dict) else {}


def _flags(sources: Mapping[str, str]) -> dict[str, str]:
    return {name: source for name, source in sources.items() if source.startswith("--")}


def _described(shared: Federated[Any], workload: Workload[Any, Any]) -> dict[str, Any]:
    """Sizes for the report, and a digest that says whether a resumed run has the same data."""
    described = shared.describe(workload.described)
    names = site_names(len(shared.sites))
    sites = [
        {
            "name": name if site["site"].startswith("site-") else f"{name} ({site['site']})",
            "train": site["train"]["records"],
            "heldout": site["held_out"]["records"],
            "size": site["train"]["size"],
            "top": site["train"]["top"],
        }
        for name, site in zip(names, described["sites"], strict=True)
    ]
    digest = hashlib.sha256()
    for site in shared.sites:
        digest.update(json.dumps([[r.key for r in site.train], [r.key for r in site.held_out]]).encode())
    digest.update(json.dumps([record.key for record in shared.held_out]).encode())
    return {
        "sites": sites,
        "unit": workload.unit,
        "kinds": workload.kinds,
        "global_heldout": described["held_out"]["records"],
        "notes": [f"partition: {described['partition']}", f"duplicates dropped: {described['duplicates_dropped']}"],
        "digest": digest.hexdigest(),
    }
