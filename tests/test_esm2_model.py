"""Which model is meant, and that it loads through ``transformers`` and comes back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sfl.errors import ModelError
from sfl.esm2.alphabet import TOKENS
from sfl.esm2.model import BUNDLED, DEFAULT, Pretrained, bundled_folder, find_model, load_model, save_model
from sfl.train import pretrained
from sfl.train.module import copy_parameters, exchanged, lend_parameters, load_parameters

torch = pytest.importorskip("torch")


def test_offline_the_bundled_model_is_found_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(pretrained, "_is_cached", lambda name: False)
    monkeypatch.setattr(pretrained, "hub_refusal", lambda: pytest.fail("asked the hub although it is offline"))
    source = find_model(None)
    assert source.name == BUNDLED
    assert "bundled" in source.why


def test_the_cached_model_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "_is_cached", lambda name: True)
    assert find_model(None).name == DEFAULT


def test_the_hub_is_asked_when_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "_is_cached", lambda name: False)
    monkeypatch.setattr(pretrained, "_hub_answers", lambda name: True)
    assert find_model(None).location == DEFAULT


def test_a_named_folder_must_hold_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        find_model(str(tmp_path))
    with pytest.raises(ModelError, match=r"config\.json"):
        find_model("./nowhere")


def test_a_hub_name_offline_says_what_to_do() -> None:
    source = find_model("facebook/esm2_t12_35M_UR50D")
    assert source.location == "facebook/esm2_t12_35M_UR50D"
    with pytest.raises(ModelError, match="--model bundled"):
        load_model(source)


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ModelError, match="gpt2"):
        load_model(find_model(str(tmp_path)))


def test_torn_weights_are_an_error_of_ours(tmp_path: Path) -> None:
    shutil.copytree(bundled_folder(), tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="weights"):
        load_model(find_model(str(tmp_path / "m")))


def test_the_bundled_vocabulary_is_the_alphabet() -> None:
    assert (bundled_folder() / "vocab.txt").read_text().split() == list(TOKENS)


def test_the_bundled_model_is_small_enough_for_the_repository() -> None:
    assert sum(file.stat().st_size for file in bundled_folder().iterdir()) < 8_000_000


def test_parameters_travel_and_come_back(tmp_path: Path) -> None:
    source = Pretrained(BUNDLED, str(bundled_folder()), "")
    model = load_model(source)
    names = set(exchanged(model))
    assert "lm_head.decoder.weight" not in names  # tied to the embeddings: travels once
    assert not any("contact_head" in name for name in names)  # has no gradient in MLM
    parameters = copy_parameters(model)
    shifted = {name: value + np.float32(0.25) for name, value in parameters.items()}
    load_parameters(model, shifted)
    assert all((lend_parameters(model)[name] == shifted[name]).all() for name in names)
    save_model(model, tmp_path / "out")

    from transformers import AutoTokenizer, EsmForMaskedLM

    again = EsmForMaskedLM.from_pretrained(tmp_path / "out")
    assert all(np.array_equal(copy_parameters(again)[name], shifted[name]) for name in names)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("MKT")["input_ids"] == [0, 20, 15, 11, 2]


def test_loading_refuses_other_names_and_shapes() -> None:
    model = load_model(Pretrained(BUNDLED, str(bundled_folder()), ""))
    parameters = copy_parameters(model)
    name = next(iter(parameters))
    with pytest.raises(ModelError, match="names"):
        load_parameters(model, {k: v for k, v in parameters.items() if k != name})
    with pytest.raises(ModelError, match="shape"):
        load_parameters(model, {**parameters, name: parameters[name][:1]})


def test_the_loss_is_that_of_transformers() -> None:
    """The head on the selected residues alone gives what the library's own MLM loss gives on all."""
    from sfl.core import rng
    from sfl.esm2.alphabet import encode
    from sfl.esm2.loss import mlm_loss
    from sfl.esm2.masking import mask, pad

    model = load_model(Pretrained(BUNDLED, str(bundled_folder()), "")).eval()
    batch = mask(pad([encode("MKTAYIAKQRQISFVKSHFSRQ" * 3), encode("LAGVSERTIDPKQNF")]), rng.public(0, 1, "t"))
    labels = np.full(batch.ids.shape, -100)
    labels[batch.selected] = batch.targets
    ids = torch.from_numpy(batch.ids)
    with torch.inference_mode():
        ours = mlm_loss(model, batch)
        theirs = model(input_ids=ids, attention_mask=(ids != 1).long(), labels=torch.from_numpy(labels)).loss
    assert float(ours.total) / ours.count == pytest.approx(float(theirs), rel=1e-5)


@pytest.mark.parametrize(
    "odd", [{"hidden_size": "x"}, {"hidden_size": None}, {"num_attention_heads": 0}, {"num_hidden_layers": -1}]
)
def test_an_odd_configuration_is_a_clear_error(tmp_path: Path, odd: dict[str, object]) -> None:
    config = json.loads((bundled_folder() / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | odd))
    (tmp_path / "model.safetensors").symlink_to(bundled_folder() / "model.safetensors")
    with pytest.raises(ModelError, match=r"^model "):
        load_model(find_model(str(tmp_path)))


@pytest.mark.slow
def test_what_torch_leaves_behind_lies_in_the_users_cache(tmp_path: Path) -> None:
    temporary, cache = tmp_path / "tmp", tmp_path / "cache"
    temporary.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    environment |= {"TMPDIR": str(temporary), "XDG_CACHE_HOME": str(cache)}
    code = "from sfl.esm2.model import find_model, load_model; load_model(find_model('bundled'))"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert list(temporary.iterdir()) == []
    assert (cache / "sfl" / "torchinductor").is_dir()
