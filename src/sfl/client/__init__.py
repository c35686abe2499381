"""What runs on a site, and the Client API for training scripts: ``import sfl.client as flare``.

Importing this package is cheap. Names resolve on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sfl.client.api import AnalyticsDataType as AnalyticsDataType
    from sfl.client.api import clear as clear
    from sfl.client.api import get_config as get_config
    from sfl.client.api import get_job_id as get_job_id
    from sfl.client.api import get_site_name as get_site_name
    from sfl.client.api import get_task_name as get_task_name
    from sfl.client.api import init as init
    from sfl.client.api import is_evaluate as is_evaluate
    from sfl.client.api import is_running as is_running
    from sfl.client.api import is_submit_model as is_submit_model
    from sfl.client.api import is_train as is_train
    from sfl.client.api import log as log
    from sfl.client.api import receive as receive
    from sfl.client.api import send as send
    from sfl.client.api import shutdown as shutdown
    from sfl.client.api import system_info as system_info
    from sfl.client.decorators import evaluate as evaluate
    from sfl.client.decorators import train as train
    from sfl.types import FLModel as FLModel
    from sfl.types import ParamsType as ParamsType

__all__ = [
    "AnalyticsDataType",
    "FLModel",
    "ParamsType",
    "clear",
    "evaluate",
    "get_config",
    "get_job_id",
    "get_site_name",
    "get_task_name",
    "init",
    "is_evaluate",
    "is_running",
    "is_submit_model",
    "is_train",
    "log",
    "receive",
    "send",
    "shutdown",
    "system_info",
    "train",
]

_OTHER_HOMES = {
    "FLModel": "sfl.types",
    "ParamsType": "sfl.types",
    "evaluate": "sfl.client.decorators",
    "train": "sfl.client.decorators",
}


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(import_module(_OTHER_HOMES.get(name, "sfl.client.api")), name)
    raise AttributeError(f"module 'sfl.client' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
