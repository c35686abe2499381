"""Configuration: who wins, where a value comes from, and what is said of a wrong one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfl.errors import ConfigError
from sfl.esm2.config import ESM2ClientConfig, ESM2RunConfig
from sfl.llm.config import LLMRunConfig
from sfl.types import FederationConfig, LoggingConfig
from sfl.utils import config as public
from sfl.utils.config import EXCLUSIVE, dump_yaml, load_config, options_of, resolve, to_dict

ROOT = Path(__file__).parents[1]
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    folder = tmp_path_factory.mktemp("config")

    def write(text: str, name: str = "run.yaml") -> Path:
        (folder / name).write_text(text, encoding="utf-8")
        return folder / name

    return write


def esm2(**kwargs: Any) -> public.Resolved[ESM2RunConfig]:
    return resolve(ESM2RunConfig, **{"environ": {}, **kwargs})


# ---------------------------------------------------------------------------------------------------- who wins


@given(layers=st.sets(st.sampled_from(["default.yaml", "esm2.yaml", "environment", "flag"])))
def test_the_highest_layer_that_gives_a_value_wins(layers: set[str], write: Write) -> None:
    files = [
        write(f"federation:\n  seed: {seed}\n", name) for name, seed in {"default.yaml": 1, "esm2.yaml": 2}.items()
    ]
    resolved = esm2(
        yaml_files=[file for file in files if file.name in layers],
        environ={"SFL_SEED": "3"} if "environment" in layers else {},
        overrides={"seed": "4"} if "flag" in layers else {},
    )
    ranked = [
        ("flag", 4, "--seed"),
        ("environment", 3, "environment SFL_SEED"),
        ("esm2.yaml", 2, f"{files[1]}:2"),
        ("default.yaml", 1, f"{files[0]}:2"),
    ]
    expected = next(((value, source) for name, value, source in ranked if name in layers), (0, "default"))
    assert (resolved.config.federation.seed, resolved.sources["federation.seed"]) == expected


def test_no_layer_gives_the_defaults() -> None:
    resolved = esm2()
    assert resolved.config == ESM2RunConfig()
    assert set(resolved.sources.values()) == {"default"}
    sections = [getattr(resolved.config, section.name) for section in fields(resolved.config)]
    assert len(resolved.sources) == sum(len(fields(section)) for section in sections)


def test_the_environment_of_the_process_is_read_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFL_NUM_ROUNDS", "9")
    assert resolve(ESM2RunConfig).config.federation.num_rounds == 9
    assert resolve(ESM2RunConfig, environ={}).config.federation.num_rounds == 3


def test_layers_are_joined_before_they_are_checked(write: Write) -> None:
    file = write("federation: {num_clients: 4}")
    assert esm2(yaml_files=[file], overrides={"min_available_clients": 3}).config.federation.min_available_clients == 3


def test_rows_pair_values_with_sources() -> None:
    rows = {path: (value, source) for path, value, source in esm2(overrides={"num_rounds": 5}).rows()}
    assert rows["federation.num_rounds"] == (5, "--num-rounds")
    assert rows["client.local_steps"] == (20, "default")


# ------------------------------------------------------------------------------------------- local work is one of two


@given(epochs=st.integers(0, 3), steps=st.integers(0, 3))
def test_the_higher_layer_decides_between_epochs_and_steps(epochs: int, steps: int, write: Write) -> None:
    layers: dict[int, list[tuple[str, int]]] = {1: [], 2: [], 3: []}
    for name, height in (("local_epochs", epochs), ("local_steps", steps)):
        if height:
            layers[height].append((name, 10 + height))
    arguments = {
        "yaml_files": [write("client:\n" + "".join(f"  {name}: {value}\n" for name, value in layers[1]))],
        "environ": {f"SFL_{name.upper()}": str(value) for name, value in layers[2]},
        "overrides": dict(layers[3]),
    }
    if epochs == steps != 0:
        with pytest.raises(ConfigError, match=r"must not be set together, got local_epochs=.*Remove one"):
            esm2(**arguments)
        return
    resolved = esm2(**arguments)
    client = resolved.config.client
    if epochs > steps:
        assert (client.local_epochs, client.local_steps) == (10 + epochs, None)
        assert resolved.sources["client.local_steps"].startswith("unset by ")
    else:
        assert (client.local_epochs, client.local_steps) == (None, 10 + steps if steps else 20)


@pytest.mark.parametrize("none", ["none", "null", "", "None"])
def test_an_option_that_is_set_to_none_takes_nothing_from_the_other(none: str) -> None:
    client = esm2(overrides={"local_epochs": none}).config.client
    assert (client.local_epochs, client.local_steps) == (None, 20)


def test_exclusive_options_exist() -> None:
    assert all(name in options_of(ESM2RunConfig) for names in EXCLUSIVE for name in names)


# ------------------------------------------------------------------------------------------------------ round trip

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
COUNTS = st.integers(1, 10**6)
WORK = st.sampled_from([(None, None), (1, None), (None, 7)])


@st.composite
def run_configs(draw: st.DrawFn) -> ESM2RunConfig:
    epochs, steps = draw(WORK)
    clients = draw(COUNTS)
    federation = FederationConfig(
        num_clients=clients,
        min_available_clients=draw(st.integers(1, clients)),
        fraction_fit=draw(st.floats(0, 1, exclude_min=True)),
        partition=draw(TEXT),
        seed=draw(st.integers(0, 2**63 - 1)),
    )
    client = ESM2ClientConfig(
        learning_rate=draw(st.floats(0, exclude_min=True, allow_infinity=False)),
        local_epochs=epochs,
        local_steps=steps,
        model=draw(st.none() | TEXT),
        data=draw(TEXT),
    )
    logging = LoggingConfig(verbose=draw(st.booleans()), out=draw(st.none() | TEXT))
    return ESM2RunConfig(federation=federation, client=client, logging=logging)


@given(config=run_configs())
def test_yaml_reads_back_what_was_dumped(config: ESM2RunConfig, write: Write) -> None:
    assert load_config(ESM2RunConfig, write(dump_yaml(config))) == config


@pytest.mark.parametrize("break_", ["\x85", "a\u2028b", "ä\u2029"])
def test_yaml_keeps_what_unicode_calls_a_line_break(break_: str, write: Write) -> None:
    config = ESM2RunConfig(client=ESM2ClientConfig(data=break_))
    assert load_config(ESM2RunConfig, write(dump_yaml(config))) == config


def test_to_dict_has_sections() -> None:
    assert to_dict(ESM2RunConfig())["client"]["learning_rate"] == 5e-4


SHIPPED = {"esm2": ESM2RunConfig, "llm": LLMRunConfig}


@pytest.mark.parametrize("job", SHIPPED)
def test_the_files_that_are_shipped_say_the_defaults(job: str) -> None:
    for names in (["default.yaml"], [f"{job}.yaml"], ["default.yaml", f"{job}.yaml"]):
        files = [ROOT / "config" / name for name in names]
        assert resolve(SHIPPED[job], yaml_files=files, environ={}, overrides={}).config == SHIPPED[job]()


@pytest.mark.parametrize("job", SHIPPED)
def test_the_files_that_are_shipped_name_every_option(job: str) -> None:
    text = "".join((ROOT / "config" / name).read_text(encoding="utf-8") for name in ("default.yaml", f"{job}.yaml"))
    assert not [name for name in options_of(SHIPPED[job]) if f"{name}: " not in text]


# --------------------------------------------------------------------------------------------------- what is refused

BAD_YAML = {
    "a list": ("- 1\n- 2\n", r"A config must be a mapping, got a list \(.*run.yaml\)"),
    "a scalar": ("hello\n", "must be a mapping, got 'hello'"),
    "broken syntax": ("federation:\n  seed: [1\n", r"must be valid YAML, got .*run.yaml:3"),
    "a tab": ("federation:\n\tseed: 1\n", r"must be valid YAML, got .*run.yaml:2"),
    "a control character": ("federation: \x01\n", "must be valid YAML, got .*special characters"),
    "two documents": ("federation:\n---\nclient:\n", "must be valid YAML"),
    "an object tag": ("federation: !!python/object:os.system {}\n", "could not determine a constructor"),
    "a nested object tag": ("client: {data: !!python/name:os.system ''}\n", r"must be plain YAML.*run.yaml:1"),
    "an impossible date": ("logging: {out: 2024-99-99}\n", r"must be plain YAML, got month.*run.yaml:1"),
    "a key twice": ("federation:\n  seed: 1\n  seed: 2\n", r"given once, got 'seed' again \(.*run.yaml:3\)"),
    "a section twice": ("client:\nclient:\n", r"given once, got 'client' again \(.*run.yaml:2\)"),
    "a numeric key": ("1: 2\n", r"A key must be a name, got 1 \(.*run.yaml:1\)"),
    "a list key": ("client:\n  [1]: 2\n", r"A key must be a name, got \[1\] \(.*run.yaml:2\)"),
    "a mistyped section": ("federations:\n  seed: 1\n", r"got 'federations' \(.*:1\)\. Did you mean 'federation'"),
    "a mistyped key": ("client:\n  bach_size: 1\n", r"got 'bach_size' \(.*:2\)\. Did you mean 'batch_size'"),
    "an unknown key": ("logging:\n  zzz: 1\n", r"got 'zzz' \(.*:2\)\. Known: format, out, verbose\."),
    "a key of another section": ("client:\n  seed: 1\n", r"got 'seed' \(.*:2\)\. Move it to federation\.seed"),
    "a key at the top": ("seed: 1\n", r"got 'seed' \(.*:1\)\. Move it under federation:"),
    "a section that is a list": ("client: [1]\n", r"Section 'client' must be a mapping, got a list \(.*:1\)"),
    "a section that is a number": ("client: 3\n", r"Section 'client' must be a mapping, got 3 \(.*:1\)"),
    "text for a whole number": ("federation:\n  seed: x\n", r"seed must be a whole number, got 'x' \(.*:2\)"),
    "a fraction for a whole number": ("federation: {seed: 1.5}\n", "seed must be a whole number, got 1.5"),
    "a bool for a whole number": ("federation: {seed: true}\n", "seed must be a whole number, got True"),
    "a bool for a number": ("federation: {fraction_fit: true}\n", "fraction_fit must be a number, got True"),
    "none for a whole number": ("federation: {seed: null}\n", "seed must be a whole number, got None"),
    "a list for an option": ("client: {local_steps: [1]}\n", r"local_steps must be a whole number or none, got \[1\]"),
    "a number for text": ("client: {data: 12}\n", r"data must be text, got 12 \(.*:1\)\. Put it in quotes"),
    "a number for a bool": ("logging: {verbose: 1}\n", "verbose must be true or false, got 1"),
    "a wrong choice": ("logging: {format: xml}\n", "format must be rich or simple or json, got 'xml'"),
    "a value out of range": ("federation:\n  num_rounds: 0\n", r"at least 1, got 0\. \(num_rounds: .*:2\)"),
    "not a number": ("federation: {fraction_fit: .nan}\n", r"fraction_fit must be in \(0, 1\], got nan"),
    "an application's range": ("client: {max_length: 7}\n", r"max_length must be between 8 and 1022 .*got 7.*:1"),
    "brackets without end": ("client: " + "[" * 3000, "must be valid YAML, got maximum recursion"),
    "more threads than any machine": ("federation: {threads: 1000000}\n", "threads must be between 1 and 1024"),
    "a timeout past the clock": ("federation: {round_timeout: .inf}\n", "round_timeout must be 0 .* got inf"),
    "a negative count": ("client: {eval_proteins: -1}\n", "eval_proteins must be 0"),
}


@pytest.mark.parametrize("case", BAD_YAML)
def test_bad_yaml(case: str, write: Write) -> None:
    text, message = BAD_YAML[case]
    with pytest.raises(ConfigError, match=message):
        load_config(ESM2RunConfig, write(text))


@pytest.mark.parametrize("text", ["", "# nothing\n", "client:\n", "federation: {}\nclient:\nlogging: null\n"])
def test_empty_yaml_says_nothing(text: str, write: Write) -> None:
    assert load_config(ESM2RunConfig, write(text)) == ESM2RunConfig()


def test_numbers_as_yaml_spells_them(write: Write) -> None:
    config = load_config(ESM2RunConfig, write("client: {learning_rate: 5e-4}\nfederation: {round_timeout: 3}\n"))
    assert config.client.learning_rate == 5e-4
    assert math.isclose(config.federation.round_timeout, 3.0)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"readable YAML file, got '.*none.yaml' \(No such file"):
        load_config(ESM2RunConfig, tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(ESM2RunConfig, tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"client: {data: \xff}")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(ESM2RunConfig, tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"SFL_NUM_ROUND": "1"}, r"got 'SFL_NUM_ROUND'\. Did you mean 'SFL_NUM_ROUNDS'\?"),
        ({"SFL_XQJWVZYKHU": "1"}, r"got 'SFL_XQJWVZYKHU'\. Known: SFL_AGGREGATION"),
        ({"SFL_NUM_ROUNDS": "many"}, r"a whole number, got 'many' \(environment SFL_NUM_ROUNDS\)"),
        ({"SFL_NUM_ROUNDS": ""}, "a whole number, got ''"),
        ({"SFL_VERBOSE": "maybe"}, "verbose must be true or false, got 'maybe'"),
        ({"SFL_NUM_ROUNDS": "0"}, r"at least 1, got 0\. \(num_rounds: environment SFL_NUM_ROUNDS\)"),
    ],
)
def test_bad_environment(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        esm2(environ=environ)


def test_good_environment() -> None:
    environ = {"SFL_VERBOSE": "Yes", "SFL_FORMAT": "json", "SFL_OUT": "", "SFL_MODEL": "facebook/x", "PATH": "/bin"}
    config = esm2(environ=environ | {"SFL_CACHE": "x"}, allowed_environ=["SFL_CACHE"]).config
    assert config.logging == LoggingConfig(verbose=True, format="json")
    assert config.client.model == "facebook/x"
    assert esm2(environ={"SFL_VERBOSE": "off"}).config.logging.verbose is False


def test_bad_override() -> None:
    with pytest.raises(ConfigError, match=r"got 'num_round'\. Did you mean 'num_rounds'"):
        esm2(overrides={"num_round": 1})


# -------------------------------------------------------------------------------------------- a user's own run config


@dataclass(frozen=True, kw_only=True)
class Own:
    """A user's section.

    Attributes:
        depth: How deep,
            and on a second line.
        rate: How fast.
    """

    depth: int | float
    rate: Literal[1, 2] = 1
    folder: Path | None = None
    hidden: list[int] = field(default_factory=list[int], init=False)


@dataclass(frozen=True, kw_only=True)
class OwnRun:
    name: str
    own: Own = field(default_factory=lambda: Own(depth=2))
    federation: FederationConfig = field(default_factory=lambda: FederationConfig(num_rounds=50))

    def __post_init__(self) -> None:
        if self.name == self.own.folder:
            raise ValueError("name must differ from folder")


@dataclass(frozen=True, kw_only=True)
class NoDefault:
    own: Own


@dataclass(frozen=True, kw_only=True)
class Twice:
    federation: FederationConfig = field(default_factory=FederationConfig)
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Unsupported:
    names: list[str] = field(default_factory=list[str])


def test_any_dataclass_of_sections_works(write: Write) -> None:
    file = write("name: mine\nown: {depth: 1.5, folder: a/b, rate: 2}\n")
    resolved = resolve(OwnRun, yaml_files=[file], environ={"SFL_NAME": "yours"})
    assert resolved.config == OwnRun(name="yours", own=Own(depth=1.5, folder=Path("a/b"), rate=2))
    assert resolved.config.federation.num_rounds == 50
    assert resolved.sources["name"] == "environment SFL_NAME"
    assert load_config(OwnRun, write(dump_yaml(resolved.config))) == resolved.config
    assert options_of(OwnRun)["depth"].help == "How deep, and on a second line."
    assert options_of(OwnRun)["folder"].help == ""


def test_paths_may_be_paths() -> None:
    assert resolve(OwnRun, environ={}, overrides={"name": "n", "folder": Path("x")}).config.own.folder == Path("x")


def test_what_has_no_default_must_be_given() -> None:
    with pytest.raises(ConfigError, match=r"name must be given, got nothing\. Set --name, SFL_NAME or name"):
        resolve(OwnRun, environ={})
    with pytest.raises(ConfigError, match=r"depth must be given, got nothing. Set --depth, SFL_DEPTH or own\.depth"):
        resolve(NoDefault, environ={})
    assert resolve(NoDefault, environ={}, overrides={"depth": 1}).config == NoDefault(own=Own(depth=1))


def test_declarations_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match=r"unique across sections, got 'seed' in federation\.seed and seed"):
        options_of(Twice)
    with pytest.raises(ConfigError, match=r"Unsupported.names must be declared as bool, .*got list\[str\]"):
        options_of(Unsupported)
    with pytest.raises(ConfigError, match="must be a dataclass"):
        options_of(int)


def test_every_option_has_help() -> None:
    assert not [option.path for option in options_of(ESM2RunConfig).values() if not option.help]


def test_public_names() -> None:
    assert all(hasattr(public, name) for name in public.__all__)
