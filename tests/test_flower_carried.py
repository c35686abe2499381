"""What travels in a Flower app, and what comes home sealed."""

from __future__ import annotations

import io
import json
import re
from base64 import b64encode
from pathlib import Path

import pytest

from sfl.core.events import Notice
from sfl.engine.flower.app_folder import carry, write_app
from sfl.engine.flower.attach import Following
from sfl.engine.flower.carried import carried_by_server, carried_by_site, remembered_sites
from sfl.engine.flower.home import bring_home
from sfl.engine.flower.sealed import Reader, seal
from sfl.engine.launch import Launch
from sfl.errors import ConfigError, EngineError
from sfl.utils.plain import restore

RUN = "0" * 31 + "a"


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


def app_of(launch: Launch, folder: Path, **modules: Path) -> str:
    app = write_app(folder / "app", None, "an app")
    carry(app, launch, modules)
    return str(app / "sfl_job" / "server.py")


def test_what_is_sealed_opens_for_its_reader_alone_and_only_whole() -> None:
    reader = Reader()
    sealed = seal(b"parameters", reader.public)
    assert reader.open(sealed) == b"parameters"
    assert b"parameters" not in sealed
    for wrong in (sealed[:-1], sealed[:5], b"", sealed[:-1] + bytes([sealed[-1] ^ 1])):
        with pytest.raises(EngineError, match="a sealed result must open"):
            reader.open(wrong)
    with pytest.raises(EngineError, match="a sealed result must open"):
        Reader().open(sealed)


def test_a_carried_launch_is_unpacked_once_where_its_run_is_kept(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("x = 1\n")
    module = app_of(launch, tmp_path, mine=tmp_path / "mine.py")
    site = carried_by_site(module, 7, "hospital-a")
    assert site.folder == tmp_path / "home" / "sfl-runs" / RUN / "launch-hospital-a-7"
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


def test_a_module_that_flower_would_leave_out_is_refused(launch: Launch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must not be named like a test, got 'test_mine'"):
        app_of(launch, tmp_path, test_mine=tmp_path / "test_mine.py")


def test_a_run_id_that_leads_elsewhere_is_refused(launch: Launch, tmp_path: Path) -> None:
    launch.add_settings(run="../../x")
    with pytest.raises(EngineError, match="a run id must be 32 hexadecimal digits"):
        carried_by_server(app_of(launch, tmp_path), 7)


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
    assert (launch.folder / "home" / "run" / "checkpoints" / "1").stat().st_size == 200_000
