"""One bare job in a process of its own: ``run.py ENGINE REPORT FOLDER``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
SITES = ("site-1", "site-2", "site-3")


def flower(report: Path, folder: Path) -> None:
    import flower_app
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    server = ServerApp()

    @server.main()
    def main(grid, context):
        context.run_config["report"] = str(report)
        flower_app.main(grid, context)

    backend = {"init_args": {"num_cpus": 2, "include_dashboard": False, "_temp_dir": str(folder / "ray")}}
    run_simulation(server, flower_app.client, 3, backend_config={**backend, "client_resources": {"num_cpus": 1}})


def flower_deploy(report: Path, folder: Path) -> None:
    from sfl.engine.flower.keys import make_node_keys, make_server_keys
    from sfl.engine.ports import free_ports

    app = folder / "app" / "bare"
    app.mkdir(parents=True)
    (app / "__init__.py").write_text('"""Bare."""\n')
    (app / "app.py").write_text((HERE / "flower_app.py").read_text())
    project = (
        '[project]\nname = "bare"\nversion = "1.0.0"\ndescription = "x"\nlicense = "MIT"\ndependencies = []\n'
        '[tool.flwr.app]\npublisher = "x"\n[tool.flwr.app.components]\nserverapp = "bare.app:server"\n'
        f'clientapp = "bare.app:client"\n[tool.flwr.app.config]\nreport = "{report}"\n'
    )
    (app.parent / "pyproject.toml").write_text(project)
    keys = make_server_keys(folder / "keys")
    fleet, control, *apps = (f"127.0.0.1:{port}" for port in free_ports(3 + len(SITES)))
    home = folder / "home"
    home.mkdir()
    os.environ["FLWR_HOME"] = str(home)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "bare"\n[superlink.bare]\naddress = "{control}"\n'
        f'root-certificates = "{keys.authority}"\n'
    )

    def start(name, *options):
        with (folder / "log").open("ab") as log:
            subprocess.Popen([name, *map(str, options)], stdout=log, stderr=subprocess.STDOUT)

    start(
        "flower-superlink", "--ssl-ca-certfile", keys.authority, "--ssl-certfile", keys.certificate,
        "--ssl-keyfile", keys.key, "--enable-supernode-auth", "--disable-runtime-dependency-installation",
        "--fleet-api-address", fleet, "--control-api-address", control, "--serverappio-api-address", apps[0],
    )  # fmt: skip
    while subprocess.run(["flwr", "ls", "bare"], capture_output=True, check=False).returncode:
        time.sleep(0.1)
    for name, address in zip(SITES, apps[1:], strict=True):
        private, public = make_node_keys(folder / "keys", name)
        subprocess.run(["flwr", "supernode", "register", public, "bare"], check=True)
        start(
            "flower-supernode", "--root-certificates", keys.authority, "--superlink", fleet,
            "--auth-supernode-private-key", private, "--clientappio-api-address", address,
        )  # fmt: skip
    subprocess.run(["flwr", "run", app.parent, "bare"], check=True)
    while not report.exists():
        time.sleep(0.1)


def flare_job(report: Path, folder: Path) -> Path:
    job = folder / "job" / "bare"
    (job / "app" / "config").mkdir(parents=True)
    (job / "app" / "custom").mkdir()
    (job / "app" / "custom" / "flare_app.py").write_text((HERE / "flare_app.py").read_text())
    (job / "meta.json").write_text(json.dumps({"name": "bare", "min_clients": 3, "deploy_map": {"app": ["@ALL"]}}))
    controller = {"id": "c", "path": "flare_app.BareController", "args": {"report": str(report)}}
    executor = {"tasks": ["*"], "executor": {"path": "flare_app.BareExecutor", "args": {}}}
    for name, config in (("server", {"workflows": [controller]}), ("client", {"executors": [executor]})):
        path = job / "app" / "config" / f"config_fed_{name}.json"
        path.write_text(json.dumps({"format_version": 2, **config}))
    return job


def nvflare(report: Path, folder: Path) -> None:
    from nvflare.private.fed.app.simulator.simulator_runner import SimulatorRunner

    job = flare_job(report, folder)
    SimulatorRunner(str(job), str(folder / "flare"), clients=",".join(SITES), threads=3).run()


def nvflare_poc(report: Path, folder: Path) -> None:
    from sfl.engine.launch import Launch
    from sfl.engine.nvflare.federation import Federation, Member, Server
    from sfl.engine.nvflare.provision import provision, service_command
    from sfl.engine.nvflare.submit import submit
    from sfl.engine.ports import free_ports

    server = Server(name="server", host="localhost", port=free_ports(1)[0])
    admin = Member(name="admin@bare.org", role="project_admin")
    federation = Federation(name="bare", server=server, sites=tuple(Member(name=n) for n in SITES), admins=(admin,))
    kits = provision(federation, folder / "kits", storage=folder / "storage")
    for name in ("server", *SITES):
        with (folder / f"{name}.log").open("wb") as log:
            subprocess.Popen(service_command(kits / name, sys.executable), stdout=log, stderr=subprocess.STDOUT)
    submit(Launch(folder), kits / "admin@bare.org", flare_job(report, folder), shares_disk=False)


if __name__ == "__main__":
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    sys.path.insert(0, str(HERE))
    run = {"flower": flower, "flower-deploy": flower_deploy, "nvflare": nvflare, "nvflare-poc": nvflare_poc}
    run[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
