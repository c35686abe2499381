"""Processes that encrypt side by side: the same numbers in the same order, and an end to all of them."""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection

import numpy as np
import psutil
import pytest

from sfl.errors import ProtocolError
from sfl.io.site_store import SecretStore
from sfl.privacy.he import CKKS, crew, opening, site
from sfl.privacy.he.cipher import Cipher
from sfl.privacy.he.crew import Crew, cores, serve
from sfl.privacy.he.packing import LAYOUT, Layout, framed
from sfl.privacy.he.scheme import HELD, SHARED, Scheme
from sfl.types import Array, Parameters
from test_he import Federation, _recipe

SCALE = 40


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is worth it."""
    monkeypatch.setattr(crew, "_WORTH", 1)


def blocks_of(count: int, slots: int) -> list[Array]:
    return [np.random.default_rng(i).normal(size=(1 + i % 2, slots)) for i in range(count)]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("size", [1, 2])
def test_what_goes_in_comes_out_in_its_order(size: int) -> None:
    cipher = Cipher.fresh(SHARED)
    blocks = blocks_of(7, SHARED.slots)
    with Crew(cipher, size, 7) as many:
        sealed = list(many.encrypted(iter(blocks), SCALE))
        back = list(many.decrypted(zip(sealed, [len(rows) for rows in blocks], strict=True)))
    for rows, numbers in zip(blocks, back, strict=True):
        assert np.abs(rows.reshape(-1) - numbers).max() < 1e-6
        numbers[0] = 0.0  # they are the caller's own
    assert len({array.tobytes() for array in sealed}) == 7


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("holder", ["", "site-1"])
def test_a_round_is_the_same_whoever_computes(holder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Watched(Crew):
        def __init__(self, cipher: Cipher, size: int, blocks: int) -> None:
            sizes.append(size)
            super().__init__(cipher, size, blocks)

    monkeypatch.setattr(site, "Crew", Watched)
    model: Parameters = {"w": np.linspace(-1.0, 1.0, 300_000)}
    federation = Federation(CKKS(holder=holder, threads=2), 2, parameters=model)
    federation.updates = {name: {"w": np.full(300_000, 0.5)} for name in federation.names}
    moved = federation.run().mean.delta
    if not holder:
        key = federation.secure.key(SecretStore(None))
        moved = {"w": opening.opened(federation.secure.sealed(moved), key)["w"] - model["w"]}
    assert np.abs(moved["w"] - 0.5).max() < 1e-6
    assert set(sizes) == {2}


def test_few_numbers_are_not_worth_a_process() -> None:
    before = psutil.Process().children()
    with Crew(Cipher(SHARED), 4, crew._WORTH - 1):
        assert psutil.Process().children() == before


@pytest.mark.usefixtures("small")
def test_no_process_stays_whatever_happens() -> None:
    def breaks() -> Iterator[Array]:
        yield from blocks_of(3, SHARED.slots)
        raise ValueError("no more")

    before = psutil.Process().children()
    with pytest.raises(ValueError, match="no more"), Crew(Cipher.fresh(SHARED), 2, 9) as many:
        for _ in many.encrypted(breaks(), SCALE):
            pass
    assert psutil.Process().children() == before


@pytest.mark.usefixtures("small")
def test_a_process_that_does_not_answer_holds_nobody_up_who_gives_up() -> None:
    many = Crew(Cipher(SHARED), 2, 9)
    for process in many._processes:
        os.kill(process.pid, signal.SIGSTOP)
    assert many._threads is not None
    asked = many._threads.submit(many._ask, b"d\x01")
    many.__exit__(KeyboardInterrupt, None, None)
    with pytest.raises(ProtocolError, match="ended from outside"):
        asked.result()


@pytest.mark.usefixtures("small")
def test_a_process_that_is_killed_is_said() -> None:
    with Crew(Cipher(SHARED), 2, 9) as many:
        for process in many._processes:
            os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(ProtocolError, match="got none: it was ended from outside"):
            list(many.decrypted([(framed([b"a"]), 1)]))


@pytest.mark.usefixtures("small")
def test_what_is_no_ciphertext_is_said_in_its_own_words() -> None:
    with (
        pytest.raises(ProtocolError, match="must be one under the job's parameters"),
        Crew(Cipher.fresh(SHARED), 2, 9) as many,
    ):
        list(many.decrypted([(framed([b"no ciphertext"]), 1)]))
    layout = Layout.of({"w": np.ones(3)}, ["w"], SHARED.slots, 1.0)
    with pytest.raises(ProtocolError, match="got none named 'ckks/00000'"):
        opening.opened({LAYOUT: layout.packed()}, Cipher.fresh(SHARED).exported(secret=True))


@pytest.mark.parametrize("scheme", [SHARED, HELD], ids=["shared", "held"])
def test_the_other_side_answers_until_the_first_is_gone(scheme: Scheme) -> None:
    cipher = Cipher.fresh(scheme)
    ours, theirs = socket.socketpair()
    served = threading.Thread(target=serve, args=(Connection(theirs.detach()),))
    served.start()
    rows = np.ones((1, cipher.scheme.slots))
    with Connection(ours.detach()) as here:
        here.send_bytes(json.dumps(asdict(cipher.scheme)).encode())
        here.send_bytes(cipher.data)
        here.send_bytes(b"e" + bytes([SCALE]) + rows.tobytes())
        sealed = here.recv_bytes()
        here.send_bytes(b"d\x01" + sealed[1:])
        assert np.abs(np.frombuffer(here.recv_bytes()[1:]) - 1.0).max() < 1e-6
        here.send_bytes(b"d\x01" + b"nothing")
        assert here.recv_bytes() == b"-an array of ciphertexts must hold 1 of them, got 7 other bytes."
    served.join(5.0)
    assert not served.is_alive()


def test_as_a_process_it_leaves_the_users_interrupt_to_who_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    monkeypatch.setattr("sys.argv", ["crew", str(theirs.detach())])
    before = signal.getsignal(signal.SIGINT)
    try:
        runpy.run_path(crew.__file__, run_name="__main__")  # until the other side is gone, which it is
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_cores_are_counted_where_affinity_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert cores() == 8
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores() == 1


def test_a_job_says_with_how_many_a_simulated_site_computes() -> None:
    made = _recipe(secure=CKKS(), federation={"threads": 3})._secure_sum()
    assert isinstance(made, CKKS)
    assert (made.threads, made.planned) == (3, 3)
