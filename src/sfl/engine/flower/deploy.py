"""A Flower federation on this machine for one job: ``python -m sfl.engine.flower.deploy FOLDER``.

SuperLink and one SuperNode for each site are processes of their own. They talk TLS over loopback, nodes prove their
identity with keys, submitting takes the run's token and executing its secret; ports and folders are the run's own.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import ssl
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sfl.engine.flower.app_folder import write_app
from sfl.engine.flower.keys import make_kits, make_node_keys, make_server_keys
from sfl.engine.launch import Launch
from sfl.engine.ports import free_ports
from sfl.errors import EngineError
from sfl.io.tree import write_secret

_START = 60.0  # seconds that the SuperLink gets to answer
_LOOK = 0.05
_STATUS = 5.0  # seconds between two looks at Flower's own word on the run
_PAUSE = 0.05  # seconds that a node sleeps between two looks for messages, more where many share this machine
_LINK = "sfl"
_ADDRESSED = "--clientappio-api-address"  # an option of SuperNode until one HTTP API took the place of all
_LOCAL = "127.0.0.1"


class Deployment:
    """The processes of one federation.

    Args:
        launch: The run.
        logs: Where each process's output goes.
    """

    def __init__(self, launch: Launch, logs: Path) -> None:
        names = list(launch.read_settings()["names"])
        self._folder, self._logs = launch.folder / "flower", logs
        home = self._folder / "home"
        home.mkdir(parents=True)
        os.environ["FLWR_HOME"] = str(home)  # Flower reads it while it is imported, which is now
        from sfl.engine.flower.account import install_account, store_token
        from sfl.engine.flower.commands import Commands

        self.commands = Commands(self._folder, _PAUSE * max(1.0, len(names) / 4))
        self._old = _ADDRESSED in self.commands.call("flower-supernode", ["--help"])
        self._fleet, self._control, self._link, *self._nodes = free_ports(3 + len(names))
        if not self._old:
            self._fleet = self._control = self._link
        self._keys = make_server_keys(self._folder / "keys")
        self._kits = make_kits(self._folder / "kits", names)
        for name, kit in self._kits.items():
            launch.add_to_kit(name, kit)
        self._secret = self._folder / "keys" / "superexec.secret"
        write_secret(self._secret, secrets.token_bytes(32))
        address, token = f"{_LOCAL}:{self._control}", secrets.token_urlsafe(32)
        write_connection(home, _LINK, address, self._keys.authority)
        store_token(address, token)
        self._install = partial(install_account, token)

    def start_link(self) -> Any:
        """The SuperLink."""
        options = [
            "--ssl-ca-certfile", str(self._keys.authority),
            "--ssl-certfile", str(self._keys.certificate),
            "--ssl-keyfile", str(self._keys.key),
            "--enable-supernode-auth",
            "--isolation", "process",
            "--superexec-auth-secret-file", str(self._secret),
            *self._runtime_options("--serverappio-api-address", self._link),
        ]  # fmt: skip
        if self._old:
            options += ["--fleet-api-address", f"{_LOCAL}:{self._fleet}"]
            options += ["--control-api-address", f"{_LOCAL}:{self._control}"]
        return self.commands.start("flower-superlink", options, self._log("superlink"), self._install)

    def start_node(self, site: str, number: int) -> None:
        """The SuperNode of one site, after making its key known to the SuperLink, and what executes its apps."""
        private, public = make_node_keys(self._folder / "keys", site)
        self.flwr("supernode", "register", str(public), _LINK)
        options = [
            "--root-certificates", str(self._keys.authority),
            "--superlink", f"{_LOCAL}:{self._fleet}",
            "--auth-supernode-private-key", str(private),
            "--isolation", "process",
            "--superexec-auth-secret-file", str(self._secret),
            "--node-config", f'site="{site}" kit="{self._kits[site]}"',
            *self._runtime_options(_ADDRESSED, self._nodes[number]),
        ]  # fmt: skip
        self.commands.start("flower-supernode", options, self._log(f"node-{site}"))
        self._start_executor("clientapp", self._nodes[number], f"node-{site}")

    def submit(self, app: Path) -> str:
        """Submit an app, and start what executes it; the run's number."""
        answer = json.loads(self.flwr("run", str(app), _LINK, "--format", "json"))
        if not answer.get("success"):
            raise EngineError(f"flwr run must succeed, got: {answer.get('error-message') or answer}.")
        self._start_executor("serverapp", self._link, "superlink")
        return str(answer["run-id"])

    def status(self, run: str) -> str:
        """What the SuperLink says of a run."""
        answer = json.loads(self.flwr("ls", _LINK, "--run-id", run, "--format", "json"))
        return str(answer["runs"][0]["status"])

    def wait_for_link(self, link: Any) -> None:
        """Wait until the SuperLink answers.

        Raises:
            EngineError: If it ends, or does not answer in time.
        """
        deadline = time.monotonic() + _START
        while True:
            if link.exitcode is not None:
                raise EngineError(f"the SuperLink must start, got exit code {link.exitcode}. Its log says why.")
            try:
                answer = json.loads(self.flwr("ls", _LINK, "--format", "json"))
                if answer.get("success"):
                    return
                raise EngineError(str(answer.get("error-message") or answer))
            except EngineError as error:
                self._check_certificate()
                if time.monotonic() > deadline:
                    raise EngineError(f"the SuperLink must answer within {_START:g} s, got: {error}") from error
            time.sleep(_LOOK)

    def _check_certificate(self) -> None:
        """Flower calls a SuperLink whose certificate does not hold unavailable, and tries again: ask TLS itself."""
        context = ssl.create_default_context(cafile=str(self._keys.authority))
        try:
            with (
                socket.create_connection((_LOCAL, self._control), timeout=_STATUS) as plain,
                context.wrap_socket(plain, server_hostname=_LOCAL),
            ):
                return
        except ssl.SSLCertVerificationError as error:
            raise EngineError(f"the SuperLink's certificate must hold, got: {error.verify_message}.") from error
        except OSError:
            return  # it is not there yet

    def flwr(self, *arguments: str) -> str:
        """Run Flower's command line; what it wrote."""
        return self.commands.call("flwr", arguments)

    def _start_executor(self, kind: str, port: int, log: str) -> None:
        where = "--appio-api-address" if self._old else "--runtime-api-address"
        options = [
            where, f"{_LOCAL}:{port}",
            *(["--plugin-type", kind] if self._old else []),
            *(["--root-certificates", str(self._keys.authority)] if port == self._control else ["--insecure"]),
            "--superexec-auth-secret-file", str(self._secret),
            "--parent-pid", str(os.getpid()),
        ]  # fmt: skip
        self.commands.start("flower-superexec", options, self._log(log))

    def _runtime_options(self, old: str, port: int) -> Sequence[str]:
        """Where apps are served: an address in versions that have the option, host and port in later ones."""
        if self._old:
            return [old, f"{_LOCAL}:{port}"]
        return ["--host", _LOCAL, "--port", str(port)]

    def _log(self, name: str) -> Path:
        return self._logs / f"flower-{name}.log"


def write_connection(home: Path, name: str, address: str, authority: Path | None) -> None:
    """Write Flower's list of SuperLinks, with one of them.

    Args:
        home: ``FLWR_HOME``.
        name: The SuperLink's name there.
        address: Of its Control API.
        authority: Root certificates that it is checked with; by default those of the system.
    """
    roots = f"root-certificates = {json.dumps(str(authority))}\n" if authority is not None else ""
    text = f'[superlink]\ndefault = "{name}"\n\n[superlink.{name}]\naddress = {json.dumps(address)}\n{roots}'
    home.joinpath("config.toml").write_text(text, encoding="utf-8")


def run(launch: Launch) -> int:
    """Start everybody, run the job; its exit code. Whoever started this process ends what its commands have started."""
    settings = launch.read_settings()
    deployment = Deployment(launch, Path(settings["logs"]))
    try:
        return _run(launch, list(settings["names"]), deployment)
    finally:
        deployment.commands.end()


def _run(launch: Launch, names: Sequence[str], deployment: Deployment) -> int:
    link = deployment.start_link()
    deployment.wait_for_link(link)
    for number, name in enumerate(names):
        deployment.start_node(name, number)
    what = f"Flower deployment, {len(names)} nodes as processes, TLS and node keys"
    run_id = deployment.submit(write_app(launch.folder / "flower-app", launch.folder, what))
    looked = time.monotonic()
    while not launch.outcome.exists():
        deployment.commands.serve(_LOOK)
        if link.exitcode is not None:
            raise EngineError(f"the SuperLink must outlive the job, got exit code {link.exitcode}. See its log.")
        if time.monotonic() - looked > _STATUS:
            looked = time.monotonic()
            if deployment.status(run_id).startswith("finished") and not launch.outcome.exists():
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(run(Launch(Path(sys.argv[1]))))
