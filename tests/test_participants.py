"""Sites start once their server listens, and are not held up by one that never will."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from sfl.engine.nvflare import participants
from sfl.engine.nvflare.federation import SERVER
from sfl.engine.ports import own_ports

LISTENS = "import socket, time; time.sleep({after}); s = socket.create_server(('127.0.0.1', {port})); time.sleep(60)"
CONNECTS = "import socket; socket.create_connection(('127.0.0.1', {port}), timeout=1.0)"


def codes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: str) -> tuple[dict[str, int], float]:
    """The exit codes of two sites that connect to a server at once, and the seconds until they were started."""
    (port,) = own_ports(1)

    def command(kit: Path, python: str) -> list[str]:
        return [python, "-c", (server if kit.name == SERVER else CONNECTS).format(port=port, after=0.7)]

    monkeypatch.setattr(participants, "service_command", command)
    begun = time.monotonic()
    started = participants.start(tmp_path / "kits", ["a", "b"], port, lambda name: tmp_path / f"{name}.log")
    seconds = time.monotonic() - begun
    assert list(started) == [SERVER, "a", "b"]
    try:
        return {name: started[name].wait(10.0) for name in ("a", "b")}, seconds
    finally:
        started[SERVER].kill()
        started[SERVER].wait()


def test_sites_start_once_their_server_listens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert codes(monkeypatch, tmp_path, LISTENS)[0] == {"a": 0, "b": 0}
    assert (tmp_path / "a.log").read_text() == ""


@pytest.mark.parametrize("server", ["raise SystemExit(3)", "import time; time.sleep(60)"], ids=["ends", "is silent"])
def test_a_server_that_does_not_listen_holds_nobody_up(
    server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(participants, "_START", 30.0 if "Exit" in server else 0.3)
    failed, seconds = codes(monkeypatch, tmp_path, server)
    assert failed == {"a": 1, "b": 1}
    assert seconds < 20.0
    assert "ConnectionRefusedError" in (tmp_path / "a.log").read_text()
