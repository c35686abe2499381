"""Three sites, trivial work, written by hand on Flower with its defaults: two exchanges a round, a mean in between."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:  # noqa: ARG001
    (value,) = message.content["arrays"].to_numpy_ndarrays()
    return Message(RecordDict({"arrays": ArrayRecord([value + 1.0])}), reply_to=message)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:  # noqa: ARG001
    (value,) = message.content["arrays"].to_numpy_ndarrays()
    return Message(RecordDict({"metrics": MetricRecord({"loss": float(value.sum())})}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    report, rounds, sites = Path(str(context.run_config["report"])), 4, 3
    while len(list(grid.get_node_ids())) < sites:
        time.sleep(0.1)
    value, ends = np.zeros(5), [time.monotonic()]
    for _ in range(rounds):
        for kind in ("train", "evaluate"):
            content = RecordDict({"arrays": ArrayRecord([value]), "config": ConfigRecord({})})
            replies = list(grid.send_and_receive([Message(content, node, kind) for node in grid.get_node_ids()]))
            if kind == "train":
                value = np.mean([reply.content["arrays"].to_numpy_ndarrays()[0] for reply in replies], axis=0)
        ends.append(time.monotonic())
    report.write_text(json.dumps(np.diff(ends).tolist()))
