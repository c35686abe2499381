"""Every public name resolves, every module imports, and importing SFL is cheap."""

import importlib
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest

import sfl
from sfl.errors import MissingExtraError

MODULES = ["sfl", *(m.name for m in pkgutil.walk_packages(sfl.__path__, "sfl.") if not m.name.endswith("__main__"))]
HEAVY = ("torch", "transformers", "tokenizers", "datasets", "pandas", "flwr", "ray", "nvflare", "sklearn", "plotly")


def load(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except MissingExtraError as error:
        pytest.skip(str(error))


def test_the_walk_finds_the_modules() -> None:
    assert {"sfl.core.arrays", "sfl.engine.base", "sfl.types"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports_and_says_what_it_is(name: str) -> None:
    assert load(name).__doc__, f"{name} has no docstring"


@pytest.mark.parametrize("name", MODULES)
def test_every_exported_name_resolves(name: str) -> None:
    module = load(name)
    exported = getattr(module, "__all__", [])
    assert list(exported) == sorted(set(exported)), f"{name}.__all__ must be sorted and without repetition"
    for public in exported:
        assert getattr(module, public) is not None


def test_the_package_lists_its_names() -> None:
    assert dir(sfl) == sorted(sfl.__all__)
    with pytest.raises(AttributeError, match="no attribute 'NoSuchName'"):
        sfl.NoSuchName  # noqa: B018  # pyright: ignore


def heavy_after(code: str) -> set[str]:
    """Heavy modules in a fresh interpreter after ``code``."""
    say = f"{code}\nimport sys\nprint(*sorted(set(sys.modules) & set({HEAVY!r})))"
    ran = subprocess.run([sys.executable, "-c", say], capture_output=True, text=True, check=True)
    return set(ran.stdout.split("\n")[-2].split())


@pytest.mark.parametrize(
    "code", ["import sfl", "import sfl\nsfl.FederationConfig, sfl.ClientConfig, sfl.LoggingConfig, dir(sfl)"]
)
def test_importing_sfl_is_cheap(code: str) -> None:
    assert heavy_after(code) == set()


def test_the_measurement_sees_a_heavy_import() -> None:
    assert "sklearn" in heavy_after("import sklearn")
