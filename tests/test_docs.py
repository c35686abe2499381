"""The documentation is executed: every python block of README and docs, every doctest of the source.

A block that cannot run here has ``<!-- no-run: reason -->`` on the line before it; the reason is what the skip says.
Blocks of one file run in order, in one namespace, in an empty folder.
"""

import doctest
import importlib
import pkgutil
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import sfl
from sfl.errors import MissingExtraError

ROOT = Path(__file__).resolve().parents[1]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = [m.name for m in pkgutil.walk_packages(sfl.__path__, "sfl.") if not m.name.endswith("__main__")]

FENCE = re.compile(r"^( *)(`{3,}|~{3,}) *(\S*)")
NO_RUN = re.compile(r"^\s*<!-- *no-run:(.*?)-->\s*$")


@dataclass(frozen=True)
class Block:
    """One fenced block: where it starts, its language, its text, and the reason not to run it (None: run it)."""

    line: int
    language: str
    text: str
    reason: str | None = None


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a Markdown text, in order. An unclosed fence is an error, as is a marker with no block."""
    found: list[Block] = []
    lines = text.splitlines()
    position = 0
    while position < len(lines):
        opening = FENCE.match(lines[position])
        before = lines[position - 1] if position else ""
        marker = NO_RUN.match(before)
        if opening is None:
            assert marker is None, f"line {position}: a no-run marker must stand on the line before a block"
            position += 1
            continue
        indent, fence, language = opening.groups()
        start = position + 1
        ends = (i for i in range(start, len(lines)) if lines[i].strip() == fence)
        end = next(ends, None)
        assert end is not None, f"line {start}: the block is never closed"
        body = "\n".join(line.removeprefix(indent) for line in lines[start:end])
        found.append(Block(start, language, body, marker.group(1).strip() if marker else None))
        position = end + 1
    return found


def run_blocks(path: Path) -> list[str]:
    """Execute the python blocks of a file in the current folder; returns the reasons of those that were skipped."""
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    skipped: list[str] = []
    for block in blocks(path.read_text(encoding="utf-8")):
        if block.language != "python":
            continue
        if block.reason is not None:
            assert block.reason, f"{path.name}:{block.line}: no-run must give a reason"
            skipped.append(f"{path.name}:{block.line}: {block.reason}")
            continue
        source = "\n" * block.line + block.text  # so that a traceback shows the line of the page
        exec(compile(source, str(path), "exec", dont_inherit=True), namespace)
    return skipped


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_python_block_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for reason in run_blocks(path):
        print("not run:", reason)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_python_block_compiles_and_every_skip_has_a_reason(path: Path) -> None:
    for block in blocks(path.read_text(encoding="utf-8")):
        assert block.reason != "", f"{path.name}:{block.line}: no-run must give a reason"
        if block.language == "python":
            compile(block.text, f"{path.name}:{block.line}", "exec", dont_inherit=True)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```|`[^`]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    relative = [target for target in targets if target and "://" not in target and not target.startswith("mailto:")]
    assert [target for target in relative if not (path.parent / target).exists()] == []


@pytest.mark.parametrize("name", MODULES)
def test_every_doctest_of_the_source_holds(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except MissingExtraError as error:
        pytest.skip(str(error))
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).failed == 0


def test_requirements_are_the_pins_of_the_constraints() -> None:
    def lines(name: str) -> set[str]:
        return {line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")}

    required = lines("requirements.txt")
    assert required <= lines("constraints.txt")
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in required)
    named = {line.split("==")[0].lower() for line in required}
    assert {"numpy", "pyyaml", "rich", "safetensors", "cyclopts", "torch", "transformers", "datasets"} <= named


# The checker itself


def page(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "page.md"
    path.write_text(text, encoding="utf-8")
    return path


def test_blocks_share_a_namespace_and_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    body = "x += 1\n  import pathlib\n  pathlib.Path('x').write_text(str(x))"
    text = f"```python\nx = 1\n```\n\n- indented\n  ```python\n  {body}\n  ```\n"
    assert run_blocks(page(tmp_path, text)) == []
    assert (tmp_path / "x").read_text() == "2"


def test_a_failing_block_fails_at_its_own_line(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        run_blocks(page(tmp_path, "# Title\n\n```python\n1 / 0\n```\n"))
    assert caught.traceback[-1].lineno == 3  # counted from 0: the fourth line


def test_other_languages_and_marked_blocks_do_not_run(tmp_path: Path) -> None:
    text = "```bash\n$ sfl run\n```\n<!-- no-run: needs a cluster -->\n```python\n1 / 0\n```\n"
    assert run_blocks(page(tmp_path, text)) == ["page.md:5: needs a cluster"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- no-run: -->\n```python\n1 / 0\n```\n", "must give a reason"),
        ("<!-- no-run: because -->\n\n```python\n1 / 0\n```\n", "on the line before a block"),
        ("```python\nx = 1\n", "never closed"),
    ],
)
def test_a_broken_page_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        run_blocks(page(tmp_path, text))
