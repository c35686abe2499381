"""Peak memory of every process of a round with a large model, engine by engine.

    python benchmarks/large_model.py [--engines sim,sim-2,flower,...] [--megabytes 1000]

Two sites whose work is one addition, one round: the model goes out, updates come back, the new model is evaluated on
both sites, checkpointed, and comes home. Each engine runs in a fresh process; every process that it starts is looked at
ten times a second. A figure is the process's largest resident size (`VmHWM`), of which the part in files and shared
memory is said; in models: that, less what the same process takes with a model of five numbers, divided by the model's
size, and the same of memory that is neither shared nor a file's (`RssAnon`).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"
MARK = "_SFL_LARGE"
ENGINES = ("sim", "sim-2", "flower", "flower-deploy", "nvflare", "nvflare-poc", "flower-in-nvflare")
SERVER = {
    "sim": "driver",
    "sim-2": "driver",
    "flower": "simulation",
    "flower-deploy": "flwr-serverapp",
    "nvflare": "simulator",
    "nvflare-poc": "server job",
    "flower-in-nvflare": "flwr-serverapp",
}
"""The process that our loop runs in. In Flower's and FLARE's simulators it is the broker, too."""
_UNITS = {"VmHWM": "peak", "RssAnon": "own", "RssFile": "file", "RssShmem": "shared"}


@dataclass
class Seen:
    """One process: its largest sizes, in bytes."""

    role: str
    peak: int = 0
    own: int = 0
    file: int = 0
    shared: int = 0


def drive(engine: str, megabytes: int, folder: str) -> None:
    """In a fresh process: the run."""
    from functools import partial

    sys.path.insert(0, str(HERE))
    import large_client
    from sfl import FedAvgRecipe, FederationConfig
    from sfl.core import arrays
    from sfl.env import SimEnv, environment

    initial = partial(large_client.model, megabytes) if megabytes else large_client.small
    recipe = FedAvgRecipe(
        name="large",
        client=large_client.AddsOne,
        initial_parameters=initial,
        evaluate_every="end",
        federation=FederationConfig(num_clients=2, num_rounds=1, workers=2 if engine == "sim-2" else 1),
    )
    env = SimEnv() if engine.startswith("sim") else environment(engine)
    started = time.perf_counter()
    result = recipe.execute(env, out=Path(folder) / "run")
    seconds = time.perf_counter() - started
    value = float(next(iter(result.parameters.values())).flat[0])
    expected = (0.25 if megabytes else 0.0) + 5 / 3
    if abs(value - expected) > 1e-5:
        raise RuntimeError(f"the mean must be {expected}, got {value}")
    report = {"seconds": seconds, "nbytes": arrays.nbytes(result.parameters)}
    (Path(folder) / "report.json").write_text(json.dumps(report))


def role_of(pid: int, driver: int) -> str:
    """What a process is, from its name and its command line."""
    proc = Path(f"/proc/{pid}")
    if pid == driver:
        return "driver"
    name = (proc / "comm").read_text().strip()
    line = (proc / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    if name.startswith(("flower-", "flwr")):
        return {"flower-superlin": "SuperLink", "flower-supernod": "SuperNode"}.get(name, name)
    for pattern, role in (
        (r"sfl\.engine\.site_process", "site process"),
        (r"sfl\.engine\.guard", "guard"),
        (r"sfl\.engine\.flower\.deploy", "deployer"),
        (r"sfl\.engine\.flower\.simulate", "simulation"),
        (r"sfl\.engine\.nvflare\.simulate", "simulator"),
        (r"sfl\.engine\.nvflare\.poc", "POC"),
        (r"sfl\.engine\.flower\.commands", "commands"),
        (r"forkserver", "worker"),
        (r"multiprocessing", "worker"),
        (r"flower-superlink", "SuperLink"),
        (r"flower-supernode", "SuperNode"),
        (r"simulator_worker", "FLARE client"),
        (r"runner_process.*server|server.*runner_process", "server job"),
        (r"client.*worker_process|worker_process", "client job"),
        (r"server_train", "server parent"),
        (r"client_train", "client parent"),
        (r"raylet", "raylet"),
        (r"gcs_server", "Ray, other"),
        (r"^ray::", "Ray worker"),
        (r"[/ ]ray[/ ]|^ray", "Ray, other"),
    ):
        if re.search(pattern, line) or re.search(pattern, name):
            return role
    return name


def marked(token: str) -> list[int]:
    """Processes that carry the token in their environment."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"{MARK}={token}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def watch(engine: str, megabytes: int) -> tuple[dict[int, Seen], dict[str, float]]:
    """Run an engine; every process that was seen, and what the run said."""
    token, seen = uuid.uuid4().hex, dict[int, Seen]()
    with tempfile.TemporaryDirectory(prefix="large-", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, str(HERE / "large_model.py"), "--drive", engine, str(megabytes), folder]
        environ = {**os.environ, MARK: token, "OMP_NUM_THREADS": "1"}
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, env=environ, stdout=output, stderr=subprocess.STDOUT)
        pids: list[int] = []
        looks = 0
        while process.poll() is None:
            if looks % 5 == 0:
                pids = marked(token)
            looks += 1
            for pid in pids:
                try:
                    look(pid, process.pid, seen)
                except OSError:
                    continue
            time.sleep(0.1)
        if process.returncode:
            tails = [path.read_text(errors="replace")[-2000:] for path in Path(folder).glob("run/logs/*.log")]
            raise RuntimeError(f"{engine} must succeed, got:\n{log.read_text()[-3000:]}\n" + "\n".join(tails))
        return seen, json.loads((Path(folder) / "report.json").read_text())


def look(pid: int, driver: int, seen: dict[int, Seen]) -> None:
    """Note the sizes of a process."""
    if pid not in seen or seen[pid].role.startswith("python"):
        before = seen.get(pid, Seen(""))
        seen[pid] = Seen(role_of(pid, driver), before.peak, before.own)
    entry = seen[pid]
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in _UNITS:
            setattr(entry, _UNITS[name], max(getattr(entry, _UNITS[name]), int(value.split()[0]) * 1024))


def by_role(seen: dict[int, Seen]) -> dict[str, Seen]:
    """The largest process of each role."""
    roles: defaultdict[str, list[Seen]] = defaultdict(list)
    for entry in seen.values():
        roles[entry.role].append(entry)
    return {role: max(entries, key=lambda one: one.peak) for role, entries in roles.items()}


def measure(engine: str, megabytes: int) -> list[str]:
    """Rows of the table."""
    bare = by_role(watch(engine, 0)[0])
    seen, report = watch(engine, megabytes)
    nbytes = report["nbytes"]
    rows: list[str] = []
    roles = by_role(seen)
    order = sorted(roles, key=lambda role: (role != SERVER[engine], -roles[role].peak))
    for role in order:
        entry, without = roles[role], bare.get(role, Seen(role))
        base, models = without.peak, (entry.peak - without.peak) / nbytes
        if role == SERVER[engine] or models >= 0.05:
            ours = "**server**, " if role == SERVER[engine] else ""
            cells = [engine, ours + role, f"{base / 1e6:.0f}", f"{entry.peak / 1e6:.0f}", f"{models:.2f}"]
            cells += [f"{(entry.own - without.own) / nbytes:.2f}"]
            cells += [f"{max(entry.file, entry.shared) / 1e6:.0f}", f"{report['seconds']:.0f}"]
            rows.append("| " + " | ".join([*cells, f"{nbytes / 1e6:.0f} MB, {datetime.now(UTC):%Y-%m-%d}"]) + " |")
            print(rows[-1], flush=True)
    return rows


def known() -> dict[str, list[str]]:
    """Rows of engines that were measured before."""
    path, found = RESULTS / "large_model.md", defaultdict[str, list[str]](list)
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        engine = line.split("|")[1].strip() if line.startswith("| ") else ""
        if engine in ENGINES:
            found[engine].append(line)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--keep", action=argparse.BooleanOptionalAction, default=True, help="write the results")
    parser.add_argument("--drive", nargs=3, metavar=("ENGINE", "MEGABYTES", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.drive:
        drive(args.drive[0], int(args.drive[1]), args.drive[2])
        return
    rows = known()
    for engine in args.engines.split(","):
        rows[engine] = measure(engine, args.megabytes)
        if args.keep:
            write(rows)


def write(rows: dict[str, list[str]]) -> None:
    head = [
        "# Memory of a round with a large model",
        "",
        "Two sites, one round and one evaluation on each, the result written to a run folder. Sizes in MB.",
        "Peak: the largest resident size of the largest process of its kind. In models: that, less what the same",
        "process takes with a model of five numbers, by the model's size. Its own, in models: the same of its own",
        "memory alone. Shared or file: the most that it had mapped of memory that is shared or in files, which its",
        "peak counts, too: of the simulation on Flower, Ray's store of objects, and files that were read through it.",
        "",
        "| engine | process | itself | peak | in models | its own, in models | shared or file | seconds of the run "
        "| model, when |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    body = [line for engine in ENGINES for line in rows.get(engine, [])]
    (RESULTS / "large_model.md").write_text("\n".join([*head, *body]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
