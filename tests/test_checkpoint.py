"""Checkpoints: what goes in comes out bit for bit, what is torn is detected, the old one stays until it is replaced."""

import copy
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sfl.core.algorithm import ServerState
from sfl.errors import CheckpointError
from sfl.io.checkpoint import Checkpoints
from sfl.io.tree import load_tree, save_tree, write_text

DTYPES = st.sampled_from(["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", ">f4", ">i2"])
ARRAYS = DTYPES.flatmap(lambda d: hnp.arrays(np.dtype(d), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0)))
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | ARRAYS
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.sampled_from(["$tensor", "$dict"]), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(left: Any, right: Any) -> bool:
    """The same values, types, and bits; the byte order of an array may have become the machine's."""
    if isinstance(left, np.ndarray):
        native = left.astype(left.dtype.newbyteorder("="))
        other = right.astype(right.dtype.newbyteorder("="))
        return (native.dtype, native.shape, native.tobytes()) == (other.dtype, other.shape, other.tobytes())
    if isinstance(left, list | tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[k], right[k]) for k in left)
    if isinstance(left, float):
        return isinstance(right, float) and (np.float64(left).tobytes() == np.float64(right).tobytes() or left != left)
    return type(left) is type(right) and left == right


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@given(tree=TREES)
@settings(max_examples=60)
def test_a_tree_comes_back_bit_for_bit(folder: Path, tree: Any) -> None:
    before = copy.deepcopy(tree)
    save_tree(folder / "tree.safetensors", tree)
    assert same(before, load_tree(folder / "tree.safetensors"))
    assert same(before, tree)


def test_arrays_that_are_not_contiguous_come_back(folder: Path) -> None:
    base = np.arange(24.0).reshape(4, 6)
    tree = {
        "t": base.T,
        "step": base[::2, ::-3],
        "f": np.asfortranarray(base),
        "wide": np.broadcast_to(base[0], (3, 6)),
    }
    save_tree(folder / "views.safetensors", tree)
    back = load_tree(folder / "views.safetensors")
    assert same(tree, back)
    assert all(value.flags.writeable for value in back.values())
    back["t"][:] = 0.0  # and belong to whoever loaded them


@pytest.mark.parametrize("tree", [object(), {"a": {1, 2}}, [np.float32(1.0)], {1: "x"}, np.array(["text"])])
def test_what_cannot_be_kept_is_refused(folder: Path, tree: Any) -> None:
    with pytest.raises(CheckpointError):
        save_tree(folder / "odd.safetensors", tree)
    assert not (folder / "odd.safetensors").exists()


def state(round: int) -> ServerState:
    parameters = {"w": np.arange(6, dtype=np.float32).reshape(2, 3) + round, "none": np.zeros((0, 2))}
    return ServerState(round, parameters, {"m": np.full(3, 0.1 * round), "t": (1, None)}, [None, {"times": round}])


@pytest.fixture(scope="module")
def two_rounds(folder: Path) -> Checkpoints:
    checkpoints = Checkpoints(folder / "two")
    checkpoints.save(state(1))
    checkpoints.save(state(2))
    return checkpoints


def damaged(two_rounds: Checkpoints, content: bytes) -> tuple[ServerState | None, list[str]]:
    """What is loaded when the newest checkpoint holds ``content``."""
    newest = two_rounds.paths()[-1]
    whole = newest.read_bytes()
    newest.write_bytes(content)
    said: list[str] = []
    try:
        return two_rounds.load_latest(said.append), said
    finally:
        newest.write_bytes(whole)


def test_the_newest_whole_one_is_used(two_rounds: Checkpoints) -> None:
    said: list[str] = []
    found = two_rounds.load_latest(said.append)
    assert found is not None
    assert said == []
    assert same([found.round, found.parameters, found.algorithm, found.mechanisms], list(vars_of(state(2))))


def vars_of(value: ServerState) -> tuple[Any, ...]:
    return value.round, value.parameters, value.algorithm, value.mechanisms


def falls_back(found: tuple[ServerState | None, list[str]]) -> bool:
    before, said = found
    assert before is not None
    return before.round == 1 and len(said) == 1 and said[0].endswith("Using the checkpoint before it.")


@given(data=st.data())
def test_a_truncated_one_is_detected(two_rounds: Checkpoints, data: st.DataObject) -> None:
    whole = two_rounds.paths()[-1].read_bytes()
    length = data.draw(st.integers(0, len(whole) - 1))
    assert falls_back(damaged(two_rounds, whole[:length]))


def test_a_flip_in_any_byte_is_detected(two_rounds: Checkpoints, tmp_path: Path) -> None:
    whole = two_rounds.paths()[-1].read_bytes()
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << (position % 8)
        (tmp_path / "flipped").write_bytes(flipped)
        with pytest.raises(CheckpointError):
            load_tree(tmp_path / "flipped")


@given(position=st.integers(0), bit=st.integers(0, 7))
@settings(max_examples=20)
def test_a_flip_of_any_bit_is_detected(two_rounds: Checkpoints, position: int, bit: int) -> None:
    flipped = bytearray(two_rounds.paths()[-1].read_bytes())
    flipped[position % len(flipped)] ^= 1 << bit
    assert falls_back(damaged(two_rounds, bytes(flipped)))


@given(junk=st.binary(min_size=1, max_size=200))
def test_junk_at_the_end_or_alone_is_detected(two_rounds: Checkpoints, junk: bytes) -> None:
    assert falls_back(damaged(two_rounds, two_rounds.paths()[-1].read_bytes() + junk))
    assert falls_back(damaged(two_rounds, junk))


def test_a_foreign_file_is_no_checkpoint(two_rounds: Checkpoints, tmp_path: Path) -> None:
    from safetensors.numpy import save

    assert falls_back(damaged(two_rounds, save({"w": np.zeros(2)})))
    assert falls_back(damaged(two_rounds, save({"w": np.zeros(2)}, metadata={"sfl": "[1, 2]"})))
    assert falls_back(damaged(two_rounds, save({"w": np.zeros(2)}, metadata={"sfl": "{"})))


def test_when_none_is_whole_it_is_an_error(two_rounds: Checkpoints, tmp_path: Path) -> None:
    shutil.copytree(two_rounds.folder, tmp_path / "torn")
    torn = Checkpoints(tmp_path / "torn")
    for path in torn.paths():
        path.write_bytes(path.read_bytes()[:-1])
    said: list[str] = []
    with pytest.raises(CheckpointError, match="must hold a whole checkpoint, got 2 torn ones"):
        torn.load_latest(said.append)
    assert len(said) == 2


def test_where_there_is_none_there_is_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "new").load_latest(pytest.fail) is None
    (tmp_path / "round-000001.safetensors.partial").write_bytes(b"half")
    assert Checkpoints(tmp_path).load_latest(pytest.fail) is None


def test_what_a_killed_process_has_half_written_is_gone_with_the_next_writing(tmp_path: Path) -> None:
    left = tmp_path / "round-000001.safetensors.partial" / ".tmpA1b2C3"  # as safetensors names its own
    left.parent.mkdir()
    left.write_bytes(b"half")
    Checkpoints(tmp_path).save(state(1))
    assert [path.name for path in tmp_path.iterdir()] == ["round-000001.safetensors"]


def test_nothing_half_written_lies_beside_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a process which is killed at any moment leaves nothing that is not removed by the next one."""
    seen: list[str] = []
    real = os.fsync

    def look(descriptor: int) -> None:
        seen.append(" ".join(sorted(path.name for path in tmp_path.iterdir())))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    save_tree(tmp_path / "a", {"w": np.ones(3)}, secret=True)
    assert seen == ["a.partial", "a"]
    assert (tmp_path / "a").stat().st_mode & 0o77 == 0


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_crash_before_the_rename_leaves_the_old_one(
    two_rounds: Checkpoints, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    whole = two_rounds.paths()[-1].read_bytes()

    def crash(*_: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr({"replace": Path, "fsync": os}[broken], broken, crash)
        with pytest.raises(CheckpointError, match=r"No space left on device.*choose another --out"):
            two_rounds.save(state(2))
    assert two_rounds.paths()[-1].read_bytes() == whole
    found = two_rounds.load_latest(pytest.fail)
    assert found is not None
    assert found.round == 2


def test_a_text_that_the_disk_refuses_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    write_text(path, "old")

    def full(self: Path, text: str, **_: Any) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match=r"config\.yaml must be writable, got: No space left on device\. Free"):
        write_text(path, "new")
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("config.yaml", "old")]


def test_only_the_newest_are_kept_where_asked(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for number in range(5):
        checkpoints.save(state(number))
    assert [path.name for path in checkpoints.paths()] == ["round-000003.safetensors", "round-000004.safetensors"]


def test_the_same_state_has_the_same_bytes(tmp_path: Path) -> None:
    one, two = (Checkpoints(tmp_path / name).save(state(3)).read_bytes() for name in ("one", "two"))
    assert one == two
