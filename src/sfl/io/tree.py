"""One checkpointable value in one file: arrays as safetensors, everything else as JSON in its header.

The file carries a digest of its own content, so a torn or edited one is detected. Writing is atomic: a temporary
file, fsync, rename, fsync of the folder. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save, save_file

from sfl.errors import CheckpointError
from sfl.types import Array, StateTree

FORMAT = "sfl-tree-1"


def save_tree(path: Path, tree: StateTree, *, secret: bool = False) -> None:
    """Write ``tree`` to ``path`` atomically.

    What is half-written lies in a folder of its own beside ``path``, safetensors' own temporary file too: the next
    writing of ``path`` removes what a process that was killed has left there.

    Args:
        path: The file; its folder is made if missing.
        tree: ``None``, bool, int, float, str, ndarray, or a dict (string keys) / list / tuple of those.
        secret: Whether this user alone may read the file.

    Raises:
        CheckpointError: If the tree holds something else, or the disk refuses.
    """
    tensors: dict[str, Array] = {}
    skeleton = json.dumps(_flatten(tree, tensors))
    # One entry: safetensors writes several in no fixed order, and equal trees should be equal files.
    header = json.dumps({"format": FORMAT, "tree": skeleton, "digest": _digest(skeleton, tensors)})
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o700)
        written = partial / path.name
        if secret:
            written.touch(mode=0o600)
        save_file(tensors, written, metadata={"sfl": header})
        sync(written)
        written.replace(path)
        partial.rmdir()
        sync(path.parent)


def load_tree(path: Path) -> StateTree:
    """Read a tree back, bit for bit.

    Raises:
        CheckpointError: If the file is missing, torn, edited, or of another format.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get("sfl", "{}"))
            # copied: the file may go while the arrays stay
            tensors = {name: np.array(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        written, skeleton, digest = (str(header.get(key)) for key in ("format", "tree", "digest"))
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} must be a whole checkpoint, got: {error}.") from error
    if written != FORMAT:
        raise CheckpointError(f"{path} must have format {FORMAT}, got {written!r}.")
    if digest != _digest(skeleton, tensors):
        raise CheckpointError(f"{path} must match its digest, got other content. The file is torn or was edited.")
    return _unflatten(json.loads(skeleton), tensors)


def pack_tree(tree: StateTree) -> tuple[bytes, bytes]:
    """The tree as two messages: JSON for its structure, safetensors for its arrays.

    Raises:
        CheckpointError: If it holds something else.
    """
    tensors: dict[str, Array] = {}
    skeleton = json.dumps(_flatten(tree, tensors))
    return skeleton.encode(), save(tensors)


def unpack_tree(skeleton: bytes, tensors: bytes) -> StateTree:
    """What ``pack_tree`` packed, bit for bit.

    Raises:
        CheckpointError: If either message is not whole.
    """
    try:
        return _unflatten(json.loads(skeleton), load(tensors))
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"a message must be a packed tree, got: {error}.") from error


@contextmanager
def writing(path: Path) -> Generator[None]:
    """What the disk refuses inside is said as one error that names ``path``.

    Raises:
        CheckpointError: If the disk is full or the file may not be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CheckpointError(
            f"{path} must be writable, got: {why}. Free some space or choose another --out."
        ) from error


def sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically and durably.

    Raises:
        CheckpointError: If the disk refuses; nothing half-written is left then.
    """
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(text, encoding="utf-8")
            sync(partial)
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        sync(path.parent)


def write_secret(path: Path, content: bytes) -> None:
    """Write a file that this user alone may read.

    Raises:
        CheckpointError: If the disk refuses.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.chmod(0o600)
        path.write_bytes(content)
        sync(path)


def _digest(skeleton: str, tensors: dict[str, Array]) -> str:
    digest = hashlib.sha256(skeleton.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name}|{value.dtype.str}|{value.shape}".encode())
        digest.update(value.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _flatten(tree: StateTree, tensors: dict[str, Array]) -> Any:
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    if isinstance(tree, np.ndarray):
        key = f"t{len(tensors):06d}"
        native = np.ascontiguousarray(tree, dtype=tree.dtype.newbyteorder("="))  # as the file will give it back
        tensors[key] = native.reshape(tree.shape)
        return {"$tensor": key}
    if isinstance(tree, dict):
        return {"$dict": [[_key(key), _flatten(value, tensors)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        kind = "$tuple" if isinstance(tree, tuple) else "$list"
        return {kind: [_flatten(value, tensors) for value in tree]}
    raise CheckpointError(
        f"a checkpointed state must be made of arrays, numbers, strings, dicts and lists, got {type(tree).__name__}."
    )


def _key(key: object) -> str:
    if not isinstance(key, str):
        raise CheckpointError(f"keys of a checkpointed state must be strings, got {key!r}.")
    return key


def _unflatten(node: Any, tensors: dict[str, Array]) -> StateTree:
    if not isinstance(node, dict):
        return node
    ((kind, value),) = node.items()
    if kind == "$tensor":
        return tensors[value]
    if kind == "$dict":
        return {key: _unflatten(child, tensors) for key, child in value}
    items = [_unflatten(child, tensors) for child in value]
    return tuple(items) if kind == "$tuple" else items
