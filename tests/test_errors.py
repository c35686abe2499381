"""The tree in the docstring is the tree of the classes, and errors survive the way out of a worker."""

import inspect
import pickle

import pytest

from sfl import errors
from sfl.errors import MissingExtraError, SflError, nearest

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, SflError)]


def drawn_tree() -> dict[str, tuple[str, str]]:
    """Name -> (parent, builtin base in parentheses) as the docstring draws them, by indentation."""
    tree: dict[str, tuple[str, str]] = {}
    path: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        text = line.lstrip(" │├└─")
        name, _, rest = text.partition(" ")
        if name not in vars(errors):
            continue
        depth = len(line) - len(text)
        path = [(d, n) for d, n in path if d < depth]
        tree[name] = (path[-1][1] if path else "", rest[1 : rest.index(")")] if rest.startswith("(") else "")
        path.append((depth, name))
    return tree


def test_the_docstring_draws_every_class_and_no_other() -> None:
    tree = drawn_tree()
    assert set(tree) == {c.__name__ for c in CLASSES}
    assert len(tree) >= 11


@pytest.mark.parametrize("error", CLASSES, ids=lambda c: c.__name__)
def test_each_class_sits_where_it_is_drawn(error: type[SflError]) -> None:
    parent, builtin = drawn_tree()[error.__name__]
    bases = [base.__name__ for base in error.__bases__]
    expected = ["Exception"] if error is SflError else [parent, builtin] if builtin else [parent]
    assert bases == expected
    assert error.__doc__


@pytest.mark.parametrize("error", CLASSES, ids=lambda c: c.__name__)
def test_each_survives_pickling(error: type[SflError]) -> None:
    made = MissingExtraError("torch", "esm2") if error is MissingExtraError else error("must be 1, got 2.")
    again = pickle.loads(pickle.dumps(made))
    assert type(again) is error
    assert str(again) == str(made)


def test_a_missing_extra_names_its_command() -> None:
    with pytest.raises(ImportError, match=r"torch must be installed .* pip install 'sfl\[esm2\]'"):
        raise MissingExtraError("torch", "esm2")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("num_round", "Did you mean 'num_rounds'?"),
        ("sed", "Did you mean 'seed'?"),
        ("xyz", "Known: num_rounds, seed."),
    ],
)
def test_nearest(name: str, remedy: str) -> None:
    assert nearest(name, iter(["seed", "num_rounds"])) == remedy
