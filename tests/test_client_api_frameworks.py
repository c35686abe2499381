"""Torch, Lightning and Hugging Face scripts: the examples learn, in both modes to the same bits."""

import ast
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import scripts
import sfl.client.huggingface as hf
import sfl.client.lightning as lit
from scripts import EXAMPLES, bits, run, write
from sfl.core.task import Status
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
    many.is_fsdp_enabled = True
    with pytest.raises(ClientApiError, match="must be given a model that every process holds whole, got a sharded one"):
        hf.patch(many)


@slow
def test_the_torch_example_gives_the_same_bits_as_a_process_of_its_own() -> None:
    one, two = (example("train_torch.py", prefix="", sites=1, launch_external_process=mode) for mode in (False, True))
    assert bits(one) == bits(two)
    assert one.rounds[-1].evaluation["accuracy"] > 0.85 > one.rounds[1].fit["accuracy"]


@slow
@quiet
def test_the_lightning_example_learns_with_the_same_bits_in_both_modes() -> None:
    one, two = (example("train_lightning.py", sites=1, launch_external_process=mode) for mode in (False, True))
    assert bits(one) == bits(two)
    assert one.rounds[-1].evaluation["accuracy"] > 0.85 > one.rounds[1].fit["accuracy"]


@slow
@quiet
def test_the_hugging_face_example_learns_with_the_same_bits_in_both_modes() -> None:
    one, two = (example("train_hf.py", sites=1, launch_external_process=mode) for mode in (False, True))
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


TORCHRUN = "torchrun --standalone --nproc_per_node=2"
SIZES = {
    "vocab_size": 16,
    "n_positions": 8,
    "n_embd": 8,
    "n_layer": 1,
    "n_head": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
RANKS = """
import os
import sys
from pathlib import Path
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
import sfl.client.huggingface as flare

folder = Path(sys.argv[1])

class Watch(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        said.append(("train", digest(model)))

def digest(model):
    return hash(b"".join(value.detach().numpy().tobytes() for value in model.state_dict().values()))

said = []
options = TrainingArguments(output_dir=str(folder / "made"), max_steps=3, per_device_train_batch_size=2, use_cpu=True,
    ddp_backend="gloo", report_to="none", save_strategy="no", disable_tqdm=True, learning_rate=0.01)
rank = options.process_index
(folder / f"pid-{rank}").write_text(str(os.getpid()))
torch.manual_seed(rank)
model = GPT2LMHeadModel(GPT2Config(**SIZES))
rows = [{"input_ids": torch.arange(n, n + 8) % 16, "labels": torch.arange(n, n + 8) % 16} for n in range(12)]
trainer = Trainer(model=model, args=options, train_dataset=rows, eval_dataset=rows[:4], callbacks=[Watch()])
flare.patch(trainer)
while flare.is_running():
    trainer.evaluate()
    said.append((flare.is_train(), flare.is_evaluate(), digest(model)))
    if flare.is_train():
        trainer.train()
        said.append((flare.is_train(), digest(model)))
(folder / f"said-{rank}").write_text(repr(said))
""".replace("**SIZES", ", ".join(f"{name}={value}" for name, value in SIZES.items()))

LIT_RANKS = """
import os
import sys
from pathlib import Path
import lightning.pytorch as pl
import torch
import nvflare.client.lightning as flare

folder, fails = Path(sys.argv[1]), sys.argv[2:] == ["fails"]

class Tiny(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.full((1,), float(rank)))
    def on_train_start(self):
        said.append(("train", self.w.tolist()))
        if fails and rank == 1:
            raise ValueError("no data on rank 1")
    def training_step(self, batch, _):
        return ((self.w - batch) ** 2).mean()
    def validation_step(self, batch, _):
        self.log("w", self.w.detach().sum(), sync_dist=True)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.25)

said = []
trainer = pl.Trainer(max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", use_distributed_sampler=False,
                     logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
rank = trainer.global_rank
(folder / f"pid-{rank}").write_text(str(os.getpid()))
rows = torch.utils.data.DataLoader(torch.arange(4.0)[rank::2].reshape(2, 1), batch_size=1)
model = Tiny()
flare.patch(trainer)
while flare.is_running():
    trainer.validate(model, rows, verbose=False)
    said.append((flare.is_train(), flare.is_evaluate(), model.w.tolist()))
    if flare.is_train():
        trainer.fit(model, rows)
        said.append((flare.is_train(), model.w.tolist()))
(folder / f"said-{rank}").write_text(repr(said))
torch.distributed.barrier()
"""


@slow
@quiet
@pytest.mark.parametrize("command", ["python3 -u"])
def test_lightning_on_several_ranks_trains_one_model_and_all_of_them_end(tmp_path: Path, command: str) -> None:
    model = torch.nn.ParameterDict({"w": torch.full((1,), 9.0)})
    options = {"launch_external_process": True, "command": command, "train_args": str(tmp_path)}
    result = run(write(tmp_path, LIT_RANKS), model=model, sites=1, rounds=2, **options)
    assert scripts.said(result) == []
    zero, one = ((tmp_path / f"said-{rank}").read_text() for rank in range(2))
    assert zero == one
    w, told = 9.0, []
    for _ in range(2):
        start = w
        for first, other in ((0.0, 1.0), (2.0, 3.0)):  # a step: one row of each rank, and the mean of their gradients
            w -= 0.25 * ((w - first) + (w - other))
        told += [(True, False, [start]), ("train", [start]), (False, [w])]
    assert ast.literal_eval(zero) == [*told, (False, False, [w])]  # evaluated, and answered
    assert result.parameters["w"].tolist() == [w]
    assert [entry.sites[0].num_examples for entry in result.rounds[1:]] == [2.0, 2.0]
    assert result.rounds[-1].evaluation == {"w": w}


@slow
def test_one_rank_of_lightning_that_fails_ends_them_all_and_the_site_says_so(tmp_path: Path) -> None:
    args = (str(tmp_path), "fails")
    subject = scripts.site(write(tmp_path, LIT_RANKS), external=True, args=args, params_format="pytorch")
    reply = scripts.fit(subject, parameters={"w": np.ones(1, np.float32)})
    assert reply.status is Status.FAILED
    assert reply.reason.endswith(": ValueError: no data on rank 1.")
    for rank in range(2):
        pid = int((tmp_path / f"pid-{rank}").read_text())
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@slow
@quiet
@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ("ddp", "must train in one process, got a trainer of 2. Say launch_external_process=True"),
        ("ddp_spawn", "must each run the script, got spawned ones"),
    ],
)
def test_lightning_refuses_processes_that_cannot_be_told(strategy: str, said: str, tmp_path: Path) -> None:
    text = LIT_RANKS.replace('strategy="ddp"', f"strategy={strategy!r}").replace('accelerator="cpu"', "accelerator=CPU")
    reply = scripts.fit(scripts.site(write(tmp_path, "CPU = 'cpu'" + text), args=(str(tmp_path),)))
    assert said in reply.reason


@slow
@quiet
@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_lightning_refuses_a_model_of_which_each_process_holds_a_part(name: str) -> None:
    from lightning.pytorch import strategies

    kind = getattr(strategies, name)
    members = {"__module__": "lightning.pytorch", "world_size": 2, "strategy": kind.__new__(kind)}
    with pytest.raises(ClientApiError, match=f"that every process holds whole, got {name}"):
        lit.patch(type("Trainer", (), members)())


@slow
@quiet
def test_hugging_face_on_several_ranks_trains_one_model_and_all_of_them_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    monkeypatch.setenv("PYTHONHASHSEED", "0")
    with torch.random.fork_rng():
        torch.manual_seed(7)  # noqa: TID251 - inside fork_rng
        model = GPT2LMHeadModel(GPT2Config(**SIZES))
    options = {"launch_external_process": True, "command": TORCHRUN, "train_args": str(tmp_path)}
    result = run(write(tmp_path, RANKS), model=model, sites=1, rounds=2, **options)
    assert scripts.said(result) == []
    assert all(np.isfinite(value).all() for value in result.parameters.values())
    assert [entry.sites[0].num_examples for entry in result.rounds[1:]] == [3.0, 3.0]
    assert result.rounds[-1].evaluation["loss"] < result.rounds[1].fit["loss"]
    assert not any(psutil.pid_exists(int((tmp_path / f"pid-{rank}").read_text())) for rank in range(2))
    zero, one = ((tmp_path / f"said-{rank}").read_text() for rank in range(2))
    assert zero == one
    told = ast.literal_eval(zero)
    assert [entry[:-1] for entry in told] == [
        *[(True, False), ("train",), (False,)] * 2,
        (False, False),  # evaluated, and answered
    ]
    states = [entry[-1] for entry in told]
    assert states[0] == states[1] != states[2]
    assert states[3] == states[4] != states[5]
