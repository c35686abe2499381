"""Flower's ClientApp around the sites of a process of ours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from sfl.engine.flower.messages import pack, unpack
from sfl.engine.launch import Launch
from sfl.engine.site_process import SiteProcess


@dataclass(frozen=True, slots=True)
class Place:
    """Where a message is answered.

    Attributes:
        launch: The run.
        site: The name of the site.
        key: Which process of sites answers for it.
        keeper: Process id of whoever must be alive for that process to go on.
    """

    launch: Launch
    site: str
    key: str
    keeper: int


def client_app(place: Callable[[Context], Place]) -> ClientApp:
    """An app that passes every message on to the process of its site.

    Args:
        place: Where a message of this context is answered.
    """
    app = ClientApp()
    processes: dict[tuple[str, str], SiteProcess] = {}

    def answer(message: Message, context: Context) -> Message:
        text, arrays = unpack(message.content)
        here = place(context)
        said = json.loads(text)
        if "bye" in said:
            SiteProcess(here.launch, here.key, here.keeper).end()
            shutil.rmtree(here.launch.folder)
        if "hello" in said or "bye" in said:
            return Message(pack(json.dumps({"site": here.site}), {}), reply_to=message)
        key = (str(here.launch.folder), here.key)
        if key not in processes:
            processes[key] = SiteProcess(here.launch, here.key, here.keeper)
        return Message(pack(*processes[key].run(here.site, text, arrays)), reply_to=message)

    for register in (app.train, app.evaluate, app.query):
        register()(answer)
    return app
