"""What can go wrong at a site, on every engine: each planned site ends with its own words, and the run goes on."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import troubled_clients as clients
from sfl.env import FlareSimEnv, FlowerEnv, FlowerInFlareEnv, FlowerSimEnv, PocEnv, SimEnv
from sfl.env.remote import RemoteEnv
from sfl.errors import EngineError
from sfl.recipe import Environment, FedAvgRecipe
from sfl.types import FederationConfig
from test_engines import nothing_left

__all__ = ["nothing_left"]  # a fixture of every test here

pytestmark = pytest.mark.timeout(600)
ENVS: dict[str, tuple[Callable[..., Environment], int]] = {
    "sim": (partial(SimEnv, device="cpu"), 6),
    "flower": (FlowerSimEnv, 3),  # where every site costs a process of the engine's own, those that differ by engine
    "flower-deploy": (FlowerEnv, 3),
    "nvflare": (FlareSimEnv, 6),
    "nvflare-poc": (PocEnv, 3),
    "flower-in-nvflare": (FlowerInFlareEnv, 3),
}


def troubled(num_clients: int, dies: int = 1) -> FedAvgRecipe:
    return FedAvgRecipe(
        name="troubled",
        client=clients.Troubled,
        client_kwargs={"dies": dies},
        initial_parameters=clients.initial,
        evaluate_every=0,
        federation=FederationConfig(num_clients=num_clients, num_rounds=2, min_available_clients=1, round_timeout=30.0),
    )


FLOWER = "import sfl.engine.flower.deploy as engine, sfl.engine.flower.keys as keys"
FLARE = (
    "import sfl.engine.nvflare.poc as engine; from nvflare.lighter.impl.cert import CertBuilder; "
    "import sfl.engine.nvflare.submit as submit; submit._START = 25.0"
)
RUN = "from pathlib import Path; from sfl.engine.launch import Launch; sys.exit(engine.run(Launch(Path(sys.argv[1]))))"
ALL_TAKEN = "engine.free_ports = lambda count: [int(sys.argv[2])] * count"
EXPIRED_FLOWER = "from datetime import timedelta; keys._VALID = timedelta(minutes=-1)"
EXPIRED_FLARE = (
    "import datetime as d; make = CertBuilder._generate_cert; "
    "end = lambda: {'not_valid_after': d.datetime.now(d.timezone.utc) + d.timedelta(seconds=1)}; "
    "soon = lambda *a, **k: make(*a, **(k if k.get('ca') else {**k, **end()})); "
    "CertBuilder._generate_cert = staticmethod(soon)"
)

HAS_EXPIRED = ("certificate has expired", "cert is not valid at validation time")
"""As TLS says it, and as FLARE does where the certificate has expired before FLARE has read it."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env", "module", "change", "message"),
    [
        (FlowerEnv, FLOWER, ALL_TAKEN, "the SuperLink must start"),
        (FlowerEnv, FLOWER, EXPIRED_FLOWER, "certificate has expired"),
        (PocEnv, FLARE, EXPIRED_FLARE, "must open a session with its server"),
    ],
    ids=["flower-port", "flower-certificate", "nvflare-certificate"],
)
def test_a_port_that_is_taken_and_a_certificate_that_has_expired_end_the_run(
    env: type[RemoteEnv], module: str, change: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The engine's own processes, started as always but for one thing."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        words = [sys.executable, "-c", f"import sys; {module}; {change}; {RUN}"]
        monkeypatch.setattr(env, "command", lambda _env, launch: [*words, str(launch.folder), port])
        started = time.monotonic()
        with pytest.raises(EngineError, match=message) as raised:
            troubled(2).execute(env(), out=tmp_path / "run")
    assert time.monotonic() - started < 240
    log = tmp_path / "run" / "logs" / "engine.log"
    assert str(log) in str(raised.value)
    assert any(words in log.read_text() for words in HAS_EXPIRED) is (change != ALL_TAKEN)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ENVS)
def test_whatever_a_site_does_wrong_is_said_in_its_own_words_and_the_others_go_on(backend: str, tmp_path: Path) -> None:
    env, count = ENVS[backend]
    result = troubled(count).execute(env(num_threads=count), out=tmp_path / "run")  # who never answers keeps its worker
    first, second = ({site.site: site for site in r.sites} for r in result.rounds[1:])
    assert "its process died" in first["site-1"].reason or "its worker process died" in first["site-1"].reason
    assert first["site-3"].reason == "site-3: RuntimeError: the scanner at this hospital is down"
    assert "troubled_clients.py" in first["site-3"].details
    ended = [site.status.value for site in first.values()]
    assert ended == ["failed", "used", "failed", "rejected", "rejected", "failed"][:count]

    ended = [site.status.value for site in second.values()]  # the site that died is there again
    assert ended == ["used", "late", "used", "used", "used", "failed"][:count]
    assert second["site-2"].reason == "no reply within 30 s"
    assert result.state.round == 2
    if count == 6:
        assert first["site-4"].reason == "site-4: 'w' must have shape (3, 4), got (2, 4)."
        assert first["site-5"].reason == "site-5: 'w' must be a numpy array, got list."
        assert first["site-6"].reason == "site-6: ModuleNotFoundError: No module named 'a_module_that_is_not_there'"
