"""What secure sums cost: CPU-seconds and bytes, per site and on the server, against plain sums in one run.

    python benchmarks/secure_aggregation.py [--sites 2,5,10,20,50,100] [--parameters 1000000] [--lost 0.05]
                                            [--only rounds|graphs|encrypted|layers|memory|processes]

Secure aggregation by masks, and homomorphic encryption, with a key that sites share and with a holder. Each row is one
round over all sites in this process, so that CPU time is that of the protocol alone: no training, no wire. Plain is the
same updates through the streaming mean. Larger federations stand for themselves by their graph: one site's work among
so many is measured, and rounds are drawn to count those whose sum could not be opened.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from measure import measure
from sfl.core import arrays
from sfl.core.aggregator import WeightedMean
from sfl.core.secure import SecureSum, Step
from sfl.core.task import EVALUATE, FIT, Task, Update
from sfl.io.site_store import SecretStore
from sfl.privacy.he import CKKS
from sfl.privacy.he.crew import cores
from sfl.privacy.he.packing import LAYOUT, framed, parts_of
from sfl.privacy.he.server import OPEN
from sfl.privacy.secagg import SecAgg
from sfl.privacy.secagg.graph import arranged, degree, neighbours

RESULTS = Path(__file__).parent / "results"
PARTS = ("rounds", "graphs", "encrypted", "layers", "memory", "processes")


@dataclass
class Cost:
    """Of one round."""

    site: float = 0.0
    server: float = 0.0
    up: int = 0
    fit_up: int = 0
    down: int = 0
    opening: float = 0.0
    largest: float = 0.0
    by_step: dict[str, float] = field(default_factory=dict[str, float])


def secure_round(secure: SecureSum, n: int, size: int, lost: int) -> Cost:
    """One round of n sites, of which some are lost after they have shared their secrets out."""
    secure, cost = secure.among(2, n), Cost()
    names = [f"site-{number:05d}" for number in range(n)]
    expected = {"w": np.zeros(size, np.float32)}
    delta = {"w": (np.random.default_rng(0).normal(size=size) * 0.01).astype(np.float32)}
    sites = {name: secure.site(name, SecretStore(None)) for name in names}
    summing = secure.summing(
        Task(FIT, 1, expected, {"seed": 0}), names, expected, secure.begin(expected, expected, names)
    )
    working = 0.0

    def answers(step: Step) -> Iterator[Update]:
        nonlocal working
        for name, task in step.tasks.items():
            if task.name == FIT and name in names[:lost]:
                continue
            started = time.process_time()
            if task.name == FIT:
                sites[name].opened(task)
                answer = sites[name].closed(Update(name, delta, 1.0), task, expected)
            else:
                answer = sites[name].answer(task)
            spent = time.process_time() - started
            working += spent
            cost.by_step[task.name] = cost.by_step.get(task.name, 0.0) + spent
            cost.down += arrays.nbytes(task.travels) if task.name != FIT else 0
            cost.up += arrays.nbytes(answer.delta)
            cost.fit_up += arrays.nbytes(answer.delta) if task.name == FIT else 0
            step.check(answer)
            yield answer

    started = time.process_time()
    step = next(summing)
    try:
        while True:
            step = summing.send(answers(step))
    except StopIteration as end:
        total = end.value
    cost.server = time.process_time() - started - working
    cost.site = working / n
    mean, site = total.mean.delta, sites[names[-1]]
    if secure.seals:
        cost.down = n * arrays.nbytes(mean)
        started = time.process_time()
        mean = dict(site.opened(Task(EVALUATE, 1, mean)).parameters)
        cost.opening = time.process_time() - started
    cost.largest = float(np.abs(mean["w"] - delta["w"]).max())
    return cost


def plain_round(n: int, size: int) -> float:
    """CPU-seconds of the server for the same updates without protection."""
    delta = {"w": (np.random.default_rng(0).normal(size=size) * 0.01).astype(np.float32)}
    started = time.process_time()
    WeightedMean().aggregate(Update(f"site-{number}", delta, 1.0) for number in range(n))
    return time.process_time() - started


def median_round(secure: SecureSum, n: int, size: int, lost: int, times: int) -> Cost:
    """The round whose server took the median time."""
    rounds = sorted((secure_round(secure, n, size, lost) for _ in range(times)), key=lambda one: one.server)
    middle = rounds[times // 2]
    middle.site = statistics.median(one.site for one in rounds)
    return middle


def drawn_rounds(n: int, corrupt: float, dropped: float, trials: int) -> dict[str, Any]:
    """Rounds of n sites by their graph alone: how many could not be opened, or would have told more than a sum."""
    found, draw = degree(n, corrupt, dropped), np.random.default_rng(n)
    names = [str(number) for number in range(n)]
    failed = exposed = 0
    for trial in range(trials):
        circle = arranged(names, str(trial).encode())
        place = np.array([int(name) for name in circle])
        gone, bad = np.zeros(n, bool), np.zeros(n, bool)
        gone[draw.choice(n, int(dropped * n), replace=False)] = True
        bad[draw.choice(n, int(corrupt * n), replace=False)] = True
        half = found.neighbours // 2
        around = [step for step in range(-half, half + 1) if step] if found.neighbours < n - 1 else range(1, n)
        there = sum(np.roll(~gone[place], step).astype(int) for step in around)
        pooled = sum(np.roll(bad[place], step).astype(int) for step in around)
        failed += bool((there < found.threshold).any())
        exposed += bool((pooled >= found.threshold).any())
    assert neighbours(circle, names[0], found.neighbours)
    return {
        "sites": n, "neighbours": found.neighbours, "threshold": found.threshold, "trials": trials,
        "not opened": failed, "exposed": exposed,
    }  # fmt: skip


def site_among(n: int, size: int) -> float:
    """CPU-seconds to mask of one site among n: its neighbours' keys agreed on, their masks, and its own."""
    from sfl.privacy.secagg.primitives import add_mask, new_key, public_of
    from sfl.privacy.secagg.site import mask_about, mask_seed

    k = degree(n, SecAgg().corrupt, SecAgg().dropped).neighbours
    keys, own = [public_of(new_key()) for _ in range(k)], new_key()
    words = np.zeros(size, np.uint32)
    started = time.process_time()
    for number, public in enumerate(keys):
        add_mask((words,), mask_seed(own, public, bytes(32), mask_about("run", 1, "a", str(number))))
    add_mask((words,), new_key())
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", default="2,5,10,20,50,100")
    parser.add_argument("--parameters", type=int, default=1_000_000)
    parser.add_argument("--lost", type=float, default=0.05, help="share of the sites that is lost in the second table")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--only", choices=PARTS, help="measure one part anew; results of the others stay")
    parser.add_argument("--part", help="play one part, for its memory to be measured")
    args = parser.parse_args()
    if args.part:
        play(args.part, args.parameters)
        return
    size, sites = args.parameters, list(map(int, args.sites.split(",")))
    made = {
        "rounds": lambda: masked_rows(sites, size, args.lost, args.times),
        "graphs": lambda: graph_rows(size),
        "encrypted": lambda: [row for n in sites for row in encrypted_rows(n, size, args.times)],
        "layers": lambda: layer_rows(args.times),
        "memory": memory_rows,
        "processes": lambda: process_rows(args.times),
    }
    found = json.loads((RESULTS / "secure_aggregation.json").read_text()) if args.only else {"parameters": size}
    for part in [args.only] if args.only else PARTS:
        found[part] = made[part]()
        found.setdefault("days", {})[part] = f"{datetime.now(UTC):%Y-%m-%d}"
    write(found)


def masked_rows(sites: list[int], size: int, lost_share: float, times: int) -> list[dict[str, Any]]:
    """Rounds under masks, with all sites and with some lost."""
    rows = list[dict[str, Any]]()
    for n in sites:
        for lost in sorted({0, round(lost_share * n)}):
            cost = median_round(SecAgg(), n, size, lost, times)
            plain = statistics.median(plain_round(n, size) for _ in range(times))
            rows.append(
                {
                    "sites": n, "lost": lost, "neighbours": SecAgg().degree(n).neighbours,
                    "CPU-s a site": cost.site, "CPU-s server": cost.server, "CPU-s server, plain": plain,
                    "bytes up a site": cost.up // n, "bytes down a site": cost.down // n, "plain bytes up": 4 * size,
                    "largest error": cost.largest,
                }
            )  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    return rows


def graph_rows(size: int) -> list[dict[str, Any]]:
    """Federations of a size that this machine does not hold, by their graphs."""
    graphs = [drawn_rounds(n, SecAgg().corrupt, SecAgg().dropped, 200) for n in (100, 1_000, 10_000)]
    for graph in graphs:
        graph["CPU-s a site"] = site_among(graph["sites"], size)
        print(json.dumps(graph), flush=True)
    return graphs


def encrypted_rows(n: int, size: int, times: int) -> list[dict[str, Any]]:
    """A round of n sites, with a key that they share, and with a holder."""
    plain = statistics.median(plain_round(n, size) for _ in range(times))
    found = list[dict[str, Any]]()
    for keys, secure in (("shared", CKKS()), ("holder", CKKS(holder="site-00000"))):
        cost = median_round(secure, n, size, 0, times)
        found.append(
            {
                "sites": n, "keys": keys,
                "CPU-s to encrypt": cost.by_step[FIT] / n, "CPU-s to decrypt": cost.opening or cost.by_step[OPEN],
                "CPU-s server": cost.server, "CPU-s server, plain": plain,
                "bytes up": cost.fit_up // n,
                "bytes down": cost.down // n if secure.seals else 4 * size, "plain bytes": 4 * size,
                "largest error": cost.largest,
            }
        )  # fmt: skip
        print(json.dumps(found[-1]), flush=True)
    return found


def layer_rows(times: int) -> list[dict[str, Any]]:
    """What a site pays for fewer arrays of ESM2 with 8 million parameters, and what the server then sees."""
    rows = list[dict[str, Any]]()
    model = esm2_shapes()
    for what, layers in (
        ("all", None), ("attention", r"attention"), ("last two blocks", r"layer\.[45]\."),
        ("language-model head", r"lm_head"), ("biases and norms", r"bias|LayerNorm"),
    ):  # fmt: skip
        secure = CKKS(layers=layers).among(2, 10)
        site = secure.site("a", SecretStore(None))
        spent, nbytes = list[float](), 0
        for _ in range(times):
            started = time.process_time()
            site.opened(Task(FIT, 1, model))
            sent = site.closed(Update("a", dict(model), 1.0), Task(FIT, 1, model), model).delta
            spent.append(time.process_time() - started)
            nbytes = arrays.nbytes(sent)
        whole, closed = arrays.num_parameters(model), secure.chosen(model)
        rows.append(
            {
                "encrypted": what, "regular expression": layers or "",
                "share of the numbers": sum(model[name].size for name in closed) / whole,
                "CPU-s a site": statistics.median(spent), "bytes up": nbytes,
                "times plain": nbytes / arrays.nbytes(model),
            }
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


def memory_rows() -> list[dict[str, Any]]:
    """The largest resident size of a process that plays a site, or the server of five, beyond one that plays nobody."""
    rows, size = list[dict[str, Any]](), 20_000_000
    base = measure([sys.executable, __file__, "--part", "nobody", "--parameters", str(size)]).peak
    for part in ("site", "server"):
        peak = measure([sys.executable, __file__, "--part", part, "--parameters", str(size)]).peak - base
        rows.append({"who": part, "numbers": size, "MB": peak / 1e6, "models as ciphertexts": peak / (15.13 * size)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def process_rows(times: int) -> list[dict[str, Any]]:
    """How long a site waits for its encryption, in as many processes as this machine has cores, and in one."""
    rows, size = list[dict[str, Any]](), 20_000_000
    model = {"w": np.full(size, 0.5, np.float32)}
    seconds: dict[tuple[int, str], list[float]] = {}
    for _ in range(times):
        for processes in (1, cores()):
            secure = replace(CKKS().among(2, 5, processes), least=1)  # what one has sent is opened
            site, task = secure.site("a", SecretStore(None)), Task(FIT, 1, model)
            site.opened(task)
            started = time.perf_counter()
            sent = site.closed(Update("a", model, 1.0), task, model).delta
            between = time.perf_counter()
            site.opened(Task(EVALUATE, 1, {LAYOUT: secure.layout(model, ["w"]).packed(), **sent}))
            seconds.setdefault((processes, "encrypt"), []).append(between - started)
            seconds.setdefault((processes, "decrypt"), []).append(time.perf_counter() - between)
    for processes in (1, cores()):
        both = {what: statistics.median(seconds[processes, what]) for what in ("encrypt", "decrypt")}
        first = {what: statistics.median(seconds[1, what]) for what in both}
        rows.append(
            {
                "processes": processes, "numbers": size,
                **{f"seconds to {what}": both[what] for what in both},
                **{f"{what} ratio": both[what] / first[what] for what in both},
            }
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


def play(part: str, size: int) -> None:
    """Be a site that encrypts, or a server that adds up what five have sent; the model, and an update, are there."""
    secure = CKKS().among(2, 5)
    model = {"w": np.ones(size, np.float32)}
    delta = {"w": np.full(size, 0.5, np.float32)}
    site, task = secure.site("a", SecretStore(None)), Task(FIT, 1, model)
    if part == "nobody":
        return
    site.opened(task)
    if part == "site":
        site.closed(Update("a", delta, 1.0), task, model)
        return
    names = [f"site-{number}" for number in range(5)]
    few = {"w": np.ones(size // 32, np.float32)}
    del delta, model, task
    expected = {"w": np.broadcast_to(np.zeros((), np.float32), (size,))}
    block = secure.layout(expected, ["w"])
    site.opened(Task(FIT, 1, few))
    made = site.closed(Update("a", few, 1.0), Task(FIT, 1, few), few).delta
    rows = [
        row for number, name in enumerate(made) for row in parts_of(made[name], secure.layout(few, ["w"]).rows(number))
    ]

    def sent(name: str) -> Update:  # ciphertexts of a few numbers, again and again: as large as those of many
        arrays = {
            n: framed([bytes(rows[k % len(rows)]) for k in range(block.rows(i))])
            for i, n in enumerate(block.block_names)
        }
        return Update(name, arrays, 1.0)

    summing = secure.summing(Task(FIT, 1, expected), names, expected, secure.begin(expected, expected, names))
    step = next(summing)

    def answers() -> Iterator[Update]:
        for name in names:
            update = sent(name)
            step.check(update)
            yield update
            del update

    try:
        summing.send(answers())
    except StopIteration:
        return


def esm2_shapes() -> dict[str, Any]:
    """Arrays of the shapes and names of ESM2 with 8 million parameters."""
    from transformers import EsmConfig, EsmForMaskedLM

    config = EsmConfig(
        vocab_size=33, hidden_size=320, num_hidden_layers=6, num_attention_heads=20, intermediate_size=1280,
        position_embedding_type="rotary", pad_token_id=1, mask_token_id=32,
    )  # fmt: skip
    return {name: value.detach().numpy() for name, value in EsmForMaskedLM(config).named_parameters()}


def write(found: dict[str, Any]) -> None:
    """All that is known, for people and for programs."""
    days = ", ".join(f"{day} ({part})" for part, day in found["days"].items())
    lines = [
        "# What secure sums cost",
        "",
        f"{found['parameters']:,} parameters; CPU time, medians. Measured {days}.",
        "",
        "## Secure aggregation by masks",
        "",
        "Words of 32 bits. Bytes down leave out the model, which is the same with and without.",
        "",
        *table(found["rounds"]),
        "",
        "By the graph alone: rounds drawn at random, with a tenth of the sites lost and a fifth that pools what it",
        "knows with the server; those whose sum could not be opened, those in which a site's secrets could have been,",
        "and what masking costs one site.",
        "",
        *table(found["graphs"]),
        "",
        "## Homomorphic encryption",
        "",
        "Bytes are of one site and one round. With a shared key a site decrypts the model that it is sent; with a",
        "holder that one site decrypts, and what goes down is the model in the clear.",
        "",
        *table(found["encrypted"]),
        "",
        "What a site pays for encrypting some arrays of ESM2 with 8 million parameters; the server sees the others.",
        "",
        *table(found["layers"]),
        "",
        "Memory beyond that of a process that holds the model and an update; a model as ciphertexts is 15.1 bytes a",
        "number, four times float32.",
        "",
        *table(found["memory"]),
        "",
        "TenSEAL holds Python's lock, so a site has processes to help it where it has cores: seconds that pass, and",
        "their ratio to those of one process in the same run.",
        "",
        *table(found["processes"]),
    ]
    (RESULTS / "secure_aggregation.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (RESULTS / "secure_aggregation.json").write_text(json.dumps(found, indent=1) + "\n")


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as Markdown."""
    names = list(rows[0])
    body = ["| " + " | ".join(shown(row[name]) for name in names) + " |" for row in rows]
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names), *body]


def shown(value: float | str) -> str:
    if isinstance(value, str):
        return "`" + value.replace("|", "\\|") + "`" if set(value) & set("\\|") else value
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


if __name__ == "__main__":
    main()
