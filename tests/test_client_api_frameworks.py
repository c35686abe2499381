"""Torch, Lightning and Hugging Face scripts: the examples learn, in both modes to the same bits."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import scripts
import sfl.client.huggingface as hf
import sfl.client.lightning as lit
from scripts import EXAMPLES, bits, run, write
from sfl.errors import ClientApiError
from sfl.recipe import RunResult

slow = pytest.mark.slow
quiet = pytest.mark.filterwarnings("ignore")  # theirs, of which scripts are full


def net(prefix: str = "") -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)  # noqa: TID251 - inside fork_rng
        made = torch.nn.Sequential(
            torch.nn.Linear(64, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Linear(32, 10)
        )
    return torch.nn.ModuleDict({prefix: made}) if prefix else made


def example(name: str, *, prefix: str = "net", rounds: int = 3, **options: Any) -> RunResult:
    result = run(str(EXAMPLES / name), model=net(prefix), rounds=rounds, **options)
    assert scripts.said(result) == []
    return result


def test_both_helpers_refuse_what_is_no_trainer_of_theirs() -> None:
    with pytest.raises(ClientApiError, match="must be given a Lightning trainer, got SimpleNamespace"):
        lit.patch(SimpleNamespace(callbacks=[]))
    with pytest.raises(ClientApiError, match=r"must be given a transformers\.Trainer, got SimpleNamespace"):
        hf.patch(SimpleNamespace())
    many = SimpleNamespace(train=print, evaluate=print, add_callback=print, args=SimpleNamespace(world_size=2))
    with pytest.raises(ClientApiError, match="must be called in a single process, got 2"):
        hf.patch(many)


@slow
def test_the_torch_example_learns_with_the_same_bits_on_workers() -> None:
    one, two = (example("train_torch.py", prefix="", workers=workers) for workers in (1, 2))
    assert bits(one) == bits(two)
    assert one.rounds[-1].evaluation["accuracy"] > 0.85 > one.rounds[1].fit["accuracy"]


@slow
def test_the_torch_example_gives_the_same_bits_as_a_process_of_its_own() -> None:
    one, two = (example("train_torch.py", prefix="", launch_external_process=mode) for mode in (False, True))
    assert bits(one) == bits(two)


@slow
@quiet
def test_the_lightning_example_learns_with_the_same_bits_in_both_modes() -> None:
    one, two = (example("train_lightning.py", launch_external_process=mode) for mode in (False, True))
    assert bits(one) == bits(two)
    assert one.rounds[-1].evaluation["accuracy"] > 0.85 > one.rounds[1].fit["accuracy"]


@slow
@quiet
def test_the_hugging_face_example_learns_with_the_same_bits_in_both_modes() -> None:
    one, two = (example("train_hf.py", launch_external_process=mode) for mode in (False, True))
    assert bits(one) == bits(two)
    assert one.rounds[-1].evaluation["eval_accuracy"] > 0.7 > one.rounds[1].fit["eval_accuracy"]
    assert one.rounds[-1].evaluation["loss"] == one.rounds[-1].evaluation["eval_loss"]


LIT = """
import lightning.pytorch as pl
import torch
import nvflare.client.lightning as flare

class Tiny(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))
        self.__fl_meta__ = {META}
    def training_step(self, batch, _):
        seen.append(float(self.w))
        return ((self.w - 10.0) ** 2).sum()
    def validation_step(self, batch, _):
        self.log("w", self.w.detach().sum())
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.25, momentum=0.5)

seen = []
rows = torch.utils.data.DataLoader(torch.zeros(4, 1), batch_size=2)
model = Tiny()
trainer = pl.Trainer({LIMIT}, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                     enable_model_summary=False, num_sanity_val_steps=2)
flare.patch(trainer{PATCH})
rounds = 0
while flare.is_running():
    seen.clear()
    trainer.validate(model, rows, verbose=False)
    if flare.is_train():
        trainer.fit(model, rows, rows)
        rounds += 1
        print("SEEN", len(seen), seen[0], trainer.global_step)
"""


@slow
@quiet
@pytest.mark.parametrize("limit", ["max_epochs=2", "max_epochs=-1, max_steps=4"])
def test_lightning_validates_and_trains_the_received_model_for_as_long_in_every_round(
    tmp_path: Path, limit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = LIT.replace("{META}", "{}").replace("{LIMIT}", limit).replace("{PATCH}", "")
    result = run(write(tmp_path, text), model=torch.nn.ParameterDict({"w": torch.ones(1)}), sites=1, rounds=3)
    assert scripts.said(result) == []
    seen = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("SEEN")]
    assert [(line[1], line[3]) for line in seen] == [("4", "4"), ("4", "8"), ("4", "12")]
    starts = [float(line[2]) for line in seen]
    figures = [round.fit["w"] for round in result.rounds[1:]]
    assert starts == figures  # validated what was received, then trained from it
    assert starts[0] == 1.0
    assert [s.num_examples for s in result.rounds[1].sites] == [4.0]
    assert result.rounds[-1].evaluation == {"w": pytest.approx(float(result.parameters["w"][0]))}


@slow
@quiet
def test_lightning_sends_a_modules_own_meta_and_keeps_the_optimizer_only_if_asked(tmp_path: Path) -> None:
    ends = []
    for patch in ("", ", restore_state=False"):
        text = LIT.replace("{META}", "{'NUM_STEPS_CURRENT_ROUND': 9}").replace("{LIMIT}", "max_epochs=1")
        script = write(tmp_path, text.replace("{PATCH}", patch), f"train{len(ends)}.py")
        result = run(script, model=torch.nn.ParameterDict({"w": torch.ones(1)}), sites=1)
        assert scripts.said(result) == []
        assert [s.num_examples for s in result.rounds[1].sites] == [9.0]
        ends.append(float(result.parameters["w"][0]))
    assert ends[0] != ends[1]


@slow
@quiet
def test_lightning_takes_the_other_package_too_and_names_what_does_not_fit(tmp_path: Path) -> None:
    text = LIT.replace("{META}", "{}").replace("{LIMIT}", "max_epochs=1").replace("{PATCH}", "")
    other = write(tmp_path, text.replace("import lightning.pytorch as pl", "import pytorch_lightning as pl"))
    assert scripts.said(run(other, model=torch.nn.ParameterDict({"w": torch.ones(1)}), sites=1)) == []
    wrong = scripts.fit(scripts.site(other, params_format="pytorch"), parameters={"v": torch.ones(1).numpy()})
    assert "Missing key(s) in state_dict" in wrong.reason
    assert "lightning" in sys.modules or "pytorch_lightning" in sys.modules
