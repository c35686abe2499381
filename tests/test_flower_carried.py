"""What travels in a Flower app, and what comes home sealed."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from base64 import b64encode
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

import pytest

from scripts import recipe, write
from sfl.core.events import Notice, StageStarted
from sfl.core.task import FIT
from sfl.engine.flower.app_folder import SIGNED, carry, write_app
from sfl.engine.flower.carried import carried_by_server, carried_by_site, remembered_sites
from sfl.engine.flower.following import Following, _extract
from sfl.engine.flower.home import bring_home
from sfl.engine.launch import Launch
from sfl.engine.local import LocalEngine
from sfl.engine.owner import new_key, run_of, sign
from sfl.env import FlowerEnv, ProdEnv
from sfl.env.carry import Cargo
from sfl.env.remote import Plan
from sfl.env.serve import serve
from sfl.errors import ConfigError, EngineError
from sfl.io.relay import EventReader
from sfl.io.tree import save_tree, write_text
from sfl.privacy.sealed import Reader, Seal
from sfl.types import site_names
from sfl.utils.plain import describe, restore
from test_engines import remembers

KEY = new_key()
RUN = run_of(KEY)


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", "known")
    made = Launch(tmp_path / "launch")
    made.folder.mkdir()
    made.settings.write_text(json.dumps({"run": RUN, "names": [], "num_clients": 2}))
    made.program.write_text("{}")
    made.recipe.write_bytes(b"\x00recipe\xff")
    return made


def app_of(launch: Launch, folder: Path, code: Mapping[str, Path] | None = None) -> str:
    app = write_app(folder / "app", None, "an app")
    carry(app, launch, code or {})
    sign(app / "sfl_job" / "launch", KEY, SIGNED)
    return str(app / "sfl_job" / "server.py")


def test_what_is_sealed_opens_for_its_reader_alone_whole_and_in_its_place() -> None:
    reader = Reader()
    seal = Seal(reader.public, 2)
    one, two = seal.close(b"parameters"), seal.close(b"parameters")
    assert reader.open(one, 0, 2) == reader.open(two, 1, 2) == b"parameters"
    assert b"parameters" not in one
    for wrong in (one[:-1], one[:5], b"", one[:-1] + bytes([one[-1] ^ 1]), two):
        with pytest.raises(EngineError, match="a sealed part must open"):
            reader.open(wrong, 0, 2)
    for reads, count in ((Reader(), 2), (reader, 1)):
        with pytest.raises(EngineError, match="a sealed part must open"):
            reads.open(one, 0, count)


def test_a_carried_launch_is_unpacked_once_where_its_run_is_kept(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("x = 1\n")
    module = app_of(launch, tmp_path, {"mine.py": tmp_path / "mine.py"})
    site = carried_by_site(module, 7, "hospital-a")
    assert site.folder == tmp_path / "home" / "sfl-runs" / RUN / "launch-site-hospital-a-7"
    assert site.folder.stat().st_mode & 0o077 == 0
    assert site.read_settings()["names"] == ["hospital-a"]
    assert carried_by_site(module, 7, "hospital-a") == site
    server = carried_by_server(module, 7)
    assert server.recipe.read_bytes() == b"\x00recipe\xff"
    assert (tmp_path / "app" / "mine.py").is_file()
    remembered_sites(server, ["a", "b"])
    remembered_sites(server, ["a", "b"])
    with pytest.raises(EngineError, match="must go on with the sites a, b, got a, c"):
        remembered_sites(server, ["a", "c"])
    with pytest.raises(EngineError, match="a site's name must be of letters"):
        carried_by_site(module, 7, "../a")


def following(launch: Launch, *logs: str) -> list[str]:
    """What is told of logs: a name for each event, and the level of each notice."""
    home = Following(launch, Reader())
    for log in logs:
        home.read(io.StringIO(log))
    told = [restore(json.loads(line), allow=("sfl.core.events:",)) for line in launch.events.read_text().splitlines()]
    return [event.level if isinstance(event, Notice) else str(event) for event in told]


EVENTS = [f'sfl-event {number} "{name}"\n' for number, name in enumerate("abcdef")]


@pytest.mark.parametrize(
    ("logs", "told"),
    [
        (["".join(EVENTS)], "abcdef"),
        (["".join(EVENTS[:2] + EVENTS[3:])], "ab!def"),
        (["".join([*EVENTS[:1], *EVENTS[2:3], *EVENTS[4:]])], "a!cef"),  # two gaps, one word
        (["".join(EVENTS[1:])], "!bcdef"),
        (["".join(EVENTS[:3])[:-4], "".join(EVENTS)], "abcdef"),  # cut within an event
        (["".join(EVENTS[:3])[:-1], "".join(EVENTS)], "abcdef"),  # cut at its end
        (["".join([*EVENTS[:2], "sfl-event 2 {torn\n", *EVENTS[3:]])], "ab!def"),
        (["".join([*EVENTS, "sfl-event \nsfl-event x y\nsfl-part x y\nsfl-part 0/0 y\n"])], "abcdef"),
    ],
)
def test_a_log_that_lost_lines_is_followed_on_and_the_loss_is_said_once(
    launch: Launch, logs: list[str], told: str
) -> None:
    assert following(launch, *logs) == ["warning" if name == "!" else name for name in told]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("test_mine.py", "must not be named like a test, got 'test_mine'"),
        ("train-script/mine_test.py", "must not be named like a test, got 'mine_test'"),
        ("train-script/train", r"must be named \*\.py, got 'train'"),
        ("lib", "must not be named lib"),
        ("sfl_job", "must not be named sfl_job"),
    ],
)
def test_code_that_flower_would_leave_out_is_refused(launch: Launch, tmp_path: Path, place: str, message: str) -> None:
    path = tmp_path / Path(place).name
    path.touch() if "." in place or place.endswith("train") else path.mkdir()
    with pytest.raises(ConfigError, match=message):
        app_of(launch, tmp_path, {place: path})


def test_initial_parameters_that_no_flower_app_can_hold_are_refused_with_a_way_out(
    launch: Launch, tmp_path: Path
) -> None:
    launch.recipe.write_bytes(bytes(11 << 20))
    with pytest.raises(ConfigError, match=r"must fit into a Flower app's 10 MiB, got 11 MiB: .*nvflare-prod"):
        app_of(launch, tmp_path)


def test_flower_takes_all_of_a_script_and_what_lies_beside_it_and_a_site_finds_it(
    launch: Launch, tmp_path: Path
) -> None:
    write(tmp_path, "import deep.m, lib\n", "train.py")
    write(tmp_path, "x = 1\n", "deep/m.py")
    write(tmp_path, "y = 1\n", "lib/__init__.py")
    subject = recipe(str(tmp_path / "train.py"))
    cargo = Cargo.of(subject, subject.build())
    cargo.write(launch, launch.read_settings())
    module = Path(app_of(launch, tmp_path, cargo.code))
    app = tmp_path / "app"
    flwr = Path(sys.executable).parent / "flwr"
    subprocess.run([flwr, "build", "--app", app], cwd=tmp_path, check=True, capture_output=True)
    (bundle,) = tmp_path.glob("*.fab")
    with zipfile.ZipFile(bundle) as files:
        names = set(files.namelist())
    assert {"train-script/train.py", "train-script/deep/m.py", "train-script/lib/__init__.py"} <= names
    assert {f"sfl_job/launch/{path.name}" for path in (app / "sfl_job" / "launch").iterdir()} <= names
    program = carried_by_site(str(module), 7, "a").read_program()
    assert program.kwargs["script"]["path"] == str(app / "train-script" / "train.py")


def kept(launch: Launch, folder: Path, key: bytes = KEY, flower: int = 7, **said: Any) -> Launch:
    """What the server takes of an app that says more than it should."""
    launch.add_settings(**said)
    app = app_of(launch, folder)
    sign(Path(app).parent / "launch", key, SIGNED)
    return carried_by_server(app, flower)


def test_a_run_is_of_who_has_its_key(launch: Launch, tmp_path: Path) -> None:
    mine = kept(launch, tmp_path / "1")
    assert mine.folder.parent == tmp_path / "home" / "sfl-runs" / RUN
    assert mine.folder.parent.stat().st_mode & 0o077 == 0
    theirs = kept(launch, tmp_path / "2", new_key(), run=RUN)  # who names a run has not its key
    assert theirs.folder.parent.name not in ("", RUN)
    assert theirs.folder.parent.parent == mine.folder.parent.parent
    for attack in (launch.settings, launch.program, launch.recipe):  # an order that was seen, and changed
        app = Path(app_of(launch, tmp_path / attack.name)).parent / "launch"
        name = "recipe.json" if attack == launch.recipe else attack.name
        (app / name).write_bytes((app / name).read_bytes() + b" ")
        with pytest.raises(EngineError, match=r"must be signed with the key of its run, got one that is not\. Changed"):
            carried_by_server(str(app.parent / "server.py"), 8)
    (app / "owner.json").unlink()
    with pytest.raises(EngineError, match="must be signed with the key of its run"):
        carried_by_site(str(app.parent / "client.py"), 8, "a")


@pytest.mark.parametrize("backend", ["flower-deploy", "nvflare-prod"])
def test_the_key_of_a_run_stays_in_its_folder_and_nobody_goes_on_without_it(backend: str, tmp_path: Path) -> None:
    out, job = tmp_path / "run", remembers().build()
    kit = tmp_path / "kit" / "startup"
    write(kit, "{}", "fed_admin.json")
    prod = backend == "nvflare-prod"
    env = ProdEnv(startup_kit=kit.parent) if prod else FlowerEnv(superlink="fl.example.org:9093")
    out.mkdir()

    def settings(name: str, *, resume: bool) -> str:
        launch = Launch(tmp_path / name)
        launch.folder.mkdir()
        said = env.settings(Plan(remembers(), job, launch, out, resume))
        assert said["run"] == run_of((launch.folder / "owner.key").read_bytes())
        assert (launch.folder / "owner.key").read_bytes().hex() not in json.dumps(said)
        return said["run"]

    begun = settings("one", resume=False)
    assert (out / "owner.key").stat().st_mode & 0o777 == 0o600
    assert settings("two", resume=True) == begun
    for wrong in (None, new_key(), b"torn"):
        (out / "owner.key").unlink() if wrong is None else (out / "owner.key").write_bytes(wrong)
        with pytest.raises(ConfigError, match=r"out must hold the key of its run, owner\.key, got none or another"):
            settings(f"three-{0 if wrong is None else len(wrong)}", resume=True)


def test_an_order_counts_once_and_a_later_one_goes_on(launch: Launch, tmp_path: Path) -> None:
    old = app_of(launch, tmp_path / "1")
    for flower in (7, 7):
        carried_by_server(old, flower)
        carried_by_site(old, flower, "a")
    with pytest.raises(EngineError, match="must be new, got a copy of one that was given before"):
        carried_by_server(old, 8)
    with pytest.raises(EngineError, match="must be new, got a copy"):
        carried_by_site(old, 8, "a")
    new = app_of(launch, tmp_path / "2")
    assert carried_by_server(new, 9).folder.parent == carried_by_server(old, 7).folder.parent
    with pytest.raises(EngineError, match="must be new, got a copy"):
        carried_by_server(old, 10)


def test_what_an_app_says_of_places_on_a_machine_is_not_taken(launch: Launch, tmp_path: Path) -> None:
    elsewhere = str(tmp_path / "elsewhere")
    said: dict[str, Any] = dict.fromkeys(
        ("run", "out", "sites", "logs", "server", "code", "keeper", "allow", "wait"), elsewhere
    )
    server = kept(launch, tmp_path / "1", **said, run_id="../..", idle=1, most=0)
    site = carried_by_site(app_of(launch, tmp_path / "2"), 7, "server")  # a site's name is its own
    assert site.folder != server.folder
    for made in (server, site):
        assert made.folder.parent == tmp_path / "home" / "sfl-runs" / RUN
        assert elsewhere not in made.settings.read_text()
    assert not Path(elsewhere).exists()


def test_what_a_server_made_comes_home_through_a_log(
    launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = Reader()
    launch.add_settings(reader=reader.public.hex())
    server = carried_by_server(app_of(launch, tmp_path), 7)
    made = Path(server.read_settings()["out"])
    (made / "checkpoints").mkdir(parents=True)
    (made / "checkpoints" / "1").write_bytes(bytes(200_000))
    state = b"what the sites trained together"
    server.final.write_bytes(state)
    server.events.write_text("{}\n{}\n{}\n")
    server.outcome.write_text('{"error": null, "reason": ""}')
    bring_home(server)
    log = capsys.readouterr().out
    # In the clear, or as base64 from any of the three places a byte can have in it.
    assert state.decode() not in log
    assert all(b64encode(bytes(pad) + state)[4:-4].decode() not in log for pad in range(3))
    home = Following(launch, reader)
    home.read(io.StringIO("other\nsfl-event 0 {}\n" + log[: len(log) // 2]))
    assert not home.unpack()
    assert re.fullmatch(r" that came home whole, got \d+ of \d+ parts of it: .*", home.missing())
    home.read(io.StringIO("sfl-event 0 {}\nsfl-event 1 {}\n" + log))  # asked for again, it begins anew
    assert home.unpack()
    assert launch.events.read_text() == "{}\n{}\n{}\n"  # the last line was lost, and came with the result
    assert launch.final.read_bytes() == state
    assert not (launch.folder / "home.tar").exists()
    assert not (server.folder / "home.tar").exists()
    assert (launch.folder / "home" / "run" / "checkpoints" / "1").stat().st_size == 200_000


def test_parts_go_straight_to_where_flower_uploads_from_and_wait_for_it(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower drops what is not uploaded three seconds after the app's end, and prints what goes through its output."""
    reader, log_queue = Reader(), Queue[str]()
    shown, longest, uploaded = io.StringIO(), 0, list[str]()
    launch.add_settings(reader=reader.public.hex())
    server = carried_by_server(app_of(launch, tmp_path), 7)
    server.final.write_bytes(bytes(30 << 20))
    server.outcome.write_text('{"error": null, "reason": ""}')

    class Output(io.StringIO):
        """As Flower leaves it: what is written is shown, and queued."""

        def __init__(self) -> None:
            super().__init__()

            def write(text: str) -> int:
                log_queue.put(text)
                return shown.write(text)

            self.write = write

    monkeypatch.setattr("sys.stdout", Output())
    thread = Thread(target=bring_home, args=(server,))
    thread.start()
    while thread.is_alive() or not log_queue.empty():
        longest = max(longest, log_queue.qsize())
        try:
            uploaded.append(log_queue.get(timeout=0.01))
        except Empty:
            continue
    thread.join()
    monkeypatch.undo()
    assert shown.getvalue() == ""
    assert longest <= 128 < len(uploaded)
    home = Following(launch, reader)
    home.read(io.StringIO("".join(uploaded)))
    assert home.unpack()
    assert launch.final.stat().st_size == 30 << 20


def test_what_is_too_much_is_left_out_by_name_and_a_last_state_is_missed(
    launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfl.engine.flower.home.MOST", 1000)
    reader = Reader()
    launch.add_settings(reader=reader.public.hex())
    server = carried_by_server(app_of(launch, tmp_path), 7)
    made = Path(server.read_settings()["out"]) / "checkpoints"
    made.mkdir(parents=True)
    (made / "1").write_bytes(bytes(2000))
    (made / "2").write_bytes(bytes(200))
    server.outcome.write_text('{"error": "RoundError", "message": ""}')
    bring_home(server)
    home = Following(launch, reader)
    home.read(io.StringIO(capsys.readouterr().out))
    assert home.unpack()
    assert "1 files did not fit to come home: run/checkpoints/1." in launch.events.read_text()
    server.final.write_bytes(bytes(2000))
    server.outcome.write_text('{"error": null, "reason": ""}')
    bring_home(server)
    home = Following(launch, reader)
    home.read(io.StringIO(capsys.readouterr().out))
    with pytest.raises(
        EngineError, match=r"the last state of a run must fit to come home, got more\. It is on the Sup"
    ):
        home.unpack()


@pytest.mark.parametrize("most", [100, 500])
def test_a_job_whose_state_cannot_come_home_is_refused_before_a_site_trains(tmp_path: Path, most: int) -> None:
    """By its parameters alone, which are 124 bytes, or by its first checkpoint."""

    def trained(folder: Path, most: int) -> tuple[str, bool]:
        launch = Launch(folder)
        launch.folder.mkdir()
        save_tree(launch.recipe, describe(remembers(), "the recipe"))
        write_text(launch.settings, json.dumps({"out": str(folder / "run"), "resume": False, "most": most}))
        serve(launch, lambda: LocalEngine(remembers().build().program, site_names(3)))
        with closing(EventReader(launch.events)) as reader:
            events = list(reader.new())
        return launch.read_error(), any(isinstance(event, StageStarted) and event.stage == FIT for event in events)

    error, has_trained = trained(tmp_path / "one", most)
    assert re.search(r"must fit into \S+ GiB to come home through a SuperLink's log, got \S+ GiB", error)
    assert not has_trained
    assert trained(tmp_path / "two", 1 << 20) == ("", True)


@pytest.mark.parametrize("kind", ["up", "absolute", "link"])
def test_an_archive_that_leads_elsewhere_is_refused(kind: str, tmp_path: Path) -> None:
    packed, home = tmp_path / "a.tar", tmp_path / "home"
    with tarfile.open(packed, "w") as tar:
        member = tarfile.TarInfo({"up": "x/../../b", "absolute": f"{tmp_path}/b", "link": "b"}[kind])
        member.type, member.linkname = (tarfile.SYMTYPE, "/etc") if kind == "link" else (tarfile.REGTYPE, "")
        tar.addfile(member)
    with pytest.raises(EngineError, match="must be files below one folder"):
        _extract(packed, home)
    assert not (tmp_path / "b").exists()
