"""What SFL costs over a plain PyTorch loop that does the same work.

    python benchmarks/bench_overhead.py [--cases 1,3] [--repeats 5]

Both sides run as fresh processes of one thread, in turn (A B A B …); figures are medians. Process time is the CPU time
of the whole process, imports too; the loop's alone stands beside it, since imports hide much of a small job. The plain
loops are in `plain.py` and `plain_esm2.py`, SFL's side in `federated.py`, the work of both in `work.py`.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from measure import HERE, Usage, alternate, child, measure, middle

RESULTS = HERE / "results"
MODEL_BYTES = 100_000_000  # one model of case 3: 25 million float32
STARTUP_RUNS = 7


@dataclass(frozen=True)
class Row:
    """One line of the table. A row without a target informs."""

    case: int
    what: str
    plain: float
    sfl: float
    ratio: float
    unit: str = "s"
    target: float | None = None
    runs: int = 0

    @property
    def verdict(self) -> str:
        """Whether the target is met, to the digits that are shown."""
        return "" if self.target is None else "yes" if round(self.ratio, 2) <= self.target else "NO"


@dataclass(frozen=True)
class Run:
    """One measured process, and what its loop alone took."""

    usage: Usage
    loop_cpu: float
    loop_wall: float


class Bench:
    """Runs jobs of both sides in a folder of its own."""

    def __init__(self, folder: Path, repeats: int) -> None:
        self.folder, self.repeats = folder, repeats

    def run(self, side: str, job: str, *, keep: bool = False) -> Run:
        """One process; ``keep`` leaves its final parameters for `agreement`."""
        report = self.folder / f"{side}-{job}.json"
        usage = child(side, job, self.folder, report, *([report.with_suffix(".npz")] if keep else []))
        return Run(usage, **json.loads(report.read_text()))

    def agreement(self, left: tuple[str, str], right: tuple[str, str]) -> dict[str, float]:
        """How the final parameters of two (side, job) compare."""
        for side, job in (left, right):
            self.run(side, job, keep=True)
        files = [self.folder / f"{side}-{job}.npz" for side, job in (left, right)]
        child("agree", *files, self.folder / "agree.json")
        return json.loads((self.folder / "agree.json").read_text())

    def compare(self, case: int, job: str, what: str, target: float | None) -> tuple[list[Row], dict[str, list[Run]]]:
        """Process time and loop time of both sides, and whether they end with the same parameters."""
        same = self.agreement(("plain", job), ("federated", job))
        if not same["close"]:
            raise SystemExit(f"case {case}: both sides must end with the same parameters, differ by {same['largest']}")
        print(f"case {case}: {what}: final parameters agree (largest difference {same['largest']:.1e})", flush=True)
        runs = alternate({side: lambda s=side: self.run(s, job) for side in ("plain", "federated")}, self.repeats)
        plain, sfl = (middle(runs[side], lambda run: run.usage.cpu) for side in ("plain", "federated"))
        loops = [middle(runs[side], lambda run: run.loop_cpu) for side in ("plain", "federated")]
        rows = [
            Row(case, f"{what}: process time", plain, sfl, sfl / plain, target=target),
            Row(case, f"{what}: loop only", *loops, loops[1] / loops[0]),
        ]
        return rows, runs


def tiny(bench: Bench) -> Iterator[Row]:
    yield from bench.compare(1, "tiny", "2 clients, 3 rounds, tiny MLP", 1.3)[0]


def digits(bench: Bench) -> Iterator[Row]:
    yield from bench.compare(2, "digits", "100 clients, 20 rounds, digits", 1.1)[0]


def large(bench: Bench) -> Iterator[Row]:
    variants = (("large", "25 M parameters", 1.2, 3.0), ("large-numpy", "25 M, numpy client", None, None))
    for job, what, target, peak in variants:
        rows, runs = bench.compare(3, job, f"4 clients, 5 rounds, {what}", target)
        yield from rows
        models = [
            (middle(runs[side], lambda run: run.usage.peak) - bench.run(side, f"{job}-empty").usage.peak) / MODEL_BYTES
            for side in ("plain", "federated")
        ]
        yield Row(3, f"{what}: peak over the process", *models, models[1], "models", peak)


def esm2(bench: Bench) -> Iterator[Row]:
    child("esm2-files", bench.folder)
    yield from bench.compare(4, "esm2", "ESM2 8M, 2 clients, 2 rounds, 20 steps", 1.03)[0]


def startup(bench: Bench) -> Iterator[Row]:
    """Least and median wall time; the interpreter alone is the plain side."""
    help_ = "import sys; sys.argv = ['sfl', '--help']; from sfl.cli import entry; entry()"
    light = "import atexit, sys; atexit.register(lambda: 'torch' in sys.modules and __import__('os')._exit(9)); "
    sides = {"python": "pass", "import sfl": f"{light}import sfl", "sfl --help": light + help_}
    commands = {name: [sys.executable, "-c", code] for name, code in sides.items()}
    runs = alternate(
        {name: lambda c=c: measure(c).wall for name, c in commands.items()}, max(STARTUP_RUNS, bench.repeats)
    )
    print("case 5: no torch after `import sfl` and `sfl --help`")
    for name in ("import sfl", "sfl --help"):
        for word, figure in (("least", min), ("median", lambda values: middle(values, float))):
            plain, sfl = figure(runs["python"]), figure(runs[name])
            yield Row(5, f"{name}, wall, {word} of {len(runs[name])} (plain: python alone)", plain, sfl, sfl / plain)


def workers(bench: Bench) -> Iterator[Row]:
    """The same job with one worker (plain) and with two."""
    child("esm2-files", bench.folder)
    same = bench.agreement(("federated", "esm2"), ("federated", "esm2-2"))
    if not same["equal"]:
        raise SystemExit(f"case 6: workers must not change a bit, differ by {same['largest']}")
    print("case 6: final parameters of 1 and 2 workers are equal, bit for bit", flush=True)
    jobs = {job: lambda j=job: bench.run("federated", j) for job in ("esm2", "esm2-2")}
    runs = alternate(jobs, bench.repeats)
    for what, figure in (("whole process", lambda run: run.usage.wall), ("loop only", lambda run: run.loop_wall)):
        one, two = (middle(runs[job], figure) for job in jobs)
        yield Row(6, f"ESM2 8M, wall, 2 workers over 1: {what}", one, two, two / one)


CASES: dict[int, Callable[[Bench], Iterator[Row]]] = {
    1: tiny, 2: digits, 3: large, 4: esm2, 5: startup, 6: workers,
}  # fmt: skip


def machine() -> dict[str, str]:
    """What the figures were taken on; nothing that names a place or a person."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return {
        "cpu": names[0].split(":")[1].strip() if names else platform.processor(),
        "cores": str(len(names)),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "numpy", "transformers", "scikit-learn")},
    }


def table(rows: list[dict]) -> list[str]:
    """Markdown, which reads well on a screen too."""
    lines = ["| case | what | plain | sfl | ratio | target | ok | runs |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        line = Row(**row)
        target = "" if line.target is None else f"≤ {line.target:g}"
        numbers = f"{line.plain:.3f} {line.unit} | {line.sfl:.3f} {line.unit} | {line.ratio:.2f}"
        lines.append(f"| {line.case} | {line.what} | {numbers} | {target} | {line.verdict} | {line.runs} |")
    return lines


def write(rows: list[Row], repeats: int) -> None:
    """Replace the measured cases in the results, keep the others."""
    path = RESULTS / "overhead.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    measured = {row.case for row in rows}
    merged = [row for row in kept if row["case"] not in measured] + [asdict(row) | {"runs": repeats} for row in rows]
    merged.sort(key=lambda row: row["case"])
    day = datetime.now(UTC).date().isoformat()
    about = machine() | {"date": day}
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": about, "rows": merged}, indent=2, ensure_ascii=False) + "\n")
    words = ", ".join(f"{name} {value}" for name, value in about.items())
    lines = ["# SFL against a plain PyTorch loop", "", f"Medians; {words}. {EXPLAINED}", "", *table(merged)]
    (RESULTS / "overhead.md").write_text("\n".join(lines) + "\n")


EXPLAINED = (
    "Every figure is of fresh processes with one thread, the sides in turn. Process time is user and system CPU time "
    "of the whole process with its imports; the loop has none. Peaks are over that of the same process with the same "
    "job on 25 numbers, in models of 100 MB; their ratio column is SFL's. The numpy client keeps what it returns, so "
    "SFL subtracts into a new array, one layer at a time; `lends_arrays = True` spares that layer."
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default="1,2,3,4,5,6", help="which, e.g. 1,3 (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side (default: 5)")
    arguments = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.repeats)
        for number in map(int, arguments.cases.split(",")):
            measured = list(CASES[number](bench))
            write(measured, max(arguments.repeats, STARTUP_RUNS if number == 5 else 1))
            rows += measured
    print("\n".join(table([asdict(row) | {"runs": arguments.repeats} for row in rows])))
    return int(any(row.verdict == "NO" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
