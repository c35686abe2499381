"""The file that says who takes part in a provisioned federation."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfl.cli import main
from sfl.engine.nvflare.federation import Federation, Member, Server, read_project
from sfl.errors import ConfigError

GOOD = """
name: lung
server: {name: fl-server, host: localhost, port: 8123, org: hub}
sites:
  - {name: hospital-a, org: a}
  - {name: hospital-b}
admins:
  - {name: boss@example.org, org: hub, role: project_admin}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "project.yml"


def test_a_project_is_read(file: Path) -> None:
    file.write_text(GOOD)
    assert read_project(file) == Federation(
        name="lung",
        server=Server(name="fl-server", host="localhost", port=8123, org="hub"),
        sites=(Member(name="hospital-a", org="a"), Member(name="hospital-b")),
        admins=(Member(name="boss@example.org", org="hub", role="project_admin"),),
    )


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("role:", "rolle:", r"admins\[0\] must have known keys, got 'rolle'. Did you mean 'role'"),
        ("project_admin", "lead", "must hold a project_admin"),
        ("project_admin", "king", "the role of an admin must be one of"),
        ("port: 8123", "port: 'x'", "port must be of type int, got 'x'"),
        ("port: 8123", "port: 70000", "between 1 and 65535"),
        ("hospital-b", "hospital-a", "hospital-a twice"),
        ("name: hospital-b", "org: b", r"sites\[1\] must have a name"),
        ("hospital-b", "../b", "letters, digits"),
        ("boss@example.org", "boss", "must be an email address, got boss"),
        ("sites:", "sides:", "Did you mean 'sites'"),
        ("- {name: hospital-a, org: a}\n  - {name: hospital-b}", "hospital-a", "sites must be a list"),
        ("name: lung", "- lung", "must be YAML|must be a mapping"),
        ("name: lung", "name: lung\nhe_holder: nobody", "he_holder must be the name of a site, got 'nobody'"),
    ],
)
def test_what_is_wrong_is_said_by_name(file: Path, old: str, new: str, said: str) -> None:
    assert old in GOOD
    file.write_text(GOOD.replace(old, new))
    with pytest.raises(ConfigError, match=said):
        read_project(file)


def test_a_missing_file_is_an_error_of_ours_and_a_usage_exit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["provision", str(tmp_path / "none.yml")]) == 2
    assert "must be a file that can be read" in capsys.readouterr().err
