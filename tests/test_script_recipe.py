"""Recipes of training scripts: the two forms, where models come from, when they are evaluated."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clients
import scripts
from scripts import EXAMPLES, LOOP, W, run, write
from sfl.client.script import Script, ScriptClient
from sfl.errors import CompositionError, ConfigError, ModelError
from sfl.recipe import FedAvgRecipe
from sfl.train.model_source import ModelSource
from sfl.types import FederationConfig

CLIENT: dict[str, Any] = {"client": clients.Base, "initial_parameters": W}
SCRIPT: dict[str, Any] = {"train_script": "train.py", "model": W}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either client and initial_parameters or train_script and model, got neither"),
        (CLIENT | SCRIPT, "either client and initial_parameters or train_script and model, got both"),
        ({"initial_parameters": W} | SCRIPT, "got both"),
        ({"client_kwargs": {"a": 1}} | SCRIPT, "got both"),
        (CLIENT | {"model": W}, "model, initial_ckpt and train_args must come with a train_script"),
        (CLIENT | {"train_args": "--x"}, "must come with a train_script"),
        (SCRIPT | {"model": None}, "model must be given for a train_script, or initial_ckpt"),
        (SCRIPT | {"model": 3}, "model must be a torch module, a class_path dict or a dict of arrays, got int"),
        (SCRIPT | {"model": {"class_path": "Net"}}, "model must be {'class_path'"),
        (SCRIPT | {"model": {"class_path": "a.B", "arg": {}}}, "model must be {'class_path'"),
        (SCRIPT | {"params_transfer_type": "HALF"}, "params_transfer_type must be one of"),
        (SCRIPT | {"server_expected_format": "keras"}, "server_expected_format must be one of"),
    ],
)
def test_a_recipe_has_exactly_one_form(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FedAvgRecipe(name="t", **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(("option", "value"), [("min_clients", 0), ("num_rounds", 0)])
def test_sizes_are_checked_when_the_job_is_built(option: str, value: int) -> None:
    with pytest.raises(CompositionError, match=f"{option} must be at least 1, got 0"):
        FedAvgRecipe(name="t", **CLIENT, **{option: value}).build()


@pytest.mark.parametrize(
    ("given", "federation", "expected"),
    [
        ({"min_clients": 3, "num_rounds": 7}, FederationConfig(), (3, 3, 7)),
        ({"min_clients": 1}, FederationConfig(), (1, 1, 3)),
        ({"min_clients": 2}, FederationConfig(num_clients=5), (5, 2, 3)),
        ({"min_clients": 4}, FederationConfig(num_clients=3), (4, 4, 3)),
        ({"num_rounds": 2}, FederationConfig(num_clients=5, min_available_clients=3), (5, 3, 2)),
    ],
)
@pytest.mark.parametrize("form", [CLIENT, SCRIPT])
def test_min_clients_and_num_rounds_are_the_federations(
    given: dict[str, int], federation: FederationConfig, expected: tuple[int, int, int], form: dict[str, Any]
) -> None:
    job = FedAvgRecipe(name="t", federation=federation, **given, **form).build()
    size = job.federation
    assert (size.num_clients, size.min_available_clients, size.num_rounds) == expected


def test_a_script_recipe_is_plain_data_and_stays_itself_when_it_is_replaced() -> None:
    import torch

    module = torch.nn.Linear(2, 1)
    subject = FedAvgRecipe(name="t", train_script="train.py", train_args="--lr '0.1 x'", model=module, min_clients=1)
    assert isinstance(subject.model, ModelSource)
    again = dataclasses.replace(subject, num_rounds=4)
    plain = again.resolved()
    script = plain.client_kwargs["script"]
    assert json.loads(json.dumps(script)) == script
    assert script["args"] == ["--lr", "0.1 x"]
    assert (script["rounds"], script["params_format"], script["external"]) == (4, "pytorch", False)
    assert plain.client is ScriptClient
    assert plain.resolved() == plain
    assert isinstance(plain.initial_parameters, dict)
    assert {type(value) for value in plain.initial_parameters.values()} == {np.ndarray}
    for recipe in (subject, plain):
        values = [getattr(recipe, field.name) for field in dataclasses.fields(recipe)]
        assert not any(isinstance(value, torch.nn.Module) for value in values)
    with torch.no_grad():
        module.weight += 1  # the recipe has its own
    assert (plain.initial_parameters["weight"] != module.weight.detach().numpy()).all()


def test_arrays_mean_arrays_and_modules_mean_tensors_unless_the_recipe_says_so(tmp_path: Path) -> None:
    script = write(tmp_path, LOOP)
    import torch

    formats = [
        scripts.recipe(script, **options).resolved().client_kwargs["script"]["params_format"]
        for options in (
            {},
            {"model": torch.nn.Linear(1, 1)},
            {"model": {"class_path": "torch.nn.Linear", "args": {"in_features": 1, "out_features": 1}}},
            {"server_expected_format": "pytorch"},
            {"model": torch.nn.Linear(1, 1), "server_expected_format": "numpy"},
        )
    ]
    assert formats == ["numpy", "pytorch", "pytorch", "pytorch", "numpy"]


def test_a_class_path_is_made_when_the_run_begins_with_the_runs_seed() -> None:
    import torch

    spec = {"class_path": "torch.nn.Linear", "args": {"in_features": 2, "out_features": 1}}
    state = torch.get_rng_state()
    made = [ModelSource.of(spec, None, seed)() for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert made[0]["weight"].tolist() == made[1]["weight"].tolist() != made[2]["weight"].tolist()
    for wrong in ("torch.nn.Linear", "no_such.Module", "torch.nn.NoSuch", "collections.OrderedDict"):
        with pytest.raises(ModelError):
            ModelSource.of({"class_path": wrong}, None, 0)()


def test_half_precision_models_begin_exactly() -> None:
    import torch

    for kind in (torch.bfloat16, torch.float16):
        module = torch.nn.Linear(3, 2).to(kind)
        arrays = ModelSource.of(module, None, 0)()
        assert arrays["weight"].dtype == np.float32
        assert arrays["weight"].tolist() == module.weight.float().tolist()


def test_a_checkpoint_is_read_without_running_anything_of_it(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    module = torch.nn.Linear(2, 1)
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    torch.save(module.state_dict(), tmp_path / "model.pt")
    torch.save({"state_dict": module.state_dict(), "epoch": 3}, tmp_path / "trainer.pt")
    for name in ("model.safetensors", "model.pt", "trainer.pt"):
        for model in (
            None,
            torch.nn.Linear(2, 1),
            {"class_path": "torch.nn.Linear", "args": {"in_features": 2, "out_features": 1}},
        ):
            arrays = ModelSource.of(model, tmp_path / name, 0)()
            assert arrays["weight"].tolist() == module.weight.tolist()
    with pytest.raises(ModelError, match="must hold the model's parameters, got others in"):
        ModelSource.of(torch.nn.Linear(3, 1), tmp_path / "model.pt", 0)()


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    import torch

    torch.save({"w": Path}, tmp_path / "code.pt")
    torch.save({"w": 3}, tmp_path / "number.pt")
    (tmp_path / "torn.safetensors").write_bytes(b"no")
    (tmp_path / "torn.pt").write_bytes(b"no")
    for name in ("code.pt", "number.pt", "torn.safetensors", "torn.pt", "missing.pt", "missing.safetensors"):
        with pytest.raises(ModelError, match=name):
            ModelSource.of(None, tmp_path / name, 0)()


def test_a_scripts_job_is_evaluated_once_at_the_end(tmp_path: Path) -> None:
    script = write(tmp_path, LOOP)
    assert [r.evaluation for r in run(script, rounds=3).rounds] == [{}, {}, {}, {"loss": 0.5}]
    assert [bool(r.evaluation) for r in run(script, evaluate_every=1).rounds] == [True] * 3
    assert [bool(r.evaluation) for r in run(script, evaluate_every=0).rounds] == [False] * 3


def test_clients_may_be_evaluated_once_at_the_end_too() -> None:
    rounds = FedAvgRecipe(name="t", **CLIENT, num_rounds=2, evaluate_every="end").execute().rounds
    assert [bool(r.evaluation) for r in rounds] == [False, False, True]
    assert FedAvgRecipe(name="t", **CLIENT).build().evaluate_every == 1


def test_a_script_that_is_not_there_fails_its_sites(tmp_path: Path) -> None:
    reply = scripts.fit(scripts.site(str(tmp_path / "none.py")))
    assert "the training script must be a file" in reply.reason
    for wrong in ({}, {"path": "x", "pth": 1}, {"path": __file__, "params_format": "keras"}):
        with pytest.raises(ConfigError, match="must"):
            Script.of(wrong)


def test_the_numpy_example_finds_the_weights() -> None:
    result = run(str(EXAMPLES / "train_numpy.py"), model={"w": np.zeros(3)}, rounds=5, train_args="--steps 10")
    assert scripts.said(result) == []
    assert np.abs(result.parameters["w"] - [1.0, -2.0, 0.5]).max() < 0.05
    assert result.rounds[-1].evaluation["loss"] < 0.01
