"""The Client API in the site's own process: what a script is handed, what counts of its answer, how it fails."""

import json
import logging
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import scripts
import sfl.client as flare
from scripts import LOOP, W, bits, evaluate, fit, run, site, write
from sfl.core.task import Status
from sfl.errors import ClientApiError, ConfigError
from sfl.types import FLModel, ParamsType

HEAD = "import sfl.client as flare\nimport numpy as np\nflare.init()\n"


def looping(body: str, head: str = "") -> str:
    """A script whose loop has ``body``; ``model`` is what was received."""
    inside = "\n".join(f"    {line}" for line in body.strip("\n").split("\n"))
    return f"{HEAD}{head}\nwhile flare.is_running():\n    model = flare.receive()\n{inside}\n"


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    while scripts.OPEN:
        scripts.OPEN.pop().close()


# The names


def test_importing_the_client_api_is_cheap_and_every_name_resolves() -> None:
    code = "import sys, sfl.client as c; c.__dir__(); print(sorted({'torch','numpy','nvflare'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
    assert {"init", "receive", "send", "FLModel", "ParamsType", "is_train", "log"} <= set(dir(flare))
    with pytest.raises(AttributeError, match="no attribute 'sendd'"):
        flare.sendd  # noqa: B018  # pyright: ignore


def test_a_model_says_what_it_is() -> None:
    assert FLModel(params={"w": 1}).params_type is ParamsType.FULL
    assert FLModel(params={"w": 1}, params_type="DIFF").params_type is ParamsType.DIFF
    assert FLModel(metrics={"a": 1.0}).params_type is None
    assert FLModel(meta=None).meta == {}
    assert "1 arrays" in repr(FLModel(params={"w": 1}))
    for wrong in ({"params_type": "HALF", "params": {}}, {"params_type": "FULL"}, {"metrics": 3}, {"meta": [1]}):
        with pytest.raises(ConfigError, match=" must be "):
            FLModel(**wrong)


# What a script is handed, and what counts of its answer


def test_a_script_is_told_round_rounds_site_job_and_task(tmp_path: Path) -> None:
    subject = site(
        write(
            tmp_path,
            looping(
                """
info = [model.current_round, model.start_round, model.total_rounds, flare.get_site_name(), flare.get_job_id()]
info += [flare.is_train(), flare.is_evaluate(), flare.is_submit_model(), flare.get_task_name(), flare.system_info()]
print("SAID", __import__("json").dumps(info))
flare.send(flare.FLModel(params=model.params, metrics={"loss": 1.0}))
"""
            ),
        ),
        name="site-3",
        index=2,
    )
    replies = []
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *words: lines.append(" ".join(words)))
        replies += [fit(subject, 1), fit(subject, 2), evaluate(subject, 2)]
    assert [reply.reason for reply in replies] == ["", "", ""]
    info = {"site_name": "site-3", "job_id": "job", "device": "cpu"}
    said = [json.loads(line.removeprefix("SAID ")) for line in lines]
    assert said[0] == [0, 0, 3, "site-3", "job", True, False, False, "train", info]
    assert said[1][0] == 1
    assert said[2] == [1, 0, 3, "site-3", "job", False, True, False, "validate", info]


@pytest.mark.parametrize(
    ("answer", "delta"),
    [
        ("flare.FLModel(params={'w': model.params['w'] + 2})", 2.0),
        ("flare.FLModel(params={'w': np.full(2, 2.0)}, params_type='DIFF')", 2.0),
        ("flare.FLModel(params={'w': np.full(2, 2.0, np.float32)}, params_type=flare.ParamsType.DIFF)", 2.0),
        ("flare.FLModel(params={'w': [3.0, 3.0]})", 2.0),
    ],
)
def test_full_and_diff_parameters_arrive_as_what_they_are(tmp_path: Path, answer: str, delta: float) -> None:
    reply = fit(site(write(tmp_path, looping(f"flare.send({answer})"))), parameters={"w": np.ones(2)})
    assert reply.update is not None, reply.reason
    assert reply.update.delta["w"].tolist() == [delta, delta]


def test_weight_and_metrics_are_the_scripts(tmp_path: Path) -> None:
    reply = fit(site(write(tmp_path, LOOP)))
    assert reply.update is not None
    assert (reply.update.weight, reply.update.metrics) == (2.0, {"loss": 0.5})


def test_a_script_that_says_no_number_of_steps_weighs_one_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    subject = site(write(tmp_path, looping("flare.send(flare.FLModel(params=model.params))")))
    weights = [reply.update.weight for reply in (fit(subject, n) for n in (1, 2, 3)) if reply.update]
    assert weights == [1.0, 1.0, 1.0]
    assert [r.levelname for r in caplog.records if "NUM_STEPS_CURRENT_ROUND" in r.getMessage()] == ["WARNING"]


def test_an_evaluation_uses_the_metrics_alone(tmp_path: Path) -> None:
    body = "flare.send(flare.FLModel(params=model.params, metrics={'loss': 0.25, 'f1': 1}))"
    reply = evaluate(site(write(tmp_path, looping(body))))
    assert reply.update is not None, reply.reason
    assert (reply.update.delta, reply.update.metrics) == ({}, {"loss": 0.25, "f1": 1.0})


def test_a_script_without_a_loss_reports_none(tmp_path: Path) -> None:
    reply = evaluate(site(write(tmp_path, looping("flare.send(flare.FLModel(metrics={'f1': 0.5}))"))))
    assert reply.update is not None
    assert reply.update.metrics == {"f1": 0.5}


def test_what_a_script_changes_after_it_has_sent_does_not_change_what_it_sent(tmp_path: Path) -> None:
    body = "w = model.params['w'] + 1\nflare.send(flare.FLModel(params={'w': w}))\nw += 100"
    reply = fit(site(write(tmp_path, looping(body))))
    assert reply.update is not None
    assert reply.update.delta["w"].tolist() == [1.0, 1.0]


def test_a_script_may_change_what_it_received(tmp_path: Path) -> None:
    parameters = {"w": np.ones(2)}
    parameters["w"].flags.writeable = False
    body = "model.params['w'] += 1\nflare.send(flare.FLModel(params=model.params))"
    assert fit(site(write(tmp_path, looping(body))), parameters=parameters).reason == ""
    assert parameters["w"].tolist() == [1.0, 1.0]


def test_parameters_of_another_shape_are_rejected_and_the_script_goes_on(tmp_path: Path) -> None:
    subject = site(
        write(tmp_path, looping("flare.send(flare.FLModel(params={'w': np.zeros(2 + model.current_round)}))"))
    )
    assert fit(subject, 2).status is Status.REJECTED
    assert "must have shape (2,), got (3,)" in fit(subject, 2).reason
    assert fit(subject, 1).status is Status.USED


def test_figures_are_said_on_the_sites_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    body = """
from nvflare.client.tracking import MLflowWriter, SummaryWriter, WandBWriter
flare.log("acc", 0.5, "SCALAR", global_step=3)
SummaryWriter().add_scalars("val", {"f1": 0.25}, 4)
WandBWriter().log({"auc": 0.75}, step=5)
writer = MLflowWriter()
writer.log_params({"rate": 0.1})
writer.log_metrics({"mse": 2.0}, 6)
writer.log_text("long", "notes.txt")
writer.set_tags({"who": "me"})
flare.send(flare.FLModel(params=model.params))
"""
    caplog.set_level(logging.INFO, "sfl.site")
    assert fit(site(write(tmp_path, looping(body)))).reason == ""
    said = [record.getMessage() for record in caplog.records]
    assert "site-1: acc=0.5 global_step=3" in said
    assert "site-1: val/f1=0.25 global_step=4" in said
    assert "site-1: auc=0.75 global_step=5" in said
    assert said[3:7] == [
        "site-1: rate=0.1",
        "site-1: mse=2.0 global_step=6",
        "site-1: notes.txt=long",
        "site-1: who=me",
    ]


# Calls out of order


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sfl.client as flare\nflare.receive()", r"init\(\) must be called before receive\(\)"),
        ("import sfl.client as flare\nflare.is_running()", r"init\(\) must be called before is_running\(\)"),
        (
            HEAD + "flare.send(flare.FLModel(metrics={}))",
            r"receive\(\) must be called before each send\(\), got send\(\) first",
        ),
        (looping("for _ in range(2): flare.send(flare.FLModel(params=model.params))"), r"got send\(\) again"),
        (looping("flare.send(flare.FLModel())"), "must have params or metrics, got neither"),
        (looping("flare.send({'w': 1})"), "must be called with an FLModel, got dict"),
        (looping("flare.send(flare.FLModel(params=[1.0]))"), "params must be a dict of named arrays, got list"),
        (looping("flare.send(flare.FLModel(params={'w': 'x'}))"), r"params\['w'\] must be an array of real numbers"),
        (looping("flare.send(flare.FLModel(metrics={'f1': 'high'}))"), r"metrics\['f1'\] must be a number, got 'high'"),
        (looping("flare.send(flare.FLModel(metrics={'f1': 1.0}))"), "must answer a training task with params"),
        (HEAD + "flare.receive()", r"must answer each task with flare.send\(\), and ended without it"),
        (looping("flare.clear()"), "asked for the next task without it"),
        ("x = 1", r"must use the Client API, and ended without a call of flare.init\(\)"),
        ("import sfl.client as flare\nflare.init(rank=1.5)", "rank must be a string or an integer, got float"),
    ],
)
def test_a_call_out_of_order_names_itself(tmp_path: Path, text: str, message: str) -> None:
    reply = fit(site(write(tmp_path, text)))
    assert reply.status is Status.FAILED
    import re

    assert re.search(message, reply.reason), reply.reason


def test_a_script_that_no_site_runs_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for call in (flare.init, flare.receive, flare.is_running, flare.get_site_name):
        with pytest.raises(ClientApiError, match=r"init\(\) must be called before .* FedAvgRecipe"):
            call()
    with pytest.raises(RuntimeError):  # as FLARE's
        flare.send(FLModel())


def test_receive_gives_the_same_model_until_it_is_answered_and_init_twice_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    body = "assert flare.receive() is model and flare.is_running()\nflare.send(flare.FLModel(params=model.params))"
    assert fit(site(write(tmp_path, looping(body, head="flare.init()")))).reason == ""
    assert "init() was called more than once" in caplog.text


def test_ranks_other_than_zero_exchange_nothing(tmp_path: Path) -> None:
    text = """
    import sfl.client as flare
    flare.init(rank=1)
    assert not flare.is_running() and flare.receive() is None
    flare.send(flare.FLModel(metrics={}))
    assert not flare.log("a", 1, "SCALAR")
    flare.is_train()
    """
    assert "is_train() must be called on rank 0, got rank 1" in fit(site(write(tmp_path, text))).reason


# How a script fails


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def deep():\n    raise ValueError('bad data')\ndeep()", "got ValueError: bad data (train.py, line 2)"),
        ("import sys\nsys.exit(3)", "got exit code 3 (train.py, line 2)"),
        ("import sys\nsys.exit('no data')", "got exit code no data"),
        ("import no_such_module_anywhere", "got ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
        ("def broken(:", "got SyntaxError"),
        ("raise KeyboardInterrupt", "got KeyboardInterrupt"),
    ],
)
def test_a_script_that_fails_fails_its_site_with_its_own_words(tmp_path: Path, text: str, message: str) -> None:
    reply = fit(site(write(tmp_path, text)))
    assert reply.status is Status.FAILED
    assert message in reply.reason
    assert reply.reason.startswith("site-1: ScriptError: train.py must run without an error")


def test_the_traceback_begins_in_the_script_and_leaves_out_the_client_api(tmp_path: Path) -> None:
    details = fit(site(write(tmp_path, "def deep():\n    1 / 0\ndeep()"))).details
    cause = details.partition("The above exception was the direct cause")[0]
    assert cause.count("File ") == 2
    assert "train.py" in cause
    assert "inprocess.py" not in cause
    details = fit(site(write(tmp_path, HEAD + "flare.send(flare.FLModel(metrics={}))", "early.py"))).details
    cause = details.partition("The above exception was the direct cause")[0]
    assert cause.count("File ") == 1


def test_a_failed_script_starts_anew_with_the_next_task(tmp_path: Path) -> None:
    body = """
rounds = globals().get("rounds", 0) + 1
if model.current_round == 1:
    raise OSError("disk")
flare.send(flare.FLModel(params=model.params, metrics={"rounds": rounds}))
"""
    for folder in (None, tmp_path / "state"):
        subject = site(write(tmp_path, looping(body)), folder=folder)
        replies = [fit(subject, number) for number in (1, 2, 3, 4)]
        assert [reply.status for reply in replies] == [Status.USED, Status.FAILED, Status.USED, Status.USED]
        assert [r.update.metrics["rounds"] for r in replies if r.update] == [1.0, 1.0, 2.0]


def test_an_error_after_the_answer_fails_the_round_too(tmp_path: Path) -> None:
    reply = fit(site(write(tmp_path, looping("flare.send(flare.FLModel(params=model.params))\n1 / 0"))))
    assert "ZeroDivisionError" in reply.reason


def test_a_script_that_ends_early_is_told_next_time(tmp_path: Path) -> None:
    once = HEAD + "model = flare.receive()\nflare.send(flare.FLModel(params=model.params))"
    subject = site(write(tmp_path, once))
    assert fit(subject, 1).status is Status.USED
    assert "must go on while flare.is_running(), and had ended before this task" in fit(subject, 2).reason
    assert fit(subject, 3).status is Status.USED


def test_one_failing_site_does_not_stop_the_others(tmp_path: Path) -> None:
    body = """
if flare.get_site_name() == "site-2":
    raise ValueError("no data here")
flare.send(flare.FLModel(params={"w": model.params["w"] + 1}, metrics={"loss": 0.0}))
"""
    result = run(write(tmp_path, looping(body)), sites=1, federation=scripts.lenient(3))
    assert result.parameters["w"].tolist() == [2.0, 2.0]
    reasons = scripts.said(result)
    assert len(reasons) == 3
    assert all(reason.startswith("site-2: ScriptError") and "no data here" in reason for reason in reasons)


# Several scripts in one process


NOSY = """
import os, random, sys, threading
import numpy as np
import sfl.client as flare

state = []
name = sys.argv[1]
flare.init()
me = flare.get_site_name()
folder = os.path.join(os.path.dirname(__file__), me)
os.makedirs(folder, exist_ok=True)
os.chdir(folder)
sys.argv.append(me)
sys.path.insert(0, folder)
random.seed(me)
np.random.seed(sum(me.encode()))
twin_random, twin_numpy = random.Random(me), np.random.RandomState(sum(me.encode()))
import helper
helper.counts.append(me)
asked = []
while flare.is_running():
    model = flare.receive()
    def ask():
        asked.append(flare.get_site_name())
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    state.append(me)
    assert sys.argv == [__file__, "--flag", me], sys.argv
    assert sys.modules["__main__"].state is state and __name__ == "__main__"
    assert os.getcwd() == os.path.realpath(folder)
    assert sys.path[0] == folder
    assert random.random() == twin_random.random()
    assert np.random.rand() == twin_numpy.rand()
    assert set(state) == {me} == set(asked) == set(helper.counts)
    flare.send(flare.FLModel(params={"w": model.params["w"] + len(state)}, metrics={"loss": 0.0}))
"""


def test_scripts_of_one_process_do_not_interfere_and_leave_the_process_as_it_was(tmp_path: Path) -> None:
    write(tmp_path, "counts = []", "helper.py")
    script = write(tmp_path, NOSY)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002, TID251
    twins = random.Random(5), np.random.RandomState(5)
    before = (list(sys.argv), list(sys.path), Path.cwd(), sys.modules["__main__"], list(sys.meta_path))
    result = run(script, sites=3, rounds=3, train_args="--flag")
    assert scripts.said(result) == []
    assert result.parameters["w"].tolist() == [6.0, 6.0]  # 1 + 2 + 3: each counted its own rounds
    assert before == (list(sys.argv), list(sys.path), Path.cwd(), sys.modules["__main__"], list(sys.meta_path))
    assert (random.random(), np.random.rand()) == (twins[0].random(), twins[1].rand())  # noqa: NPY002
    assert "helper" not in sys.modules


def test_no_two_scripts_run_at_once_even_from_several_threads(tmp_path: Path) -> None:
    body = """
import builtins, time
assert not getattr(builtins, "someone_runs", False)
builtins.someone_runs = True
time.sleep(0.02)
builtins.someone_runs = False
flare.send(flare.FLModel(params=model.params))
"""
    script = write(tmp_path, looping(body))
    sites = [site(script, f"site-{n}", n) for n in range(4)]
    reasons: list[str] = []
    threads = [threading.Thread(target=lambda s=s: reasons.extend(fit(s, n).reason for n in (1, 2))) for s in sites]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reasons == [""] * 8


def test_a_script_runs_only_while_its_site_is_worked_on(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        looping(
            "with open(__file__ + '.log', 'a') as log: log.write('t')\nflare.send(flare.FLModel(params=model.params))"
        ),
    )
    subject = site(script)
    log = Path(script + ".log")
    fit(subject, 1)
    first = log.read_text()
    assert (first, log.read_text()) == ("t", "t")
    fit(subject, 2)
    assert log.read_text() == "tt"


UNSEEDED = looping(
    """
import random
draw = random.random() + np.random.rand()
flare.send(flare.FLModel(params={"w": model.params["w"] + draw}, metrics={"loss": draw}))
"""
)


def test_one_process_and_workers_give_the_same_bits_even_of_scripts_that_seed_nothing(tmp_path: Path) -> None:
    script = write(tmp_path, UNSEEDED)
    one, again, two = (run(script, sites=3, workers=n) for n in (1, 1, 2))
    assert scripts.said(one) == []
    assert bits(one) == bits(again) == bits(two)
    assert [r.fit for r in one.rounds] == [r.fit for r in two.rounds]
    assert len({s.metrics["loss"] for s in one.rounds[1].sites}) == 3  # sites draw differently
    other = run(script, sites=3, federation=scripts.FederationConfig(num_clients=3, seed=1))
    assert bits(other) != bits(one)


def test_a_resumed_run_starts_the_script_at_the_resumed_round(tmp_path: Path) -> None:
    body = (
        "at = model.current_round\nflare.send(flare.FLModel(params={'w': model.params['w'] + at}, metrics={'at': at}))"
    )
    script = write(tmp_path, looping(body))
    out = tmp_path / "run"
    scripts.recipe(script, rounds=2).execute(out=out)
    result = scripts.recipe(script, rounds=4).execute(out=out, resume=True)
    assert [r.fit["at"] for r in result.rounds] == [2.0, 3.0]
    assert result.parameters["w"].tolist() == [6.0, 6.0]  # 0 + 1 + 2 + 3


# The end of a job


ENDING = looping("flare.send(flare.FLModel(params=model.params, metrics={'loss': 0.0}))") + (
    "with open(__file__ + '.' + flare.get_site_name(), 'w') as file: file.write(str(flare.receive()))\n"
)


@pytest.mark.parametrize("workers", [1, 2])
def test_when_the_job_is_over_scripts_end_by_themselves(tmp_path: Path, workers: int) -> None:
    script = write(tmp_path, ENDING)
    run(script, workers=workers)
    assert [Path(f"{script}.site-{n}").read_text() for n in (1, 2)] == ["None", "None"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("script-")]


def test_a_script_that_does_not_end_is_left_after_a_while(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hanging = HEAD + "model = flare.receive()\nflare.send(flare.FLModel(params=model.params))\nflare.is_running()\n"
    hanging += "import threading\nthreading.Event().wait(30)"
    subject = site(write(tmp_path, hanging), close_timeout=0.1)
    fit(subject)
    subject.close()
    subject.close()
    assert "train.py is still running and is left" in caplog.text


def test_what_goes_wrong_at_the_end_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    subject = site(write(tmp_path, LOOP + "raise ValueError('late')"))
    fit(subject)
    subject.close()
    assert "at its end" in caplog.text
    assert "late" in caplog.text


# Scripts of FLARE


FLARE = """
import nvflare.client as flare
from nvflare.client import FLModel, ParamsType
import nvflare

assert nvflare.client is flare
flare.init()
while flare.is_running():
    input_model = flare.receive()
    w = input_model.params["w"] + 1
    flare.send(FLModel(params={"w": w}, params_type=ParamsType.FULL, metrics={"loss": 1.0}))
"""


def test_a_script_of_flare_runs_unmodified_and_the_process_keeps_its_own_nvflare(tmp_path: Path) -> None:
    own = {name for name in sys.modules if name.partition(".")[0] == "nvflare"}
    result = run(write(tmp_path, FLARE))
    assert scripts.said(result) == []
    assert result.parameters["w"].tolist() == [2.0, 2.0]
    assert {name for name in sys.modules if name.partition(".")[0] == "nvflare"} == own


DECORATED = """
import nvflare.client as flare

@flare.evaluate
def score(model, scale=1.0):
    return {"loss": float(model.params["w"][0]) * scale}

@flare.train()
def fit(model=None, step=1):
    return flare.FLModel(params={"w": model.params["w"] + step}, meta={"NUM_STEPS_CURRENT_ROUND": 2})

flare.init()
while flare.is_running():
    found = score("given instead", scale=2.0)
    if flare.is_train():
        fit(step=3)
"""


def test_decorated_functions_are_given_the_received_model_and_send(tmp_path: Path) -> None:
    result = run(write(tmp_path, DECORATED))
    assert scripts.said(result) == []
    assert result.parameters["w"].tolist() == [6.0, 6.0]
    assert [entry.fit for entry in result.rounds[1:]] == [{"loss": 0.0}, {"loss": 6.0}]
    assert result.rounds[-1].evaluation == {"loss": 12.0}


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (
            'return {"loss": float(model.params["w"][0]) * scale}',
            "return 1.0",
            "must return a dict of figures, got float",
        ),
        ("return flare.FLModel(params=", "return dict(params=", "must return an FLModel, got dict"),
    ],
)
def test_a_decorated_function_that_returns_something_else_is_named(
    tmp_path: Path, before: str, after: str, said: str
) -> None:
    assert said in fit(site(write(tmp_path, DECORATED.replace(before, after)))).reason


def test_it_runs_where_nvflare_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfl.client.alias._installed", lambda package: [])
    assert scripts.said(run(write(tmp_path, FLARE))) == []
    missing = fit(site(write(tmp_path, "import nvflare.client.cell", "missing.py")))
    assert "No module named 'nvflare.client.cell'" in missing.reason


def test_a_process_that_has_loaded_nvflare_gets_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import ModuleType

    real, client = ModuleType("nvflare"), ModuleType("nvflare.client")
    real.client = client  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvflare", real)
    monkeypatch.setitem(sys.modules, "nvflare.client", client)
    assert scripts.said(run(write(tmp_path, FLARE))) == []
    assert (sys.modules["nvflare"], sys.modules["nvflare.client"], real.client) == (real, client, client)


def test_a_model_of_another_class_is_taken_by_its_attributes(tmp_path: Path) -> None:
    body = """
from enum import Enum
class Kind(str, Enum):
    DIFF = "DIFF"
class Model:
    params, params_type, metrics, meta = {"w": np.ones(2)}, Kind.DIFF, None, {"NUM_STEPS_CURRENT_ROUND": np.int64(7)}
flare.send(Model())
"""
    reply = fit(site(write(tmp_path, looping(body))), parameters={"w": np.ones(2)})
    assert reply.update is not None, reply.reason
    assert (reply.update.delta["w"].tolist(), reply.update.weight) == ([1.0, 1.0], 7.0)


# Tensors


def test_half_precision_tensors_come_back_exactly(tmp_path: Path) -> None:
    import torch

    values = torch.tensor([1 / 3, 65280.0, -1e-8])
    body = f"""
import torch
kind = [torch.bfloat16, torch.float16, torch.float32][model.current_round]
assert isinstance(model.params["w"], torch.Tensor)
flare.send(flare.FLModel(params={{"w": torch.tensor({values.tolist()}).to(kind).requires_grad_()}}))
"""
    subject = site(write(tmp_path, looping(body)), params_format="pytorch")
    for number, kind in enumerate((torch.bfloat16, torch.float16, torch.float32), start=1):
        reply = fit(subject, number, {"w": np.zeros(3, np.float32)})
        assert reply.update is not None, reply.reason
        assert reply.update.delta["w"].tolist() == values.to(kind).float().tolist()


def test_every_entry_of_a_torch_model_travels_frozen_ones_and_counters_included(tmp_path: Path) -> None:
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    model[0].bias.requires_grad_(False)
    body = """
import torch
net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
net.load_state_dict(model.params)
net(torch.ones(4, 2))
flare.send(flare.FLModel(params=net.state_dict(), metrics={"loss": float(torch.rand(()))}))
"""
    script = write(tmp_path, looping(body))
    result = run(script, model=model)
    assert scripts.said(result) == []
    assert result.parameters.keys() == model.state_dict().keys()
    assert result.parameters["1.num_batches_tracked"] == 2
    assert result.parameters["0.bias"].tolist() == model[0].bias.tolist()


@pytest.mark.slow
def test_torch_draws_the_same_on_workers_and_in_a_process_of_its_own(tmp_path: Path) -> None:
    body = """
import torch
flare.send(flare.FLModel(params={"w": model.params["w"] + torch.rand(2).numpy()}, metrics={"loss": 0.0}))
"""
    script = write(tmp_path, looping(body))
    one, two, three = (run(script, workers=n, launch_external_process=mode) for n, mode in ((1, 0), (2, 0), (1, 1)))
    assert scripts.said(one) == scripts.said(three) == []
    assert bits(one) == bits(two) == bits(three)


def test_an_interrupt_is_not_the_scripts_to_handle(tmp_path: Path) -> None:
    body = """
import os, signal, time
os.kill(os.getpid(), signal.SIGINT)
time.sleep(0.3)
flare.send(flare.FLModel(params=model.params))
"""
    before = sys.modules["__main__"]
    subject = site(write(tmp_path, looping(body)), close_timeout=0.1)
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores interrupts
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(subject)
    finally:
        signal.signal(signal.SIGINT, ours)
    assert sys.modules["__main__"] is before


def test_torchs_random_state_belongs_to_the_script(tmp_path: Path) -> None:
    import torch

    body = """
import torch
if model.current_round == 0:
    torch.manual_seed(11)
    twin = torch.Generator().manual_seed(11)
assert torch.rand(()) == torch.rand((), generator=twin)
flare.send(flare.FLModel(params=model.params, metrics={"loss": 0.0}))
"""
    generator = torch.get_rng_state()
    assert scripts.said(run(write(tmp_path, looping(body, "twin = None")), sites=3)) == []
    assert torch.equal(generator, torch.get_rng_state())


def test_the_folder_of_the_process_is_put_back_when_a_script_fails(tmp_path: Path) -> None:
    before: Any = (Path.cwd(), list(sys.path), list(sys.argv))
    fit(site(write(tmp_path, "import os, sys\nos.chdir('/')\nsys.path.clear()\nsys.argv.clear()\nraise ValueError")))
    assert before == (Path.cwd(), list(sys.path), list(sys.argv))
    assert W["w"].tolist() == [0.0, 0.0]


SCORES = """
import sfl.client as flare

SCORES = [0.1, 0.6, 0.4, {last}]  # of the model after 0, 1, 2 and 3 rounds
flare.init()
while flare.is_running():
    model = flare.receive()
    score = SCORES[int(model.params["w"][0])]
    params = {{"w": model.params["w"] + 1}}
    flare.send(flare.FLModel(params=params, metrics={{"accuracy": score}}, meta={{"NUM_STEPS_CURRENT_ROUND": 2}}))
"""


@pytest.mark.parametrize(("last", "best"), [(0.5, (1, 0.6)), (0.9, (3, 0.9))])
def test_the_best_model_is_found_by_what_scripts_report_of_the_one_they_received_the_last_included(
    last: float, best: tuple[int, float], tmp_path: Path
) -> None:
    result = run(write(tmp_path, SCORES.format(last=last)), rounds=3)
    assert result.best is not None
    assert (result.best.round, result.best.value) == best
