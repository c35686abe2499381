"""Whole runs of the application ``llm``: what travels, what comes out, and every combination with what SFL protects."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_models import save_tiny
from sfl.cli import main
from sfl.cli.applications import APPLICATIONS, resolve_job
from sfl.core.events import RoundFinished
from sfl.core.terms import LocalTerms
from sfl.env import SimEnv
from sfl.errors import CompositionError, ConfigError, ModelError
from sfl.io.checkpoint import Checkpoints
from sfl.io.metrics import read_rounds
from sfl.io.run_folder import RunFolder
from sfl.llm.client import LLMClient
from sfl.llm.config import LLMClientConfig, LLMRunConfig
from sfl.llm.model import find_model
from sfl.llm.server import llm_recipe
from sfl.llm.tokens import TokenBatch
from sfl.privacy.config import PrivacyConfig
from sfl.privacy.he.contexts import CLIENT_CONTEXT
from sfl.server.config import AlgorithmConfig
from sfl.server.robust.config import AggregationConfig
from sfl.server.session import RunResult
from sfl.train.module import copy_parameters, lend_parameters, release_resident
from sfl.train.private import PrivateTraining
from sfl.types import FederationConfig


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llm") / "gpt2")


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four writers, each fond of some words."""
    draw = np.random.default_rng(0)
    words = ["the", "king", "my", "lord", "is", "dead", "long", "live", "queen", "night", "and", "day", "love", "war"]
    path = tmp_path_factory.mktemp("data") / "letters.jsonl"
    rows = [
        {"author": f"writer-{who}", "text": " ".join(draw.choice(words[2 * who : 2 * who + 6], size=12))}
        for who in range(4)
        for _ in range(30)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def federated(
    tiny: Path,
    letters: Path,
    client: dict[str, Any] | None = None,
    *,
    federation: dict[str, Any] | None = None,
    **sections: Any,
) -> RunResult:
    options = LLMClientConfig(
        **{
            "data": str(letters), "block_size": 32, "batch_size": 4, "local_steps": 2, "eval_documents": 4,
            "learning_rate": 0.01, **(client or {}),
        }
    )  # fmt: skip
    config = LLMRunConfig(
        client=options, federation=FederationConfig(**{"num_rounds": 1, **(federation or {})}), **sections
    )
    return llm_recipe(config, find_model(str(tiny))).execute(SimEnv(device="cpu"))


PEFT = ("lora", "prompt", "p-tuning", "none")
COMBINED: dict[str, dict[str, Any]] = {
    "plain": {},
    "dp": {"privacy": PrivacyConfig(dp=True, dp_clip=1.0, dp_noise=0.5)},
    "dp-client": {"privacy": PrivacyConfig(dp=True, dp_mode="client")},
    "dp-local": {"privacy": PrivacyConfig(dp=True, dp_mode="local")},
    "dp-adaptive": {"privacy": PrivacyConfig(dp=True, dp_adaptive_clip=True)},
    "dp-per-layer": {"privacy": PrivacyConfig(dp=True, per_layer_clip=True)},
    "dpsgd": {"privacy": PrivacyConfig(dpsgd=True)},
    "dpsgd-ghost": {"privacy": PrivacyConfig(dpsgd=True, dpsgd_ghost=True)},
    "dpsgd-autoclip": {"privacy": PrivacyConfig(dpsgd=True, dpsgd_autoclip=True)},
    "dpsgd-and-dp": {"privacy": PrivacyConfig(dpsgd=True, dp=True)},
    "percentile": {"privacy": PrivacyConfig(percentile_privacy=50.0)},
    "svt": {"privacy": PrivacyConfig(svt_privacy=True)},
    "top-k": {"privacy": PrivacyConfig(compress=0.1, compress_topk=True, compress_error_feedback=True)},
    "random-k": {"privacy": PrivacyConfig(compress=0.1, compress_random=True)},
    "exclude": {"privacy": PrivacyConfig(exclude_layers="0")},
    "freeze": {"privacy": PrivacyConfig(freeze_layers="0")},
    **{
        name: {"algorithm": AlgorithmConfig(algorithm=name)}
        for name in ("fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "scaffold", "ditto", "cyclic", "swarm")
    },
    "fedbuff": {"algorithm": AlgorithmConfig(algorithm="fedbuff", buffer_size=4)},
    **{
        name: {"aggregation": AggregationConfig(aggregation=name)}
        for name in ("median", "geometric-median", "centered-clipping", "fltrust")
    },
    "trimmed-mean": {"aggregation": AggregationConfig(aggregation="trimmed-mean", trim_ratio=0.25)},
    "int8": {},
    "nf4": {},
    "turns": {},
    "multi-krum": {"aggregation": AggregationConfig(aggregation="multi-krum", krum_byzantine=0)},
}
"""What else SFL can do, by name; nothing here knows of language models."""

MESSAGES: dict[str, dict[str, Any]] = {
    "int8": {"message_dtype": "int8"},
    "nf4": {"message_dtype": "nf4"},
    "turns": {"sampling": "turns", "fraction_fit": 0.5},
}


@pytest.mark.parametrize("peft", [pytest.param(p, marks=() if p == "lora" else pytest.mark.slow) for p in PEFT])
@pytest.mark.parametrize("name", COMBINED)
def test_every_protection_rule_and_algorithm_trains_every_kind_of_adapter(
    name: str, peft: str, tiny: Path, letters: Path
) -> None:
    sites = {"num_clients": 4, "partition": "key:author", "min_available_clients": 2, **MESSAGES.get(name, {})}
    if peft == "prompt" and name in ("exclude", "freeze"):
        with pytest.raises(ConfigError, match="some layer must leave a site"):  # it has one array
            federated(tiny, letters, {"peft": peft}, federation=sites, **COMBINED[name])
        return
    result = federated(tiny, letters, {"peft": peft}, federation=sites, **COMBINED[name])
    assert result.rounds[-1].round == 1
    assert all(np.isfinite(value).all() for value in result.parameters.values())
    used = [site.status.value for site in result.rounds[-1].sites if site.stage != "evaluate"]
    assert used
    assert set(used) == {"used"}
    wanted = {"lora": "lora_", "prompt": "prompt_encoder", "p-tuning": "prompt_encoder", "none": ""}[peft]
    assert all(wanted in each for each in result.parameters)


@pytest.mark.parametrize("aggregation", ["mean", "exact", "freeze-a"])
def test_adapters_learn_by_every_way_of_aggregating_them(aggregation: str, tiny: Path, letters: Path) -> None:
    options = {"lora_aggregation": aggregation, "local_steps": 10, "learning_rate": 0.1}
    result = federated(tiny, letters, options, federation={"num_rounds": 2})
    before, after = result.rounds[0].evaluation["loss"], result.rounds[-1].evaluation["loss"]
    assert after < before - 0.05
    if aggregation == "freeze-a":
        first = llm_first(tiny, letters, options)
        for name, value in result.parameters.items():
            moved = bool((value != first[name]).any())
            assert moved is ("lora_B" in name)


def llm_first(tiny: Path, letters: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What a run begins with."""
    client = LLMClientConfig(data=str(letters), block_size=32, **options)
    initial = llm_recipe(LLMRunConfig(client=client), find_model(str(tiny))).initial_parameters
    assert callable(initial)
    return dict(initial())


def test_a_site_of_a_lower_rank_trains_no_more_than_that(tiny: Path, letters: Path) -> None:
    seen: list[RoundFinished] = []
    options = {"lora_r": 4, "lora_ranks": "4,1", "lora_aggregation": "exact"}
    result = federated(tiny, letters, options)
    assert "lora_truncation" in result.rounds[-1].fit
    both = federated(tiny, letters, {"lora_r": 4, "lora_ranks": "1,1", "lora_aggregation": "exact"})
    changed = [np.abs(v).sum(axis=0) > 0 for n, v in both.parameters.items() if "lora_B" in n]
    assert changed
    assert all(int(each.sum()) <= 2 for each in changed)  # two sites of rank one
    assert not seen


def test_no_algorithm_pulls_a_site_past_its_rank(tiny: Path, letters: Path) -> None:
    options = LLMClientConfig(data=str(letters), block_size=32, local_steps=2, lora_r=4, lora_ranks="1,4")
    client = LLMClient(config=LLMRunConfig(client=options), model=find_model(str(tiny)))
    module = client.workload.module("cpu")
    sent = {name: np.ones_like(value) for name, value in copy_parameters(module).items()}
    client.terms = LocalTerms(proximal_mu=0.5, anchor=sent, drift=sent)
    trained = client.compute_update(sent, {"round": 1})[0]
    for name, value in lend_parameters(module).items():
        own, beyond = (value[:1], value[1:]) if "lora_A" in name else (value[:, :1], value[:, 1:])
        assert own.any()
        assert not beyond.any()
        assert np.count_nonzero(trained[name] == 1.0) == beyond.size
    release_resident()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("client", "privacy"), [(["--lora-ranks", "8,4"], ["--dp"]), (["--lora-aggregation", "freeze-a"], ["--dpsgd"])]
)
def test_a_run_of_adapters_is_audited_as_it_was(
    client: list[str], privacy: list[str], tiny: Path, letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    options = ["--model", str(tiny), "--data", str(letters), "--block-size", "32", "--local-steps", "1"]
    options += ["--num-rounds", "1", "--workers", "1"]
    assert main(["run", "llm", *options, *client, *privacy, "--out", str(run)]) == 0
    trained: list[list[str]] = []
    check = PrivateTraining[TokenBatch].example_norms

    def looked(self: Any, module: Any, examples: Any) -> Any:
        trained.append([name for name, parameter in module.named_parameters() if parameter.requires_grad])
        return check(self, module, examples)

    monkeypatch.setattr(PrivateTraining, "example_norms", looked)
    assert main(["audit", str(run), "--canaries", "20"]) == 0
    assert all("lora_B" in name for names in trained for name in names)
    assert bool(trained) == (privacy == ["--dpsgd"])


@pytest.mark.slow
def test_an_encrypted_model_is_written_where_a_key_is(
    tiny: Path, letters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, key = tmp_path / "run", tmp_path / "run" / "sites" / "simulated_4096.tenseal"
    options = ["--model", str(tiny), "--data", str(letters), "--block-size", "32", "--eval-documents", "2"]
    options += ["--num-rounds", "1", "--local-steps", "1", "--batch-size", "2", "--workers", "1"]
    assert main(["run", "llm", "--he", *options, "--out", str(run)]) == 0
    assert "a site's key that is here has opened it" in capsys.readouterr().out
    made = (run / "model" / "adapter_model.safetensors").read_bytes()
    kept = tmp_path / CLIENT_CONTEXT
    key.rename(kept)
    (run / "model" / "adapter_model.safetensors").unlink()
    assert main(["he", "open", str(run)]) == 2
    assert "must be opened with a site's" in capsys.readouterr().err
    assert main(["he", "open", str(run), "--context", str(kept)]) == 0
    assert (run / "model" / "adapter_model.safetensors").read_bytes() == made
    application = APPLICATIONS["llm"].load()
    state = Checkpoints(RunFolder(run).checkpoints).load_latest(lambda text: None)
    assert state is not None
    said: list[str] = []
    config = resolve_job("llm", None, run, {}).config
    application.export(config, state.parameters, RunFolder(run), said.append)
    assert said == [f"the model is sealed; who has a site's key opens it: sfl he open {run} --context FILE"]


def test_what_does_not_fit_is_refused_before_the_run(tiny: Path, letters: Path) -> None:
    exact = {"lora_aggregation": "exact"}
    with pytest.raises(CompositionError, match="WeightedMean under noise on the sum"):
        federated(tiny, letters, exact, privacy=PrivacyConfig(dp=True))
    with pytest.raises(ConfigError, match="lora_ranks must be left out under dpsgd"):
        federated(tiny, letters, {"lora_ranks": "8,4"}, privacy=PrivacyConfig(dpsgd=True))
    with pytest.raises(CompositionError, match="lora_aggregation=exact must come with fedavg or fedprox"):
        federated(tiny, letters, exact, algorithm=AlgorithmConfig(algorithm="scaffold"))
    with pytest.raises(CompositionError, match="lora_aggregation=exact must come without error feedback"):
        federated(tiny, letters, exact, federation={"message_dtype": "int8"})


def test_adapters_alone_travel_and_the_result_loads_and_merges(
    tiny: Path, letters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    flags = f"--model {tiny} --data {letters} --block-size 32 --local-steps 4 --learning-rate 0.05 --format simple"
    assert main(["run", "llm", *flags.split(), "--workers", "1", "--out", str(out)]) == 0
    assert "2 sites · 3 rounds · 1,024 parameters (4.1 kB)" in capsys.readouterr().out  # of 34,000
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tuned = loaded(PeftModel.from_pretrained, AutoModelForCausalLM.from_pretrained(tiny), str(out / "model"))
    ids = torch.tensor([[0, 5, 9, 17]])
    with torch.inference_mode():
        logits = tuned(input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(tiny).eval()(input_ids=ids).logits
        merged = loaded(AutoPeftModelForCausalLM.from_pretrained, str(out / "model")).merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits, plain)
    assert AutoTokenizer.from_pretrained(str(out / "model")).eos_token_id == 0
    shown = json.loads((out / "shown.json").read_text())
    assert [pair[0] for pair in shown["before"]] == [pair[0] for pair in shown["after"]]
    assert shown["before"] != shown["after"]
    page = (out / "report.html").read_text()
    assert "What the model says" in page
    assert "Characters" in page


def loaded(load: Callable[..., Any], *given: Any) -> Any:
    """A model as ``peft`` loads it, which asks ``transformers`` by names that will go."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return load(*given).eval()


def test_the_whole_model_loads_with_transformers(tiny: Path, letters: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = f"--model {tiny} --data {letters} --block-size 32 --local-steps 2 --peft none --num-rounds 1"
    assert main(["run", "llm", *flags.split(), "--workers", "1", "--format", "simple", "--out", str(out)]) == 0
    from transformers import AutoModelForCausalLM

    trained, before = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out / "model", tiny))
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), before.parameters(), strict=True))


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(tiny: Path, letters: Path, tmp_path: Path) -> None:
    flags = f"--model {tiny} --data {letters} --block-size 32 --local-steps 2 --workers 1 --format simple".split()
    for name, rounds in (("whole", "2"), ("part", "1")):
        assert main(["run", "llm", *flags, "--num-rounds", rounds, "--out", str(tmp_path / name)]) == 0
    resume = ["--resume", str(tmp_path / "part"), "--num-rounds", "2"]
    assert main(["run", "esm2", *resume]) == 2  # it is a run of another job
    assert main(["run", "llm", *resume]) == 0
    from safetensors.numpy import load_file

    whole, part = (load_file(tmp_path / name / "checkpoints/round-000002.safetensors") for name in ("whole", "part"))
    assert whole.keys() == part.keys()
    assert all((whole[name] == part[name]).all() for name in whole)


@pytest.mark.slow
def test_two_workers_give_the_bits_of_one(tiny: Path, letters: Path) -> None:
    one, two = (federated(tiny, letters, federation={"workers": count, "num_rounds": 2}) for count in (1, 2))
    for name, value in one.parameters.items():
        np.testing.assert_array_equal(two.parameters[name], value)


def test_completions_and_conversations_train(tiny: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"{k}+{k}=", "completion": f"{2 * k}"} for k in range(20)]
    rows += [
        {"messages": [{"role": "user", "content": f"{k}?"}, {"role": "assistant", "content": f"{k}."}]}
        for k in range(20)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = federated(tiny, tmp_path / "a.jsonl")
    assert result.rounds[-1].evaluation["token_accuracy"] >= 0.0


def test_the_plan_counts_documents(tiny: Path, letters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = f"--job llm --model {tiny} --data {letters} --dpsgd --num-clients 4 --partition key:author".split()
    assert main(["privacy", "plan", *flags]) == 0
    assert "the smallest site, of 2" in capsys.readouterr().out


def test_an_option_of_another_job_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["privacy", "plan", "--lora-r", "4"]) == 2
    assert "--lora-r must come with the job llm, got esm2" in capsys.readouterr().err


def test_what_dpsgd_cannot_train_is_said_before_the_first_round(tiny: Path, letters: Path) -> None:
    with pytest.raises(ModelError, match=r"whose example gradients are known|must have a rule"):
        federated(tiny, letters, {"lora_targets": "wte"}, privacy=PrivacyConfig(dpsgd=True))


@pytest.mark.parametrize("private", [[], ["--dp"], ["--dpsgd"]], ids=["plain", "dp", "dpsgd"])
def test_files_of_private_sites_are_not_the_servers_to_evaluate_on_or_to_show(
    private: list[str], tiny: Path, letters: Path, tmp_path: Path
) -> None:
    rows = letters.read_text().splitlines(keepends=True)
    (tmp_path / "data").mkdir()
    for name, half in (("a", rows[:60]), ("b", rows[60:])):
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(half))
    flags = f"--model {tiny} --data {tmp_path / 'data'} --partition files --block-size 32 --local-steps 1".split()
    flags += ["--num-rounds", "1", "--workers", "1", "--format", "simple", "--out", str(tmp_path / "run")]
    assert main(["run", "llm", *flags, *private]) == 0
    last = read_rounds(tmp_path / "run" / "metrics.jsonl")[-1]
    assert ("loss" in last.central) is not bool(private)
    assert (tmp_path / "run" / "shown.json").exists() is not bool(private)


def test_what_dpsgd_cannot_train_may_be_frozen(tiny: Path, letters: Path) -> None:
    options = {"lora_targets": "wte,c_attn"}
    privacy = PrivacyConfig(dpsgd=True, freeze_layers="*wte*")
    result = federated(tiny, letters, options, privacy=privacy)
    assert {site.status.value for site in result.rounds[-1].sites if site.stage == "fit"} == {"used"}


def test_a_run_that_never_began_leaves_no_folder(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(tiny), "--data", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "run")]
    assert main(["run", "llm", *flags]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_every_linear_layer_by_the_word_of_peft_and_no_adapters_for_a_model(tiny: Path, tmp_path: Path) -> None:
    from sfl.llm.model import load_model, with_adapters
    from sfl.train.module import lend_parameters

    module = with_adapters(load_model(find_model(str(tiny))), LLMClientConfig(lora_targets="all-linear"))
    assert any("c_fc" in name for name in lend_parameters(module))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="must be a whole model, got the adapters"):
        find_model(str(tmp_path))
