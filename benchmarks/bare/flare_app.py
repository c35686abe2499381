"""Three sites, trivial work, written by hand on FLARE with its defaults: two tasks a round, a mean in between."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

import numpy as np
from nvflare.apis.controller_spec import Task
from nvflare.apis.executor import Executor
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable


def keep(results, client_task, fl_ctx):  # noqa: ARG001
    results.append(client_task.result)


class BareController(Controller):
    def __init__(self, report: str) -> None:
        super().__init__()
        self.report = report

    def start_controller(self, fl_ctx):
        pass

    def stop_controller(self, fl_ctx):
        pass

    def process_result_of_unknown_task(self, client, task_name, client_task_id, result, fl_ctx):
        pass

    def control_flow(self, abort_signal, fl_ctx):
        value, ends = np.zeros(5), [time.monotonic()]
        for _ in range(4):
            for name in ("train", "validate"):
                data, results = Shareable(), []
                data["value"] = value
                task = Task(name, data, result_received_cb=partial(keep, results))
                self.broadcast_and_wait(task, fl_ctx, min_responses=3, abort_signal=abort_signal)
                if name == "train":
                    value = np.mean([result["value"] for result in results], axis=0)
            ends.append(time.monotonic())
        Path(self.report).write_text(json.dumps(np.diff(ends).tolist()))


class BareExecutor(Executor):
    def execute(self, task_name, shareable, fl_ctx, abort_signal):
        reply = Shareable()
        reply["value"] = shareable["value"] + 1.0
        return reply
