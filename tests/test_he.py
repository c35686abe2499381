"""Homomorphic encryption: sums against plain ones, what is refused, who may read what."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tenseal as ts

import algorithm_clients
import clients
from secure_sites import played
from sfl import FederationConfig, SimEnv
from sfl.cli import main
from sfl.client.callbacks import TrimSiteMemory
from sfl.core.aggregator import Sum
from sfl.core.events import Notice, SiteFinished
from sfl.core.secure import Total
from sfl.core.task import EVALUATE, FIT, Reply, Status, Task, Update
from sfl.engine.kit import kit_of_server, use_kit, use_server_kit
from sfl.errors import CompositionError, ConfigError, MissingExtraError, ProtocolError, RoundError
from sfl.io.checkpoint import Checkpoints
from sfl.io.run_folder import RunFolder
from sfl.io.site_store import SecretStore
from sfl.privacy.dp import GaussianMechanism
from sfl.privacy.he import CKKS
from sfl.privacy.he.cipher import Cipher
from sfl.privacy.he.contexts import CLIENT_CONTEXT, SERVER_CONTEXT, check_server_kit, kit_cipher, make_contexts
from sfl.privacy.he.opening import opened
from sfl.privacy.he.packing import LAYOUT, Layout, framed, is_sealed, parts_of
from sfl.privacy.he.scheme import HELD, SHARED, Scheme
from sfl.privacy.he.server import OPEN
from sfl.privacy.he.site import CkksSite
from sfl.privacy.secagg import SecAgg
from sfl.recipe import DittoRecipe, FedAvgRecipe, FedAvgRecipeWithHE, FedOptRecipe, FedProxRecipe, ScaffoldRecipe
from sfl.server.robust.krum import Krum
from sfl.server.schedule import Schedule
from sfl.types import Parameters

MODEL: Parameters = {
    "conv.weight": np.linspace(-3.0, 3.0, 5000, dtype=np.float32).reshape(50, 100),
    "steps": np.array([70_000, 3], np.int64),
    "bias": np.array([0.5, -60.0]),
}


@dataclass
class Federation:
    """Sites that answer what a server's half asks; a test plays the engine, and anybody's part it likes."""

    secure: CKKS
    n: int = 4
    weights: Mapping[str, float] = field(default_factory=dict[str, float])
    lost: tuple[str, ...] = ()
    forge: Callable[[str, Update], Update] = lambda _, update: update
    parameters: Parameters = field(default_factory=lambda: dict(MODEL))

    def __post_init__(self) -> None:
        self.secure = self.secure.among(2, self.n, self.secure.threads)
        self.names = [f"site-{number + 1}" for number in range(self.n)]
        draw = np.random.default_rng(self.n)
        self.updates: dict[str, Parameters] = {
            name: {
                "conv.weight": draw.normal(size=(50, 100)).astype(np.float32),
                "steps": draw.integers(0, 50, 2),
                "bias": draw.normal(size=2),
            }
            for name in self.names
        }
        keeper = SecretStore(None)
        self.sites = {name: self.secure.site(name, keeper) for name in self.names}
        self.refused: dict[str, str] = {}
        self.memory = self.secure.begin(self.parameters, self.parameters, self.names)

    def run(self, round: int = 1) -> Total:
        """One round; what the server made of it."""
        task = Task(FIT, round, self.parameters)
        summing = self.secure.summing(task, self.names, self.secure.like(self.parameters), self.memory)
        return played(summing, self._forged, self.refused)

    def _forged(self, name: str, task: Task) -> Update | None:
        return None if name in self.lost else self.forge(name, self._answer(name, task))

    def _answer(self, name: str, task: Task) -> Update:
        site = self.sites[name]
        if task.name != FIT:
            return site.answer(task)
        came = site.opened(task)
        update = Update(name, dict(self.updates[name]), self.weights.get(name, 1.0), {"loss": 1.0})
        return site.closed(update, task, dict(came.parameters))

    def mean(self, *names: str) -> Parameters:
        """What a plain mean would be."""
        there = names or tuple(self.names)
        weights = np.array([self.weights.get(name, 1.0) for name in there])
        return {
            array: np.tensordot(weights, np.stack([self.updates[name][array] for name in there]), 1) / weights.sum()
            for array in MODEL
        }


def _model(federation: Federation, total: Total) -> Parameters:
    """The model that a round without a holder made, as sites read it."""
    sealed = federation.secure.sealed(total.mean.delta)
    bare = federation.secure.bare(dict(MODEL), sealed)
    moved = {name: value + total.mean.delta[name] for name, value in bare.items()}
    site = federation.sites[federation.names[0]]
    return dict(site.opened(Task(EVALUATE, 1, {**sealed, **moved})).parameters)


# what comes out


@pytest.mark.parametrize("n", [2, 4, 30])
def test_a_sealed_round_is_the_plain_one_within_the_stated_error(n: int) -> None:
    federation = Federation(CKKS(), n)
    total = federation.run()
    got, mean = _model(federation, total), federation.mean()
    error = federation.secure.scheme.error(federation.secure.scale_bits, n) / n
    assert error < 1e-7
    assert np.abs(got["bias"] - (MODEL["bias"] + mean["bias"])).max() <= error
    assert np.abs(got["conv.weight"] - (MODEL["conv.weight"] + mean["conv.weight"])).max() <= error + 3e-7
    assert np.abs(got["steps"] - (MODEL["steps"] + mean["steps"])).max() <= 0.501
    assert [(name, value.dtype, value.shape) for name, value in got.items()] == [
        (name, value.dtype, value.shape) for name, value in MODEL.items()
    ]
    assert total.sites == tuple(federation.names)


def test_the_stated_error_is_close_to_what_is_seen() -> None:
    for scheme in (SHARED, replace(HELD, moduli=(50, 60)), replace(SHARED, symmetric=False)):
        cipher = Cipher.fresh(scheme)
        rows = np.random.default_rng(0).uniform(-1, 1, (8, scheme.slots))
        total = cipher.loaded(cipher.encrypted(rows[0], 30), 30)
        for row in rows[1:]:
            cipher.add(total, cipher.loaded(cipher.encrypted(row, 30), 30))
        seen = np.abs(cipher.decrypted(cipher.packed(total)) - rows.sum(0)).max()
        assert 0.1 * scheme.error(30, 8) < seen < scheme.error(30, 8)


def test_a_model_goes_from_round_to_round_as_ciphertexts() -> None:
    federation = Federation(CKKS(), 3)
    first = federation.run()
    federation.parameters = federation.secure.sealed(first.mean.delta)
    second = federation.run(2)
    got, mean = _model(federation, second), federation.mean()
    assert np.abs(got["bias"] - (MODEL["bias"] + 2 * mean["bias"])).max() < 1e-8
    assert np.abs(got["steps"] - (MODEL["steps"] + 2 * mean["steps"])).max() <= 1.001


def test_sites_weigh_before_they_encrypt() -> None:
    federation = Federation(CKKS(max_weight=1000), weights={"site-1": 900.0, "site-2": 10.0, "site-4": 5000.0})
    total = federation.run()
    federation.weights = {**federation.weights, "site-4": 1000.0}  # the largest that counts
    got = _model(federation, total)["bias"]
    assert np.abs(got - (MODEL["bias"] + federation.mean()["bias"])).max() < 1e-7
    assert total.mean.weight == 4.0  # nobody sees weights


@pytest.mark.parametrize("layers", ["bias|steps", ("conv.weight",)])
def test_layers_that_are_not_chosen_travel_as_they_are(layers: Any) -> None:
    federation = Federation(CKKS(layers=layers, max_weight=10), weights={"site-1": 4.0, "site-2": 2.0})
    total = federation.run()
    got, mean = _model(federation, total), federation.mean()
    for name, value in MODEL.items():
        assert np.allclose(got[name], value + mean[name] if name != "steps" else got[name], atol=1e-6)
    sealed = federation.secure.sealed(total.mean.delta)
    assert set(total.mean.delta) - set(sealed) == set(MODEL) - set(CKKS(layers=layers).chosen(MODEL))
    assert [name for name, _, _ in Layout.read(sealed).closed] == CKKS(layers=layers).chosen(MODEL)


def test_a_holder_opens_the_sum_alone() -> None:
    federation = Federation(CKKS(holder="site-2"), weights={})
    total = federation.run()
    mean = federation.mean()
    assert set(total.mean.delta) == set(MODEL)
    for name, value in total.mean.delta.items():
        assert np.abs(value - mean[name]).max() < (0.5 if name == "steps" else 1e-6)
    assert total.mean.delta["conv.weight"].dtype == np.float32
    # what it tells is noised far above the error in which the key would show
    assert np.abs(total.mean.delta["bias"] - mean["bias"]).max() > 1e-10


def test_who_drops_out_is_not_in_the_sum() -> None:
    for secure in (CKKS(), CKKS(holder="site-1")):
        federation = Federation(secure, lost=("site-3",))
        total = federation.run()
        assert total.sites == ("site-1", "site-2", "site-4")
        mean = federation.mean(*total.sites)
        got = _model(federation, total) if secure.seals else total.mean.delta
        base = MODEL["bias"] if secure.seals else 0.0
        assert np.abs(got["bias"] - base - mean["bias"]).max() < 1e-6


def test_nobody_at_all_ends_the_round() -> None:
    federation = Federation(CKKS(), lost=("site-1", "site-2", "site-3", "site-4"))
    with pytest.raises(RoundError, match="at least one update"):
        federation.run()
    federation = Federation(CKKS(holder="site-1"), lost=("site-1",))
    with pytest.raises(RoundError, match="decrypted by site-1, which has the secret key, got no answer"):
        federation.run()


def test_arrays_that_a_site_leaves_out_do_not_move() -> None:
    federation = Federation(CKKS(), 2)
    federation.updates["site-1"] = {}
    got = _model(federation, federation.run())
    assert np.abs(got["bias"] - (MODEL["bias"] + federation.updates["site-2"]["bias"] / 2)).max() < 1e-8


def test_blocks_of_many_ciphertexts_are_filled_across_arrays() -> None:
    sizes = {"a": 64 * 2048 - 5, "b": 5, "c": 2048, "none": 0}
    model: Parameters = {name: np.arange(size, dtype=np.float64) for name, size in sizes.items()}
    layout = Layout.of(model, list(model), 2048, 64.0)
    assert (layout.blocks, [layout.rows(block) for block in range(2)]) == (2, [64, 2])
    out: Parameters = {name: np.full(size, np.nan) for name, size in sizes.items()}
    for block in range(layout.blocks):
        rows = layout.filled(block, 0.25, lambda name, part: model[name][part] / 4096)
        assert rows.shape == (layout.rows(block), 2048)
        layout.spread(block, rows.reshape(-1), lambda name, part, values: out[name].__setitem__(part, values))
    assert all((out[name] == value / 4096).all() for name, value in model.items())
    assert Layout.read({LAYOUT: layout.packed()}) == layout


def test_a_number_costs_at_most_8_bytes() -> None:
    federation = Federation(CKKS(), 2)
    federation.parameters = {"w": np.random.default_rng(0).normal(size=(200, 1024)).astype(np.float32)}
    federation.updates = {key: {"w": np.ones((200, 1024), np.float32)} for key in federation.names}
    sent: list[int] = []

    def count(_: str, update: Update) -> Update:
        sent.append(sum(value.nbytes for value in update.delta.values()))
        return update

    federation.forge = count
    federation.run()
    assert all(nbytes / (200 * 1024) < 8.0 for nbytes in sent)


# what nobody may read


def test_what_the_server_gets_opens_with_the_sites_key_and_with_no_other() -> None:
    federation = Federation(CKKS(), 2)
    sealed = federation.secure.sealed(federation.run().mean.delta)
    ours = federation.secure.key(SecretStore(None))
    assert ours is not None
    assert np.abs(opened(sealed, ours)["bias"] - (MODEL["bias"] + federation.mean()["bias"])).max() < 1e-8
    other = make_contexts(["a"])[1]["a"]
    with pytest.raises(ProtocolError, match="must open with their key, got one of another key"):
        opened(sealed, other)
    with pytest.raises(ConfigError, match=r"must be opened with a site's client_context\.tenseal, got none"):
        opened(sealed, None)
    assert opened(MODEL, None) == MODEL


def test_two_ciphertexts_of_the_same_numbers_have_nothing_in_common() -> None:
    cipher = Cipher.fresh(SHARED)
    row = np.ones(SHARED.slots)
    one, two = (np.frombuffer(cipher.encrypted(row, 40), np.uint8) for _ in range(2))
    size = min(one.size, two.size)
    assert np.mean(one[200:size] == two[200:size]) < 0.02  # by chance: 1 / 256


def test_contexts_hold_the_keys_of_their_owners_alone() -> None:
    server, shared = make_contexts(["a", "b"])
    assert [Cipher.holds_secret(data) for data in (server, *shared.values())] == [False, True, True]
    assert shared["a"] == shared["b"]
    server, held = make_contexts(["a", "b"], "b")
    assert [Cipher.holds_secret(data) for data in (server, *held.values())] == [False, False, True]
    assert not Cipher.of(held["a"], HELD, "a").is_secret
    with pytest.raises(ConfigError, match="he_holder must be one of the sites a, b, got 'c'"):
        make_contexts(["a", "b"], "c")
    assert not Cipher.holds_secret(b"nothing")


def test_a_server_that_could_decrypt_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, shared = make_contexts(["a"])
    (tmp_path / SERVER_CONTEXT).write_bytes(server)
    check_server_kit(tmp_path)
    (tmp_path / SERVER_CONTEXT).write_bytes(shared["a"])
    with pytest.raises(ConfigError, match="a server's context must hold no secret key"):
        check_server_kit(tmp_path)
    (tmp_path / SERVER_CONTEXT).rename(tmp_path / CLIENT_CONTEXT)
    monkeypatch.delenv("_SFL_SERVER_KIT", raising=False)
    assert kit_of_server() is None
    monkeypatch.setenv("_SFL_SERVER_KIT", "")
    use_server_kit(tmp_path)
    with pytest.raises(ConfigError, match="must hold no secret key"):
        _recipe(secure=CKKS()).execute()


def test_a_kit_must_have_the_context_that_the_job_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"must hold client_context\.tenseal for homomorphic encryption, got none"):
        kit_cipher(tmp_path, SHARED)
    path = tmp_path / CLIENT_CONTEXT
    server, held = make_contexts(["a", "b"], "b")
    for content, said in (
        (b"nothing", "must be a context of TenSEAL"),
        (held["b"], "got N = 8192 and 170 bits"),
        (make_contexts(["a"])[0], "must hold the sites' secret key, got none"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=said):
            CKKS().identity("a", tmp_path)
    path.write_bytes(make_contexts(["a"])[1]["a"])
    monkeypatch.setenv("_SFL_SITE_KIT", "")
    use_kit(tmp_path)
    site = CKKS().site("a", SecretStore(None), CKKS().identity("a", tmp_path))
    assert isinstance(site, CkksSite)
    assert server


def test_it_works_without_files_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.memfd_create")
    monkeypatch.setattr("sfl.privacy.he.cipher._HERE", threading.local())
    cipher = Cipher.fresh(SHARED)
    row = np.arange(SHARED.slots) / 4096
    assert np.abs(cipher.decrypted(cipher.encrypted(row, 40)) - row).max() < 1e-8


def test_a_context_of_flares_own_builder_serves_if_its_parameters_do() -> None:
    kind = ts.ENCRYPTION_TYPE.SYMMETRIC
    context = ts.context(ts.SCHEME_TYPE.CKKS, 4096, coeff_mod_bit_sizes=[54, 54], encryption_type=kind)
    context.global_scale = 2**40
    data = context.serialize(save_public_key=True, save_secret_key=True, save_galois_keys=False, save_relin_keys=True)
    assert Cipher.of(data, SHARED, "kit").is_secret


# what sites and servers refuse


def test_a_holder_opens_no_sum_of_too_few_and_none_twice(tmp_path: Path) -> None:
    secure = CKKS(holder="a").among(2, 4)
    _, contexts = make_contexts(["a", "b"], "a")
    holder = CkksSite("a", secure, Cipher.of(contexts["a"], HELD, "a"), SecretStore(tmp_path / "a"), binding=True)
    other = CkksSite("b", secure, Cipher.of(contexts["b"], HELD, "b"), SecretStore(tmp_path / "b"), binding=True)
    one, cipher = {"w": np.zeros(2)}, Cipher.of(contexts["b"], HELD, "b")
    other.opened(Task(FIT, 1, one))
    sent = other.closed(Update("b", {"w": np.ones(2)}, 1.0), Task(FIT, 1, {}), one).delta
    layout = secure.layout(one, ["w"])
    task = Task(OPEN, 1, {LAYOUT: layout.packed(), **sent})
    with pytest.raises(ProtocolError, match="a sum must be of at least 2 sites, got 1"):
        holder.answer(task)
    total = cipher.loaded(next(parts_of(sent["ckks/00000"], 1)), secure.scale_bits)
    cipher.add(total, total)
    two = Task(OPEN, 1, {LAYOUT: layout.packed(), "ckks/00000": framed([cipher.packed(total)])})
    told = holder.answer(two).delta["ckks/00000"].reshape(-1)[4:6]  # what was refused does not count
    assert np.abs(told - 1.0).max() < 1e-6
    with pytest.raises(ProtocolError, match="a round must be opened once, got 1 again"):
        holder.answer(two)
    with pytest.raises(ProtocolError, match="sums must be decrypted by a"):
        other.answer(task)
    with pytest.raises(ProtocolError, match="must have the secret key"):
        CkksSite("a", secure, cipher, SecretStore(None), binding=False).answer(task)
    with pytest.raises(ProtocolError, match="must be decrypted by each site for itself"):
        Federation(CKKS()).sites["site-1"].answer(task)
    with pytest.raises(ProtocolError, match="must be one of homomorphic encryption, got 'what'"):
        holder.answer(Task("what", 1, {}))
    with pytest.raises(ProtocolError, match="must hold all of its ciphertexts"):
        holder.answer(Task(OPEN, 2, {LAYOUT: task.parameters[LAYOUT]}))


def test_numbers_past_the_clip_are_not_sent() -> None:
    federation = Federation(CKKS(clip=50.0))
    federation.lost = ("site-2", "site-3", "site-4")
    with pytest.raises(RoundError):
        federation.run()
    assert "numbers must be within he_clip = 50" in federation.refused["site-1"]
    federation = Federation(CKKS(), 2)
    federation.updates["site-1"]["steps"] = np.array([2**25, 0])
    federation.updates["site-2"]["bias"] = np.array([np.nan, 0.0])
    with pytest.raises(RoundError):
        federation.run()
    assert "whole ones within 2^24" in federation.refused["site-1"]
    assert "must be finite, got NaN" in federation.refused["site-2"]


def _swapped(update: Update, block: Any) -> Update:
    return replace(update, delta={**update.delta, "ckks/00000": block})


def _foreign(update: Update, scheme: Scheme, bits: int, count: int = 2) -> Update:
    cipher = Cipher.fresh(scheme)
    return _swapped(update, framed([cipher.encrypted(np.zeros(scheme.slots), bits)] * count))


@pytest.mark.parametrize(
    ("forged", "said"),
    [
        (lambda update: replace(update, delta={}), "must hold 1 arrays of ciphertexts"),
        (lambda update: _swapped(update, np.zeros(3, np.uint8)), "must hold 2 of them, got 3 other bytes"),
        (lambda update: _swapped(update, update.delta["ckks/00000"][:-1]), "other bytes"),
        (lambda update: _swapped(update, update.delta["ckks/00000"].astype(np.int64)), "other bytes"),
        (lambda update: _swapped(update, framed([b"", b""])), "must be one under the job's parameters"),
        (lambda update: _swapped(update, framed([b"x" * 100] * 2)), "must be one under the job's parameters"),
        (lambda update: _swapped(update, framed([b"x" * (1 << 21)] * 2)), "it is too long"),
        (lambda update: _foreign(update, HELD, 60), "must be one under the job's parameters"),
        (lambda update: _foreign(update, SHARED, 20), "must be of scale"),
        (lambda update: replace(update, delta={**update.delta, "extra": np.ones(2)}), "unexpected 'extra'"),
    ],
)
def test_an_update_that_would_spoil_the_sum_is_turned_away_whole(forged: Callable[[Update], Update], said: str) -> None:
    federation = Federation(CKKS())
    federation.forge = lambda name, update: forged(update) if name == "site-2" else update
    total = federation.run()
    assert said in federation.refused["site-2"]
    mean = federation.mean("site-1", "site-3", "site-4")
    assert np.abs(_model(federation, total)["bias"] - (MODEL["bias"] + mean["bias"])).max() < 1e-8


def test_a_ciphertext_of_three_polynomials_is_none_of_ours() -> None:
    cipher = Cipher.fresh(SHARED)
    evaluator, one = cipher._evaluator, cipher.loaded(cipher.encrypted(np.zeros(SHARED.slots), 20), 20)
    evaluator.square_inplace(one)
    with pytest.raises(ProtocolError, match="it has other parameters"):
        cipher.loaded(cipher.packed(one), 40)


def test_what_a_holder_must_not_answer_is_turned_away() -> None:
    federation = Federation(CKKS(holder="site-1"))
    federation.forge = lambda _, update: replace(update, delta={}) if "ckks/00000" in update.delta else update
    with pytest.raises(RoundError):
        federation.run()
    federation.forge = lambda _, update: (
        replace(update, delta={"ckks/00000": np.ones(3)}) if update.delta["ckks/00000"].dtype.kind == "f" else update
    )
    with pytest.raises(RoundError, match="got no answer"):
        federation.run()
    assert "must have shape (1, 8192)" in federation.refused["site-1"]


def test_parts_and_layouts_must_be_whole() -> None:
    for bad in ({}, {LAYOUT: np.zeros(3, np.uint8)}, {LAYOUT: np.frombuffer(b'{"names": []}', np.uint8)}):
        with pytest.raises(ProtocolError, match="must say how it is laid out"):
            Layout.read(bad)
    assert list(parts_of(framed([b"ab", b"c"]), 2)) == [b"ab", b"c"]


# whole runs


def _recipe(kind: type[FedAvgRecipe] = FedAvgRecipe, **more: Any) -> FedAvgRecipe:
    federation = FederationConfig(**{"num_clients": 3, "num_rounds": 2, **more.pop("federation", {})})
    initial = {"w": np.zeros(3), "b": np.zeros(1)}
    return kind(
        name="sealed", client=algorithm_clients.Steered, initial_parameters=initial, federation=federation, **more
    )


SEALED = [CKKS(), CKKS(layers="w")]


@pytest.mark.parametrize("secure", [*SEALED, CKKS(holder="site-3")])
@pytest.mark.parametrize("kind", [FedAvgRecipe, FedProxRecipe, DittoRecipe])
def test_a_run_is_the_plain_one_within_the_error(kind: type[FedAvgRecipe], secure: CKKS) -> None:
    plain = _recipe(kind, federation={"weighting": "equal"}).execute()
    result = _recipe(kind, secure=secure).execute()
    assert result.is_sealed is secure.seals is is_sealed(result.parameters)
    for name, value in result.open().items():
        assert np.abs(value - plain.parameters[name]).max() < 1e-6
    assert "loss" not in result.rounds[-1].fit
    assert abs(result.rounds[-1].evaluation["loss"] - plain.rounds[-1].evaluation["loss"]) < 1e-5


@pytest.mark.parametrize("kind", [FedOptRecipe, ScaffoldRecipe])
def test_with_a_holder_the_server_may_compute(kind: type[FedAvgRecipe]) -> None:
    plain = _recipe(kind, federation={"weighting": "equal"}).execute()
    result = _recipe(kind, secure=CKKS(holder="site-1")).execute()
    for name, value in result.parameters.items():
        assert np.abs(value - plain.parameters[name]).max() < 1e-4
    with pytest.raises(CompositionError, match="without a holder must come with fedavg, fedprox or ditto"):
        _recipe(kind, secure=CKKS()).build()


def test_workers_have_one_key() -> None:
    result = _recipe(secure=CKKS(), federation={"workers": 2}).execute(SimEnv(num_threads=2))
    plain = _recipe(federation={"weighting": "equal"}).execute()
    assert np.abs(result.open()["w"] - plain.parameters["w"]).max() < 1e-8


def test_what_it_does_not_go_with_is_refused_before_the_run() -> None:
    noise = GaussianMechanism(clip_norm=1.0, noise_multiplier=1.0)
    for more, said in (
        ({"aggregator": Krum(byzantine=0)}, "must come with an aggregator of sums, got Krum"),
        ({"aggregator": Sum()}, "without a holder must come with the mean, got Sum"),
        ({"mechanisms": (noise,)}, "noise must be the sites' own"),
        ({"mechanisms": (replace(noise, where="distributed", shares=2),)}, "must be of whole numbers"),
        ({"federation": {"message_dtype": "int8"}}, "message_dtype must be float32 where messages are ciphertexts"),
        ({"federation": {"num_clients": 1}}, "rounds of at least 2 sites, got 1"),
        ({"federation": {"weighting": "examples"}}, "max_weight of CKKS must be the largest number of examples"),
        ({"central": lambda parameters: {}}, "central must be none"),
        ({"server_learning_rate": 0.5}, "at a server learning rate of 1"),
        ({"secure": CKKS(clip=1e12)}, "he_clip times the number of sites"),
    ):
        with pytest.raises(CompositionError, match=said):
            _recipe(**{"secure": CKKS(), **more}).build()


def test_noise_of_a_sites_own_goes_with_it() -> None:
    noise = GaussianMechanism(clip_norm=1.0, noise_multiplier=1.0, where="local")
    result = _recipe(secure=CKKS(), mechanisms=(noise,), evaluate_every=0).execute()
    assert np.isfinite(result.open()["w"]).all()


def test_a_schedule_and_frozen_layers_go_with_it() -> None:
    from sfl.privacy.filters.layers import FreezeLayers

    frozen = (FreezeLayers(("b",)),)
    plain = _recipe(transforms=frozen, federation={"weighting": "equal"}).execute()
    result = _recipe(secure=CKKS(), transforms=frozen).execute()
    assert [name for name, _, _ in Layout.read(result.parameters).closed] == ["w"]
    assert (result.parameters["b"] == 0.0).all()
    assert np.abs(result.open()["w"] - plain.parameters["w"]).max() < 1e-8
    schedule = Schedule(kind="step", rounds=2, every=1, gamma=0.5)
    assert _recipe(secure=CKKS(), schedule=schedule).execute().is_sealed


def test_a_run_goes_on_where_it_was_and_not_in_another_way(tmp_path: Path) -> None:
    short, long = {"num_rounds": 1}, {"num_rounds": 3}
    _recipe(secure=CKKS(), federation=short).execute(out=tmp_path / "run")
    with pytest.raises(ConfigError, match="with homomorphic encryption as it was begun"):
        _recipe(secure=CKKS(holder="site-1"), federation=long).execute(out=tmp_path / "run", resume=True)
    result = _recipe(secure=CKKS(), federation=long).execute(out=tmp_path / "run", resume=True)
    plain = _recipe(federation={**long, "weighting": "equal"}).execute()
    assert np.abs(result.open()["w"] - plain.parameters["w"]).max() < 1e-8


def test_no_number_of_a_model_lies_with_the_server(tmp_path: Path) -> None:
    _recipe(secure=CKKS(), federation={"num_rounds": 1}).execute(out=tmp_path / "run")
    state = Checkpoints(RunFolder(tmp_path / "run").checkpoints).load_latest(lambda text: None)
    assert state is not None
    assert set(state.parameters) == {LAYOUT, "ckks/00000"}
    kept = tmp_path / "run" / "sites" / "simulated_4096.tenseal"
    assert kept.stat().st_mode & 0o077 == 0


def test_who_holds_which_key_is_said_at_the_start() -> None:
    recorder = clients.Recorder()
    for secure in (CKKS(), CKKS(holder="site-2", layers="w")):
        _recipe(secure=secure).execute(observers=(recorder,))
    said = "\n".join(event.text for event in recorder.events if isinstance(event, Notice))
    assert "CKKS, N = 4096, 108 bits of modulus, 128-bit security" in said
    assert "all sites have the same secret key, the server has none" in said
    assert "site-2 alone has the secret key, the other sites a public one, the server none" in said
    assert "only the arrays chosen by 'w' are encrypted" in said


def test_a_site_that_fails_is_left_out_and_more_sites_than_planned_are_refused() -> None:
    class Fails(algorithm_clients.Steered):
        def compute_update(self, parameters: Any, config: Any) -> Any:
            if self.client_id == 1:
                raise ValueError("secret words")
            return super().compute_update(parameters, config)

    recorder = clients.Recorder()
    replace(_recipe(secure=CKKS()), client=Fails).execute(observers=(recorder,))
    finished = [event for event in recorder.events if isinstance(event, SiteFinished) and event.stage == FIT]
    assert [event.status for event in finished[:3]] == [Status.USED, Status.FAILED, Status.USED]
    assert "secret words" not in finished[1].reason
    with pytest.raises(CompositionError, match="got a round of 5 and ciphertexts with room for 3"):
        _recipe(secure=CKKS()).execute(SimEnv(num_clients=5))


# the recipe


SCRIPT = """
import numpy as np
import sfl.client.api as flare
flare.init()
while flare.is_running():
    model = flare.receive()
    model.params = {name: value + 1.0 for name, value in model.params.items()}
    model.metrics = {"loss": 1.0}
    model.meta["NUM_STEPS_CURRENT_ROUND"] = 10
    flare.send(model)
"""


def test_the_recipe_of_flares_name_runs_in_simulation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    recipe = FedAvgRecipeWithHE(
        min_clients=2,
        num_rounds=2,
        model={"conv1.w": np.zeros(3, np.float32), "fc.w": np.ones(2, np.float32)},
        train_script=str(tmp_path / "train.py"),
        encrypt_layers="conv",
        server_memory_gc_rounds=1,
        client_memory_gc_rounds=2,
        cuda_empty_cache=True,
        params_transfer_type="DIFF",
        server_expected_format="numpy",
    )
    given_back: list[str] = []
    for where in ("sfl.server.callbacks", "sfl.client.callbacks"):
        monkeypatch.setattr(f"{where}.trim", lambda where=where: given_back.append(where))
    result = recipe.execute()
    assert given_back == ["sfl.server.callbacks"] * 2 + ["sfl.client.callbacks"] * 2 + ["sfl.server.callbacks"]
    again = recipe.resolved()
    assert again.resolved() == again
    assert [name for name, _, _ in Layout.read(result.parameters).closed] == ["conv1.w"]
    assert np.allclose(result.open()["conv1.w"], 2.0, atol=1e-6)
    assert np.allclose(result.open()["fc.w"], 3.0, atol=1e-6)


def test_a_cache_on_a_gpu_is_emptied_after_training(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[str] = []
    there = SimpleNamespace(is_available=lambda: True, empty_cache=lambda: emptied.append("yes"))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=there))
    for name in (EVALUATE, FIT):
        TrimSiteMemory(cuda=True).on_task_finished("a", Task(name, 1, {}), Reply("a", Status.USED))
    assert emptied == ["yes"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"encrypt_layers": "("}, "encrypt_layers must be None, names, or a regular expression"),
        ({"encrypt_layers": ""}, "encrypt_layers must be"),
        ({"encrypt_layers": []}, "encrypt_layers must be"),
        ({"encrypt_layers": [3]}, "encrypt_layers must be"),
        ({"encrypt_layers": 3}, "encrypt_layers must be"),
        ({"min_clients": 0}, "min_clients must be a whole number of at least 1, got 0"),
        ({"num_rounds": 2.5}, "num_rounds must be a whole number"),
        ({"server_memory_gc_rounds": -1}, "server_memory_gc_rounds must be a whole number of at least 0, got -1"),
        ({"client_memory_gc_rounds": True}, "client_memory_gc_rounds must be"),
        ({"he_clip": 0.0}, "he_clip must be positive"),
        ({"he_max_weight": 0}, "he_max_weight must be between"),
        ({"aggregator": "mean"}, "aggregator must be an Aggregator of sfl, got str"),
        ({"secure": CKKS(holder="a")}, "secure must be left to this recipe"),
        ({"params_transfer_type": "WHAT"}, "params_transfer_type must be one of"),
        ({"server_expected_format": "jax"}, "server_expected_format must be one of"),
    ],
)
def test_its_arguments_are_looked_at(more: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, CompositionError), match=said):
        FedAvgRecipeWithHE(**{"min_clients": 2, "model": {"w": np.zeros(2)}, "train_script": "train.py", **more})


@pytest.mark.parametrize(("layers", "said"), [(["w", "x"], r"got 'x'\. "), ("nothing", "which chooses none of 2")])
def test_layers_that_are_not_there_are_said(layers: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _recipe(FedAvgRecipeWithHE, encrypt_layers=layers).execute()
    with pytest.raises(ConfigError, match="must have no array whose name starts with ckks/"):
        CKKS().begin({"ckks/00000": np.zeros(1)}, {}, [])


# the command line


def test_keys_are_made_and_a_model_is_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["he", "keys", "a,b", "--out", str(tmp_path / "keys"), "--holder", "b"]) == 0
    assert "b can decrypt; the server's holds no key" in capsys.readouterr().out
    assert Cipher.holds_secret((tmp_path / "keys" / "b" / CLIENT_CONTEXT).read_bytes())
    for arguments in (["a", "--out", str(tmp_path / "keys")], ["a,a"], [" , "], ["../a"]):
        assert main(["he", "keys", *arguments]) == 2
    run = tmp_path / "run"
    result = _recipe(secure=CKKS()).execute(out=run)
    assert main(["he", "open", str(run)]) == 0
    from safetensors.numpy import load_file

    assert np.array_equal(load_file(run / "model.safetensors")["w"], result.open()["w"])
    newest = Checkpoints(RunFolder(run).checkpoints).paths()[-1]
    context = tmp_path / CLIENT_CONTEXT
    context.write_bytes(result.key or b"")
    assert main(["he", "open", str(newest), "--context", str(context), "--out", str(tmp_path / "m.safetensors")]) == 0
    assert (tmp_path / "m.safetensors").exists()
    assert main(["he", "open", str(run / "checkpoints" / "none.safetensors")]) == 2
    (run / "sites" / "simulated_4096.tenseal").unlink()
    assert main(["he", "open", str(run)]) == 2
    assert main(["he", "open", str(tmp_path)]) == 2


def test_what_it_needs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tenseal.sealapi", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'sfl\[he\]'"):
        CKKS().require(4)


def test_a_model_of_many_ciphertexts_goes_round() -> None:
    model: Parameters = {"w": np.linspace(-1.0, 1.0, 600_000), "v": np.ones(3)}
    for secure in (CKKS(layers=["w"]), CKKS(holder="site-1")):  # pyright: ignore[reportArgumentType] - as read back
        federation = Federation(secure, 2, parameters=model)
        federation.updates = {name: {"w": np.full(600_000, 0.5), "v": np.ones(3)} for name in federation.names}
        total = federation.run()
        moved = total.mean.delta
        if secure.seals:
            sealed = federation.secure.sealed(moved)
            assert Layout.read(sealed).blocks == 3
            moved = {
                "w": opened({**sealed, "v": model["v"]}, federation.secure.key(SecretStore(None)))["w"] - model["w"]
            }
        assert np.abs(moved["w"] - 0.5).max() < 1e-6


def test_kits_hold_what_each_site_may_have() -> None:
    keeper = SecretStore(None)
    held = CKKS(holder="b").kits(["a", "b"], keeper)
    assert [Cipher.holds_secret(held[name][CLIENT_CONTEXT]) for name in ("a", "b")] == [False, True]
    shared = CKKS().kits(["a", "b"], keeper)
    assert shared["a"][CLIENT_CONTEXT] == shared["b"][CLIENT_CONTEXT]
    assert Cipher.of(shared["a"][CLIENT_CONTEXT], SHARED, "a").is_secret


# what a review has found


@pytest.mark.parametrize("holder", ["", "site-1"])
@pytest.mark.parametrize("max_weight", [1, 1000, 65_536, 2**31])
def test_the_error_that_is_said_holds_for_sites_of_little_weight(holder: str, max_weight: int) -> None:
    secure = CKKS(holder=holder, max_weight=max_weight)
    federation = Federation(secure)
    total, mean = federation.run(), federation.mean()
    got = _model(federation, total) if secure.seals else {n: v + MODEL[n] for n, v in total.mean.delta.items()}
    said = float(federation.secure.described(4)[-1].partition("right to ")[2].partition(",")[0])
    assert said < 1e-6
    assert np.abs(got["bias"] - (MODEL["bias"] + mean["bias"])).max() <= said
    assert np.abs(got["steps"] - (MODEL["steps"] + mean["steps"])).max() <= 0.6


def test_the_stated_error_holds_where_all_send_the_same() -> None:
    cipher, n = Cipher.fresh(SHARED), 1000
    row = np.random.default_rng(0).uniform(-1, 1, SHARED.slots)
    total = cipher.loaded(cipher.encrypted(row, 30), 30)
    for _ in range(n - 1):
        cipher.add(total, cipher.loaded(cipher.encrypted(row, 30), 30))
    assert np.abs(cipher.decrypted(cipher.packed(total)) - n * row).max() < SHARED.error(30, n)


def test_a_ciphertext_of_another_form_is_turned_away() -> None:
    federation = Federation(CKKS())
    cipher = Cipher.fresh(SHARED)

    def forge(name: str, update: Update) -> Update:
        if name != "site-2":
            return update
        parts = [cipher.loaded(p, federation.secure.scale_bits) for p in parts_of(update.delta["ckks/00000"], 2)]
        for part in parts:
            cipher._evaluator.transform_from_ntt_inplace(part)
        return _swapped(update, framed([cipher.packed(part) for part in parts]))

    federation.forge = forge
    total = federation.run()
    assert "another form" in federation.refused["site-2"]
    assert total.sites == ("site-1", "site-3", "site-4")


def test_two_sites_that_send_opposites_end_nothing() -> None:
    federation = Federation(CKKS())
    cipher, kept = Cipher.fresh(SHARED), list[Any]()

    def forge(name: str, update: Update) -> Update:
        if name == "site-1":
            kept.append(update.delta["ckks/00000"])
        if name != "site-2":
            return update
        parts = [cipher.loaded(part, federation.secure.scale_bits) for part in parts_of(kept[0], 2)]
        for part in parts:
            cipher._evaluator.negate_inplace(part)
        return _swapped(update, framed([cipher.packed(part) for part in parts]))

    federation.forge = forge
    assert federation.run().sites == tuple(federation.names)


def test_seals_own_errors_are_not_swallowed() -> None:
    cipher = Cipher.fresh(SHARED)
    one, two = (cipher.loaded(cipher.encrypted(np.ones(SHARED.slots), bits), bits) for bits in (30, 40))
    with pytest.raises((RuntimeError, ValueError), match="scale mismatch"):
        cipher.add(one, two)


@pytest.mark.parametrize(("clip", "value"), [(0.25, 0.9), (0.5, 1.0)])
def test_a_small_clip_is_a_clip(clip: float, value: float) -> None:
    federation = Federation(CKKS(clip=clip), 8, parameters={"w": np.zeros(4)})
    federation.updates = {name: {"w": np.full(4, value)} for name in federation.names}
    with pytest.raises(RoundError):
        federation.run()
    assert len(federation.refused) == 8
    federation.updates = {name: {"w": np.full(4, clip)} for name in federation.names}
    sealed = federation.secure.sealed(federation.run().mean.delta)
    assert np.abs(opened(sealed, federation.secure.key(SecretStore(None)))["w"] - clip).max() < 1e-8


def test_the_model_of_one_site_is_nobodys_next() -> None:
    federation = Federation(CKKS(), lost=("site-2", "site-3", "site-4"))
    with pytest.raises(RoundError, match="must be the sum of at least 2 sites, got 1"):
        federation.run()
    alone = Federation(CKKS(), 2)
    alone.secure = replace(alone.secure, least=1)
    alone.lost = ("site-2",)
    sealed = alone.secure.sealed(alone.run().mean.delta)
    with pytest.raises(ProtocolError, match="a model must be the sum of at least 2 sites, got 1"):
        alone.sites["site-1"].opened(Task(EVALUATE, 1, sealed))


def test_what_a_holder_tells_is_within_the_clip() -> None:
    federation = Federation(CKKS(holder="site-1"))
    federation.forge = lambda _, update: (
        replace(update, delta={"ckks/00000": np.full((1, 8192), 1e300)})
        if update.delta["ckks/00000"].dtype.kind == "f"
        else update
    )
    with pytest.raises(RoundError):
        federation.run()
    assert "a mean must be within he_clip = 64" in federation.refused["site-1"]


def test_a_site_weighs_no_more_than_the_largest() -> None:
    federation = Federation(CKKS(layers="w"))
    federation.forge = lambda name, update: replace(update, weight=1e12) if name == "site-3" else update
    assert federation.run().sites == ("site-1", "site-2", "site-4")
    assert "weight must be a share of the largest" in federation.refused["site-3"]


def test_what_would_encrypt_nothing_is_refused() -> None:
    from sfl.privacy.filters.layers import FreezeLayers

    with pytest.raises(ConfigError, match="at least one array that sites send, got 'b', which chooses none of 1"):
        _recipe(secure=CKKS(layers="b"), transforms=(FreezeLayers(("b",)),)).execute()
    with pytest.raises(ConfigError, match=r"he_holder must be one of the sites, got 'nobody'\. Known: site-1"):
        _recipe(secure=CKKS(holder="nobody")).execute()


def test_a_run_goes_on_with_the_same_protection(tmp_path: Path) -> None:
    _recipe(secure=CKKS(), federation={"num_rounds": 1}).execute(out=tmp_path / "run")
    for other in (CKKS(layers="b"), CKKS(clip=8.0), SecAgg()):
        with pytest.raises(ConfigError, match="as it was begun"):
            _recipe(secure=other, federation={"num_rounds": 2}).execute(out=tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"clip": "64"}, "he_clip must be a number, got '64'"),
        ({"clip": True}, "he_clip must be a number, got True"),
        ({"max_weight": 2.5}, "he_max_weight must be a whole number, got 2.5"),
        ({"holder": None}, "he_holder must be a site's name, or empty, got None"),
    ],
)
def test_options_are_of_their_kind(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CKKS(**more)
    assert isinstance(CKKS(clip=np.float32(3)).clip, float)  # pyright: ignore[reportArgumentType] - as users do


def test_a_servers_name_and_odd_ones_get_no_keys(tmp_path: Path) -> None:
    for sites in ("server,a", "a\nb", "a b"):
        assert main(["he", "keys", sites, "--out", str(tmp_path / "keys")]) == 2
    (tmp_path / "file").write_text("")
    assert main(["he", "keys", "a", "--out", str(tmp_path / "file")]) == 2
    assert not (tmp_path / "keys").exists()
