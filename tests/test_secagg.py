"""Secure aggregation: exact sums of those who stayed, and a server that learns nothing else."""

from __future__ import annotations

import datetime
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg_sites import AGREE, STAGES, UNMASK, Federation, with_config
from sfl.core.task import EVALUATE, FIT, Task, Update
from sfl.engine.flower.keys import make_kits
from sfl.engine.kit import kit_of_site, use_kit
from sfl.errors import CompositionError, ConfigError, MissingExtraError, ProtocolError, RoundError
from sfl.io.site_store import SecretStore
from sfl.privacy.secagg import SecAgg
from sfl.privacy.secagg.fixed import FixedPoint
from sfl.privacy.secagg.graph import arranged, check_threshold, degree, least_threshold, neighbours
from sfl.privacy.secagg.identity import CertifiedIdentity, RehearsedIdentity
from sfl.privacy.secagg.messages import Bundle
from sfl.privacy.secagg.primitives import add_mask, agree, new_key, opened, public_of, sealed
from sfl.privacy.secagg.shamir import PRIME, SHARE, recovered, shared

ED25519 = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

# Primitives


def test_a_mask_is_the_key_stream_of_aes_in_counter_mode() -> None:
    narrow, wide, seed = np.zeros(100_003, np.uint32), np.zeros(5, np.uint64), bytes(range(32))
    add_mask((narrow, wide), seed)
    blocks = np.arange(30_000, dtype=np.uint64)
    counters = np.zeros((30_000, 16), np.uint8)
    counters[:, 8:] = blocks.astype(">u8").view(np.uint8).reshape(-1, 8)
    cipher = Cipher(AES(seed), ECB()).encryptor()
    stream = cipher.update(counters.tobytes())
    assert narrow.tobytes() == stream[: narrow.nbytes]
    # the stream goes on from array to array, in whole blocks of what was asked of it
    assert wide.tobytes() == stream[narrow.nbytes :][: wide.nbytes]


def test_masks_cancel() -> None:
    words = np.arange(70_000, dtype=np.uint64)
    add_mask((words,), b"a" * 32)
    assert np.count_nonzero(words == np.arange(70_000)) == 0
    add_mask((words,), b"a" * 32, subtract=True)
    assert np.array_equal(words, np.arange(70_000))


def test_two_sites_agree_for_one_purpose() -> None:
    one, other = new_key(), new_key()
    assert agree(one, public_of(other), b"p") == agree(other, public_of(one), b"p")
    assert agree(one, public_of(other), b"p") != agree(one, public_of(other), b"q")


@pytest.mark.parametrize("public", [bytes(32), b"\x01" + bytes(31), b"short"])
def test_a_key_that_makes_every_secret_the_same_is_refused(public: bytes) -> None:
    with pytest.raises(ProtocolError, match="must be one of X25519"):
        agree(new_key(), public, b"p")


def test_a_share_opens_for_what_it_is_about_alone() -> None:
    data = sealed(b"k" * 32, b"share", b"a to b")
    assert opened(b"k" * 32, data, b"a to b") == b"share"
    changed = data[:-1] + bytes([data[-1] ^ 1])
    for key, came, about in (
        (b"k", data, b"b to a"),
        (b"l", data, b"a to b"),
        (b"k", changed, b"a to b"),
        (b"k", b"", b""),
    ):
        with pytest.raises(ProtocolError, match="must open"):
            opened(key * 32, came, about)


def test_the_field_is_of_a_prime_above_2_to_256() -> None:
    assert PRIME > 2**256
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):  # Miller and Rabin
        power = pow(base, odd, PRIME)
        witnesses = [pow(power, 2**step, PRIME) for step in range(twos)]
        assert power == 1 or PRIME - 1 in witnesses
    assert all(pow(3, number - 1, number) != 1 for number in range(2**256 + 1, PRIME, 2))  # there is none between


@given(st.binary(min_size=32, max_size=32), st.integers(1, 8), st.integers(0, 4), st.randoms())
@settings(max_examples=50, deadline=None)
def test_any_threshold_of_shares_gives_the_secret_back(secret: bytes, threshold: int, more: int, draw: object) -> None:
    places = list(range(1, threshold + more + 1))
    shares = dict(zip(places, shared(secret, threshold, places), strict=True))
    chosen = dict(draw.sample(sorted(shares.items()), threshold))  # type: ignore[attr-defined]
    assert recovered(chosen) == recovered(shares) == secret
    assert all(len(share) == SHARE for share in shares.values())


def test_fewer_shares_are_of_every_secret_alike() -> None:
    shares = dict(zip((1, 2, 3), shared(b"s" * 32, 3, (1, 2, 3)), strict=True))
    for other in (b"a" * 32, b"z" * 32):  # with two of the shares, a third exists that gives any other secret
        value, known = int.from_bytes(other, "little"), [int.from_bytes(shares[place], "little") for place in (1, 2)]
        third = (value - 3 * known[0] + 3 * known[1]) % PRIME  # the parabola through all three, read at 3
        found = recovered({1: shares[1], 2: shares[2], 3: third.to_bytes(SHARE, "little")})
        assert found == other


@pytest.mark.parametrize(
    "case", [(b"short", 1, (1,)), (b"s" * 32, 3, (1, 2)), (b"s" * 32, 1, (0, 1)), (b"s" * 32, 2, (1, 1))]
)
def test_a_secret_that_cannot_be_shared_out_is_refused(case: tuple[bytes, int, tuple[int, ...]]) -> None:
    with pytest.raises(ConfigError, match="must be shared out"):
        shared(*case)


@pytest.mark.parametrize("shares", [{}, {1: b"\xff" * SHARE}, {1: (2**256 + 5).to_bytes(SHARE, "little")}])
def test_shares_of_no_secret_are_refused(shares: dict[int, bytes]) -> None:
    with pytest.raises(ProtocolError, match="a secret of 32 bytes"):
        recovered(shares)


# The graph


@given(st.integers(2, 40), st.integers(1, 20), st.binary(max_size=8))
@settings(max_examples=100, deadline=None)
def test_the_graph_is_regular_and_goes_both_ways(n: int, half: int, seed: bytes) -> None:
    names = [f"s{number}" for number in range(n)]
    k = min(2 * half, n - 1)
    circle = arranged(names, seed)
    around = {name: neighbours(circle, name, k) for name in names}
    assert {len(set(others)) for others in around.values()} == {k}
    assert all(name in around[other] and other != name for name in names for other in around[name])


def test_a_graph_is_as_safe_as_it_says() -> None:
    """Against sums of exact binomials, by the paper's three conditions."""
    for n, corrupt, dropped in ((100, 0.2, 0.1), (300, 0.1, 0.1), (1000, 0.2, 0.05)):
        found = degree(n, corrupt, dropped)
        bad, gone, k, t = math.ceil(corrupt * n), math.ceil(dropped * n), found.neighbours, found.threshold
        total = math.comb(n - 1, k)
        pooled = sum(math.comb(bad, hits) * math.comb(n - 1 - bad, k - hits) for hits in range(t, k + 1))
        short = sum(math.comb(gone, hits) * math.comb(n - 1 - gone, k - hits) for hits in range(k - t + 1, k + 1))
        assert n * pooled * 2**40 <= total
        assert n * short * 2**20 <= total
        assert n * ((bad + gone) / n) ** (k // 2) <= 2.0**-40
        assert t >= least_threshold(k)
        assert k < n - 1


def test_the_graph_grows_as_a_logarithm() -> None:
    sizes = [degree(n, 0.2, 0.1).neighbours for n in (100, 1_000, 10_000)]
    assert sizes == [54, 78, 96]
    assert degree(4, 0.2, 0.1).neighbours == 3  # all with all, where there are few


@pytest.mark.parametrize(("shares", "threshold"), [(9, 5), (9, 10), (3, 1), (0, 0)])
def test_a_threshold_below_two_thirds_is_refused(shares: int, threshold: int) -> None:
    with pytest.raises(ValueError, match=r"ceil\(2 \* shares / 3\)"):
        check_threshold(shares, threshold)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shares": 6, "threshold": 3}, "secagg_threshold must be between"),
        ({"shares": 5}, "secagg_shares must be even"),
        ({"bits": 20}, "secagg_bits must be one of"),
        ({"clip": 0.0}, "secagg_clip must be positive"),
        ({"clip": math.nan}, "secagg_clip must be positive"),
        ({"max_weight": 0}, "secagg_max_weight must be between"),
        ({"corrupt": 0.4}, "corrupt must be"),
        ({"dropped": -0.1}, "dropped must be"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SecAgg(**options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("secure", "cohort", "words"), [(SecAgg(), 1, "at least 2 sites"), (SecAgg(bits=16), 70_000, "room")]
)
def test_rounds_that_cannot_be_summed_are_refused(secure: SecAgg, cohort: int, words: str) -> None:
    with pytest.raises(CompositionError, match=words):
        secure.require(cohort)


def test_with_fewer_sites_than_planned_the_threshold_follows() -> None:
    secure = SecAgg(shares=10, threshold=9)
    assert (secure.degree(11).threshold, secure.degree(5).neighbours, secure.degree(5).threshold) == (9, 4, 3)
    assert SecAgg(threshold=8).degree(10).threshold == 8


# Fixed point


@given(
    st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=20),
    st.sampled_from((16, 24, 32, 40, 48)),
    st.integers(1, 50),
)
@settings(max_examples=100, deadline=None)
def test_the_error_is_within_what_is_said(values: list[float], bits: int, count: int) -> None:
    fixed = FixedPoint(bits, 8.0, count)
    expected = {"w": np.zeros(len(values))}
    words = fixed.zeros(expected)
    for shift in range(count):
        words.add(fixed.encoded({"w": np.array(values) + 0.01 * shift}, 1.0, expected))
    mean, weight, clipped = fixed.decoded(fixed.unpacked(fixed.packed(words)), expected)
    real = np.mean([np.clip(np.array(values) + 0.01 * shift, -8, 8) for shift in range(count)], axis=0)
    assert weight == count
    assert np.all(np.abs(mean["w"] - real) <= fixed.error * 1.0001 + 1e-15)
    assert clipped == sum(int(np.sum(np.abs(np.array(values) + 0.01 * shift) > 8.0)) for shift in range(count))


def test_the_largest_sum_there_can_be_does_not_wrap() -> None:
    for bits in (16, 24, 32, 40, 48):
        for value in (8.0, -8.0):
            fixed, expected = FixedPoint(bits, 8.0, 13, 100.0), {"w": np.zeros(3)}
            words = fixed.zeros(expected)
            for _ in range(13):
                words.add(fixed.encoded({"w": np.full(3, value)}, 100.0, expected))
            mean, _, _ = fixed.decoded(fixed.unpacked(fixed.packed(words)), expected)
            assert np.allclose(mean["w"], value, atol=2 * fixed.error, rtol=0)


def test_words_travel_in_as_many_bytes_as_they_have() -> None:
    expected = {"w": np.zeros(1000, np.float32), "n": np.zeros(3, np.int64)}
    for bits in (16, 24, 32, 40, 48):
        fixed = FixedPoint(bits, 1.0, 4)
        packed = fixed.packed(fixed.encoded({"w": np.ones(1000, np.float32)}, 1.0, expected))
        assert packed["words"].nbytes == 1000 * bits // 8
        assert {name: value.shape for name, value in fixed.sizes(expected).items()} == {
            name: value.shape for name, value in packed.items()
        }


def test_what_came_where_words_cannot_lie_is_read_all_the_same() -> None:
    fixed, expected = FixedPoint(32, 1.0, 2), {"w": np.zeros(9)}
    packed = fixed.packed(fixed.encoded({"w": np.full(9, 0.5)}, 1.0, expected))
    room = np.zeros(packed["words"].size + 1, np.uint8)
    room[1:] = packed["words"]
    moved = fixed.unpacked({**packed, "words": room[1:]})
    assert np.array_equal(moved.narrow, fixed.unpacked(packed).narrow)


# Rounds


@pytest.mark.parametrize("n", [2, 3, 7, 12])
@pytest.mark.parametrize("bits", [24, 32, 48])
def test_the_sum_is_that_of_the_words(n: int, bits: int) -> None:
    federation = Federation(SecAgg(bits=bits), n)
    total = federation.run()
    assert total.sites == tuple(federation.names)
    for name, value in federation.plain(total).items():
        assert np.array_equal(value, total.mean.delta[name])
    exact = np.mean([update["count"] for update in federation.updates.values()], axis=0)
    assert np.array_equal(total.mean.delta["count"], exact)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("n", [9, 60])
def test_those_who_drop_out_leave_an_exact_sum_of_the_others(stage: str, n: int) -> None:
    lost = (1, 4) if n == 9 else tuple(range(0, 60, 10))
    federation = Federation(SecAgg(shares=0 if n == 9 else 20, dropped=0.2), n, lost={stage: lost})
    total = federation.run()
    stayed = [name for at, name in enumerate(federation.names) if stage in (AGREE, UNMASK) or at not in lost]
    assert list(total.sites) == stayed
    for name, value in federation.plain(total).items():
        assert np.array_equal(value, total.mean.delta[name])


def test_some_may_drop_out_at_every_step() -> None:
    federation = Federation(SecAgg(), 15, lost={stage: [at] for at, stage in enumerate(STAGES)})
    total = federation.run()
    assert len(total.sites) == 12
    assert np.array_equal(federation.plain(total)["w"], total.mean.delta["w"])


@pytest.mark.parametrize("stage", STAGES)
def test_too_many_who_drop_out_fail_the_round_and_open_nothing(stage: str) -> None:
    lost = range(1, 9) if stage == STAGES[0] else range(5)
    federation = Federation(SecAgg(), 9, lost={stage: lost})
    with pytest.raises(RoundError, match="must"):
        federation.run()


def test_weights_are_heeded_and_nobody_sees_them() -> None:
    federation = Federation(SecAgg(max_weight=1000, bits=48), 5)
    federation.weights = {
        name: float(weight) for name, weight in zip(federation.names, (1, 10, 250, 999, 5000), strict=True)
    }
    total = federation.run()
    heeded = np.array([1, 10, 250, 999, 1000])
    real = np.average([u["w"].astype(float) for u in federation.updates.values()], axis=0, weights=heeded)
    assert total.mean.weight == heeded.sum()
    assert np.allclose(total.mean.delta["w"], real, atol=1e-6, rtol=0)


def test_of_what_was_cut_off_the_total_alone_is_known() -> None:
    federation = Federation(SecAgg(clip=1.0), 4)
    cut = sum(int(np.sum(np.abs(update["w"]) > 1.0)) for update in federation.updates.values())
    assert cut > 0
    assert federation.run().figures == {"clipped_values": pytest.approx(cut / (4 * federation.size))}


# What a dishonest server may try


def test_keys_that_the_server_has_put_are_refused() -> None:
    def tamper(name: str, task: Task) -> Task:
        if (name, task.name) != ("site-001", STAGES[1]):
            return task
        held = Bundle.of(task.parameters["keys/site-002"].tobytes())
        mine = replace(held, channel=public_of(new_key()), masking=public_of(new_key()))
        packed = np.frombuffer(mine.packed, np.uint8)
        return replace(task, parameters={**task.parameters, "keys/site-002": packed})

    federation = Federation(SecAgg(), 4, tamper=tamper)
    federation.run()
    assert "keys of site-002 must be signed by it" in federation.refused["site-001"]


def test_sites_that_the_server_has_made_up_are_refused() -> None:
    """Neighbours follow from all keys of the list, and every one of them is held against its site's identity."""

    def tamper(name: str, task: Task) -> Task:
        if task.name != STAGES[1]:
            return task
        forged = RehearsedIdentity("nobody")
        keys = public_of(new_key()) * 2 + bytes(32)
        signature = forged.sign(Bundle.signed_part("site-000", str(task.config["secagg_run"]), 1, keys))
        packed = Bundle(keys[:32], keys[32:64], keys[64:], b"", signature).packed
        more = {**task.parameters, "keys/site-000": np.frombuffer(packed, np.uint8)}
        sites = "site-000\n" + str(task.config["secagg_sites"])
        return with_config(replace(task, parameters=more), secagg_sites=sites)

    federation = Federation(SecAgg(), 5, tamper=tamper)
    with pytest.raises(RoundError, match="got 0 of 5"):
        federation.run()
    assert "keys of site-000 must be signed by it" in federation.refused["site-003"]


def test_keys_of_another_round_are_refused() -> None:
    federation, old = Federation(SecAgg(), 4), dict[str, Update]()
    federation.forge = lambda name, update: old.setdefault(name, update)
    with pytest.raises(RoundError):  # answers to other steps are of no use
        federation.run(1)
    federation = replace(federation, forge=lambda name, update: old[name] if "keys" in update.delta else update)
    federation.memory = {"run": "r"}
    with pytest.raises(RoundError, match="0 of 4 that shared their secrets out"):
        federation.run(2)
    assert "must hold its own keys" in federation.refused["site-001"]


def test_keys_signed_for_another_run_are_refused() -> None:
    one, other = Federation(SecAgg(), 4), Federation(SecAgg(), 4)
    old: dict[str, Update] = {}

    def record(name: str, update: Update) -> Update:
        if "keys" in update.delta:
            old[name] = update
        return update

    one.forge = record
    one.run(1)
    other.forge = lambda name, update: old[name] if "keys" in update.delta and name == "site-002" else update
    with pytest.raises(RoundError):
        other.run(1)
    assert "keys of site-002 must be signed by it" in other.refused["site-001"]


def asked(change: Callable[[Task, Federation], Task]) -> Federation:
    """A federation whose server asks site-001 to agree on something else."""
    federation = Federation(SecAgg(), 7)
    federation.tamper = lambda name, task: (
        change(task, federation) if (name, task.name) == ("site-001", AGREE) else task
    )
    federation.run()
    return federation


def marks(numbers: Sequence[int], n: int = 7) -> str:
    return np.packbits([number in numbers for number in range(n)]).tobytes().hex()


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([0], "at least 4 of its neighbours, got 0"),  # a sum of one
        ([0, 1, 2, 3], "at least 4 of its neighbours, got 3"),
        ([1, 2, 3, 4, 5, 6], "a sum must be of this site"),
        ([0, 1, 2, 3, 4], "for the sum that was agreed on, got another"),
    ],
)
def test_a_sum_of_too_few_is_not_opened(numbers: list[int], words: str) -> None:
    federation = asked(lambda task, _: with_config(task, secagg_alive=marks(numbers)))
    assert words in federation.refused["site-001"]


def test_a_sum_of_fewer_sites_than_a_job_asks_for_is_not_opened() -> None:
    federation = Federation(SecAgg(shares=4).among(6, 7), 7)
    federation.tamper = lambda _, task: (
        with_config(task, secagg_alive=marks([0, 1, 2, 3, 4])) if task.name == AGREE else task
    )
    with pytest.raises(RoundError, match="got 0 of 7 that agreed on the sum"):
        federation.run()
    assert any("at least 6 sites, got 5" in words for words in federation.refused.values())


def test_never_both_shares_of_a_site() -> None:
    """Asked twice, for the one and then for the other, a site answers once."""
    federation, asked = Federation(SecAgg(), 7), list[str]()

    def tamper(name: str, task: Task) -> Task:
        if (name, task.name) == ("site-001", UNMASK):
            first = federation.sites[name].answer(task)
            assert len(first.delta) == 6
            with pytest.raises(ProtocolError, match="got no secrets of that round"):
                federation.sites[name].answer(with_config(task, secagg_alive=marks([0, 1, 2, 3, 4])))
            asked.append(name)
        return task

    federation.tamper = tamper
    federation.run()
    assert asked == ["site-001"]
    assert "no secrets of that round" in federation.refused["site-001"]


def test_an_update_is_masked_once_and_shares_are_made_once() -> None:
    federation = Federation(SecAgg(), 5)

    def twice(name: str, task: Task) -> Task:
        if name == "site-001" and task.name in STAGES[1:3]:
            federation.answer(name, task)
        return task

    for stage, words in ((STAGES[1], "shares of a round must be made once"), (FIT, "must be masked once")):
        federation = Federation(SecAgg(), 5)
        federation.tamper = lambda name, task, stage=stage: twice(name, task) if task.name == stage else task
        total = federation.run()
        assert words in federation.refused["site-001"]
        assert len(total.sites) == 4


@pytest.mark.parametrize("stage", STAGES[1:])
def test_no_step_comes_before_the_one_that_it_follows(stage: str) -> None:
    federation = Federation(SecAgg(), 4)
    task = Task(stage, 1, {}, {"secagg_run": "r", "secagg_alive": "f0"})
    with pytest.raises(ProtocolError, match="got no secrets of that round"):
        federation.answer("site-001", task)


def test_no_mask_without_enough_neighbours() -> None:
    """Else masks with those who pool what they know with the server could be all there are."""
    federation = Federation(SecAgg(), 7)
    federation.tamper = lambda name, task: (
        with_config(task, secagg_alive=marks([0, 5])) if (name, task.name) == ("site-001", FIT) else task
    )
    total = federation.run()
    assert "at least 4 neighbours must take part, got 1" in federation.refused["site-001"]
    assert "site-001" not in total.sites


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"secagg_sites": "site-001"}, "at least 2 sites, each listed once"),
        ({"secagg_sites": "site-001\nsite-001\nsite-002"}, "at least 2 sites, each listed once"),
        ({"secagg_sites": "site-002\nsite-003"}, "at least 2 sites, each listed once"),
        ({"secagg_sites": "site-001\nsite-002"}, "an answer must hold what was asked for"),
        ({"secagg_run": ""}, "of which run it is"),
        ({"secagg_run": "another"}, "got no secrets of that round"),
    ],
)
def test_a_list_that_is_none_is_refused(config: dict[str, str], words: str) -> None:
    federation = Federation(SecAgg(), 7)
    federation.tamper = lambda name, task: (
        with_config(task, **config) if (name, task.name) == ("site-001", STAGES[1]) else task
    )
    federation.run()
    assert words in federation.refused["site-001"]


def test_a_step_of_no_protocol_is_refused() -> None:
    with pytest.raises(ProtocolError, match="must be one of secure aggregation"):
        SecAgg().site("a", SecretStore(None)).answer(Task("secagg-what", 1, {}, {"secagg_run": "r"}))


@pytest.mark.parametrize("alive", ["", "zz"])
def test_marks_that_are_none_are_refused(alive: str) -> None:
    federation = asked(lambda task, _: with_config(task, secagg_alive=alive))
    assert "must mark which of 7 sites" in federation.refused["site-001"]


def test_in_a_deployment_a_round_is_answered_once(tmp_path: Path) -> None:
    """The difference of two sums could be one site's update; a crash of the server changes nothing about that."""
    names = ["site-001", "site-002", "site-003", "site-004"]
    kits = make_kits(tmp_path, names)
    identities = {name: CertifiedIdentity.of_kit(kits[name]) for name in names}
    federation = Federation(SecAgg(), 4, identities=identities)
    federation.run(1)
    federation.run(2)
    with pytest.raises(RoundError, match="got 0 of 4"):
        federation.run(2)
    assert "a round must be answered once" in federation.refused["site-001"]
    federation.run(3)
    federation.memory = {"run": "another"}
    with pytest.raises(RoundError, match="got 0 of 4"):
        federation.run(4)
    assert "must be of the run that it was begun with" in federation.refused["site-001"]
    evaluation = Task(EVALUATE, 3, {})
    assert federation.sites["site-001"].opened(evaluation) == evaluation
    with pytest.raises(ProtocolError, match="a round must be evaluated once"):
        federation.sites["site-001"].opened(evaluation)
    rehearsal = Federation(SecAgg(), 4)
    rehearsal.run(1)
    rehearsal.run(1)  # where all sites are one person's, a run that was killed may repeat its round


# What a dishonest site may do


@pytest.mark.parametrize("kind", ["keys", "to", "words", "of"])
def test_an_answer_that_is_none_costs_its_site_the_round_and_nobody_else(kind: str) -> None:
    federation = Federation(SecAgg(), 8)

    def forge(name: str, update: Update) -> Update:
        if name != "site-002" or next(iter(update.delta)).partition("/")[0] != kind:
            return update
        return replace(update, delta={key: value[:7] for key, value in update.delta.items()})

    federation.forge = forge
    total = federation.run()
    assert len(total.sites) == (8 if kind == "of" else 7)
    assert "site-002" in federation.refused


@pytest.mark.parametrize("more", [b"x" * (1 << 14), b""])
def test_keys_of_any_size_and_answers_beyond_what_was_asked_are_rejected(more: bytes) -> None:
    federation = Federation(SecAgg(), 5)

    def forge(name: str, update: Update) -> Update:
        if name != "site-002" or "keys" not in update.delta:
            return update
        keys = np.frombuffer(update.delta["keys"].tobytes() + more, np.uint8)
        return replace(update, delta={"keys": keys, **({} if more else {"beyond": keys})})

    federation.forge = forge
    assert len(federation.run().sites) == 4
    assert "site-002" in federation.refused


def test_who_signs_something_else_is_not_counted() -> None:
    """Signatures of two thirds over one sum are needed, so no two sums find them."""
    for liars, fails in ((2, False), (3, True)):
        federation = Federation(SecAgg(), 6)
        chosen = federation.names[-liars:]
        federation.forge = lambda name, update, chosen=chosen: (
            replace(update, delta={"agreed": np.zeros(64, np.uint8)})
            if name in chosen and "agreed" in update.delta
            else update
        )
        if fails:
            with pytest.raises(RoundError, match="must get"):
                federation.run()
            assert "at least 4 sites must say that a sum is of the same, got 3" in federation.refused["site-001"]
        else:
            assert len(federation.run().sites) == 6
    federation = Federation(SecAgg(), 4)
    federation.forge = lambda name, update: (
        replace(update, delta={"agreed": np.zeros(1 << 15, np.uint8)})
        if name == "site-004" and "agreed" in update.delta
        else update
    )
    federation.run()
    assert "a signature must be at most" in federation.refused["site-004"]


def test_sites_that_were_sent_different_models_share_no_masks() -> None:
    """Else a server could send most of them a model of which no gradient is left (Pasquini et al., CCS 2022)."""
    federation = Federation(SecAgg(), 5)
    federation.tamper = lambda name, task: (
        replace(task, parameters={**task.parameters, "w": np.ones(federation.size, np.float32)})
        if (name, task.name) == ("site-001", FIT)
        else task
    )
    with pytest.raises(RoundError, match="the masks must cancel"):
        federation.run()


def test_shares_that_do_not_open_are_their_senders_fault() -> None:
    federation = Federation(SecAgg(), 6)
    federation.forge = lambda name, update: (
        replace(update, delta={key: np.zeros_like(value) for key, value in update.delta.items()})
        if name == "site-002" and "to/site-001" in update.delta
        else update
    )
    with pytest.raises(RoundError, match="shares of the secrets of site-002, got 0"):
        federation.run()
    assert federation.refused == {}


def test_what_is_not_finite_or_does_not_fit_is_refused() -> None:
    for update, words in (
        ({"w": np.full(50, np.nan, np.float32)}, "must be finite, got NaN"),
        ({"count": np.array([2**62, 0])}, "must fit a sum of 64 bits"),
    ):
        federation = Federation(SecAgg(), 4)
        federation.updates["site-002"] = update
        assert len(federation.run().sites) == 3
        assert words in federation.refused["site-002"]


def test_a_model_of_whole_numbers_alone() -> None:
    federation = Federation(SecAgg(), 4, size=0)
    federation.forge = lambda name, update: (
        replace(update, delta={**update.delta, "words": np.zeros(5, np.uint8)})
        if name == "site-002" and "words" in update.delta
        else update
    )
    assert len(federation.run().sites) == 3
    assert "'words' must be 0 bytes" in federation.refused["site-002"]


def test_a_share_of_no_secret_is_noticed() -> None:
    federation = Federation(SecAgg(), 6)

    def forge(name: str, update: Update) -> Update:
        if name == "site-002" and "of/site-001" in update.delta:
            return replace(update, delta={**update.delta, "of/site-001": np.full(SHARE, 255, np.uint8)})
        return update

    federation.forge = forge
    with pytest.raises(RoundError, match="shares must be of a secret of 32 bytes"):
        federation.run()


def test_a_run_that_was_begun_without_does_not_go_on_with_it() -> None:
    federation = Federation(SecAgg(), 4)
    federation.memory = None
    with pytest.raises(ConfigError, match="as it was begun"):
        federation.run()


def test_what_it_needs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'sfl\[privacy\]'"):
        SecAgg().require(4)
    monkeypatch.setitem(sys.modules, "sfl.privacy.secagg.identity", None)
    with pytest.raises(MissingExtraError):
        SecAgg().identity("one", Path("somewhere"))


def test_arrays_that_a_site_leaves_out_are_zeros() -> None:
    federation = Federation(SecAgg(), 4)
    federation.updates["site-001"] = {}
    total = federation.run()
    others = np.sum([federation.updates[name]["count"] for name in federation.names[1:]], axis=0)
    assert np.array_equal(total.mean.delta["count"], others / 4)


def test_a_share_that_was_changed_is_noticed() -> None:
    federation = Federation(SecAgg(), 6)

    def forge(name: str, update: Update) -> Update:
        if name == "site-002" and "of/site-001" in update.delta:
            wrong = update.delta["of/site-001"].copy()
            wrong[0] ^= 1
            return replace(update, delta={**update.delta, "of/site-001": wrong})
        return update

    federation.forge = forge
    with pytest.raises(RoundError, match="shares of the secrets of site-001 must belong together"):
        federation.run()


def test_words_of_no_update_are_noticed() -> None:
    federation = Federation(SecAgg(), 6)

    def forge(name: str, update: Update) -> Update:
        if name == "site-002" and "wide" in update.delta:
            return replace(update, delta={**update.delta, "wide": np.full_like(update.delta["wide"], 7)})
        return update

    federation.forge = forge
    with pytest.raises(RoundError, match="the masks must cancel"):
        federation.run()


# What the server holds


def chi_square(data: bytes) -> float:
    """Of bytes against the uniform distribution; 255 on average, 22.6 about it."""
    counts, each = Counter(data), len(data) / 256
    return sum((counts.get(value, 0) - each) ** 2 / each for value in range(256))


def test_masked_words_say_nothing_of_an_update() -> None:
    """Two worlds of one sum and opposite updates: in both the server holds words without any pattern; its own view,
    with the masks that it may take off, differs by nothing but noise, though each update is far from the other's."""
    size, n = 20_000, 6
    views: list[np.ndarray] = []
    for world in (0, 1):
        federation = Federation(SecAgg(clip=1.0), n, size=size)
        for place, name in enumerate(federation.names):
            value = 0.5 if (place + world) % 2 else -0.5
            federation.updates[name] = {"w": np.full(size, value, np.float32), "count": np.zeros(2, np.int64)}
        total = federation.run()
        assert np.abs(total.mean.delta["w"]).max() < 1e-6
        for masked in federation.masked.values():
            assert chi_square(masked["words"].tobytes()) < 255 + 6 * 22.6
        views.append(federation.masked["site-001"]["words"].view("<u4").astype(np.float64))
    words = SecAgg(clip=1.0).fixed.of(n).encoded({"w": np.full(size, 0.5)}, 1.0, {"w": np.zeros(size)})
    assert chi_square(words.narrow.tobytes()) > 1e5  # the test would see a word that is not masked
    assert abs(views[0].mean() - views[1].mean()) < 6 * 2**32 / math.sqrt(6 * size)


def test_without_the_masks_of_its_neighbours_an_update_would_show() -> None:
    """What the server may open of a site, the seed of its own mask, is not all that hides it."""
    federation, seeds = Federation(SecAgg(clip=1.0), 5, size=20_000), dict[str, bytes]()
    federation.updates["site-001"] = {"w": np.full(20_000, 0.25, np.float32), "count": np.zeros(2, np.int64)}

    def spy(name: str, task: Task) -> Task:
        if task.name == FIT:
            kept = federation.sites[name]._memory.secrets(str(task.config["secagg_run"]), 1)  # pyright: ignore[reportPrivateUsage]
            seeds[name] = bytes.fromhex(kept["seed"])
        return task

    federation.tamper = spy
    federation.run()
    fixed = federation.secure.fixed.of(5)
    words = fixed.unpacked({name: value.copy() for name, value in federation.masked["site-001"].items()})
    narrow, wide = words.narrow.copy(), words.wide.copy()
    add_mask((narrow, wide), seeds["site-001"], subtract=True)
    assert chi_square(narrow.tobytes()) < 255 + 6 * 22.6
    assert wide[0] != 1


def test_every_pair_of_sites_hides_the_other() -> None:
    """No two sites' words together are the sum of their updates: only all of them are."""
    federation = Federation(SecAgg(clip=1.0), 5, size=5_000)
    federation.run()
    fixed = federation.secure.fixed.of(5)
    for one, other in combinations(federation.names, 2):
        words = fixed.zeros(federation.expected)
        for name in (one, other):
            words.add(fixed.unpacked(federation.masked[name]))
        assert words.wide[0] != 2


# Who a site is


def test_a_site_is_who_its_federation_says(tmp_path: Path) -> None:
    kits, foreign = make_kits(tmp_path / "a", ["one", "two"]), make_kits(tmp_path / "b", ["two"])
    one, two = (CertifiedIdentity.of_kit(kits[name]) for name in ("one", "two"))
    one.check("two", two.certificate, b"data", two.sign(b"data"))
    stranger = CertifiedIdentity.of_kit(foreign["two"])
    for name, certificate, data, signature in (
        ("two", stranger.certificate, b"data", stranger.sign(b"data")),
        ("two", two.certificate, b"other", two.sign(b"data")),
        ("two", two.certificate, b"data", stranger.sign(b"data")),
        ("one", two.certificate, b"data", two.sign(b"data")),
        ("two", b"no certificate", b"data", two.sign(b"data")),
        ("two", two.certificate, b"data", b""),
    ):
        with pytest.raises(ProtocolError, match=f"keys of {name} must be signed by it"):
            one.check(name, certificate, data, signature)


def test_a_certificate_that_has_expired_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kits = make_kits(tmp_path, ["one", "two"])
    one, two = (CertifiedIdentity.of_kit(kits[name]) for name in ("one", "two"))

    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=400)

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:  # type: ignore[override]
            return later

    monkeypatch.setattr("sfl.privacy.secagg.identity.datetime.datetime", Later)
    with pytest.raises(ProtocolError, match="has expired"):
        one.check("two", two.certificate, b"data", two.sign(b"data"))


def certificate(name: str, key: Any, issuer: str, signer: Any) -> bytes:
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, one)]) for one in (name, issuer)]
    builder = x509.CertificateBuilder(names[1], names[0], key.public_key(), 7, now, now + datetime.timedelta(days=1))
    return builder.sign(signer, SHA256()).public_bytes(Encoding.PEM)


def test_keys_of_flares_kits_and_no_others() -> None:
    root, key, other = (rsa.generate_private_key(65537, 2048) for _ in range(3))
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    authority = certificate("root", root, "root", root)
    site = CertifiedIdentity(certificate("site", key, "root", root), pem, authority)
    assert site.name == "site"
    site.check("site", site.certificate, b"data", site.sign(b"data"))
    with pytest.raises(ProtocolError, match="another signature"):
        site.check("site", site.certificate, b"else", site.sign(b"data"))
    for shown, words in (
        (certificate("site", other, "root", other), "a certificate of another federation"),
        (certificate("site", Ed25519PrivateKey.generate(), "root", root), "a key that is Ed25519PublicKey"),
    ):
        with pytest.raises(ProtocolError, match=words):
            site.check("site", shown, b"data", site.sign(b"data"))


def test_a_kit_that_is_none_is_said(tmp_path: Path) -> None:
    kits = make_kits(tmp_path, ["one", "two"])
    (kits["one"] / "client.key").write_bytes((kits["two"] / "client.key").read_bytes())
    with pytest.raises(ConfigError, match="must be that of its key"):
        CertifiedIdentity.of_kit(kits["one"])
    (kits["one"] / "client.key").unlink()
    with pytest.raises(ConfigError, match="must hold the site's certificate"):
        CertifiedIdentity.of_kit(kits["one"])
    with pytest.raises(ConfigError, match="must be RSA or of an elliptic curve"):
        CertifiedIdentity(b"", ED25519, b"")


def test_a_site_of_a_deployment_must_have_a_kit_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("_SFL_SITE_KIT", raising=False)
    assert kit_of_site(required=False) is None
    with pytest.raises(ConfigError, match="a site of a deployment must have a kit"):
        kit_of_site(required=True)
    monkeypatch.setenv("_SFL_SITE_KIT", "")
    use_kit(tmp_path)  # no kit: nothing changes
    use_kit(make_kits(tmp_path, ["one"])["one"])
    kit = kit_of_site(required=True)
    assert kit is not None
    assert isinstance(SecAgg().identity("one", kit), CertifiedIdentity)
    with pytest.raises(ConfigError, match="got that of 'one'"):
        SecAgg().identity("two", kit)


def test_a_rehearsal_tells_nobody_apart_and_takes_the_same_steps() -> None:
    one, two = RehearsedIdentity("one"), RehearsedIdentity("two")
    one.check("two", b"", b"data", two.sign(b"data"))
    with pytest.raises(ProtocolError, match="keys of one must be signed by it"):
        two.check("one", b"", b"data", two.sign(b"data"))


def test_secrets_lie_where_their_user_alone_reads_them_and_go_with_the_round(tmp_path: Path) -> None:
    sites = {name: SecAgg().site(name, SecretStore(tmp_path / name)) for name in ("a", "b", "c")}
    sites["a"].answer(Task(STAGES[0], 1, {}, {"secagg_run": "r"}))
    path = tmp_path / "a" / "secret.safetensors"
    assert path.stat().st_mode & 0o777 == 0o600
    assert b"masking" in path.read_bytes()
    federation = Federation(SecAgg(), 3)
    federation.sites = {name: SecAgg().site(name, SecretStore(tmp_path / name), None) for name in federation.names}
    federation.run()
    left = (tmp_path / "site-001" / "secret.safetensors").read_bytes()
    assert b"masking" not in left
    assert b'"run"' in left.replace(b"\\", b"")
    sites["a"].ended()
    assert b"masking" not in path.read_bytes()
    sites["a"].ended()
