"""Figures that a training script says while it runs, with the calls of TensorBoard's, MLflow's and W&B's writers.

All of them say figures on the site's log, as ``flare.log`` does; none talks to a server of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfl.client import api
from sfl.client.api import AnalyticsDataType
from sfl.client.session import Session

__all__ = ["MLflowWriter", "SummaryWriter", "WandBWriter"]


class _Writer:
    """A writer of one site.

    Args:
        ctx: What ``init`` returned; by default the site whose script makes the call.
    """

    def __init__(self, ctx: Session | None = None) -> None:
        self._ctx = ctx

    def _say(self, key: str, value: Any, kind: AnalyticsDataType, **beside: Any) -> None:
        given = {name: item for name, item in beside.items() if item is not None}
        api.log(key, value, kind, ctx=self._ctx, **given)


class SummaryWriter(_Writer):
    """The calls of a TensorBoard writer."""

    def add_scalar(self, tag: str, scalar: float, global_step: int | None = None, **beside: Any) -> None:
        """Say one figure."""
        self._say(tag, scalar, AnalyticsDataType.SCALAR, global_step=global_step, **beside)

    def add_scalars(
        self, tag: str, scalars: Mapping[str, float], global_step: int | None = None, **beside: Any
    ) -> None:
        """Say several figures under one tag."""
        for name, value in scalars.items():
            self.add_scalar(f"{tag}/{name}", value, global_step, **beside)

    def flush(self) -> None:
        """Nothing is held back."""


class WandBWriter(_Writer):
    """The calls of a W&B run."""

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Say several figures."""
        for name, value in metrics.items():
            self._say(name, value, AnalyticsDataType.METRIC, global_step=step)


class MLflowWriter(_Writer):
    """The calls of an MLflow run."""

    def log_param(self, key: str, value: Any) -> None:
        """Say one setting."""
        self._say(key, value, AnalyticsDataType.PARAMETER)

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Say several settings."""
        for key, value in values.items():
            self.log_param(key, value)

    def log_metric(self, key: str, value: float, step: int | None = None) -> None:
        """Say one figure."""
        self._say(key, value, AnalyticsDataType.METRIC, global_step=step)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Say several figures."""
        for key, value in metrics.items():
            self.log_metric(key, value, step)

    def log_text(self, text: str, artifact_file_path: str) -> None:
        """Say a text, under the name of the file that it would go to."""
        self._say(artifact_file_path, text, AnalyticsDataType.TEXT)

    def set_tag(self, key: str, tag: Any) -> None:
        """Say one tag."""
        self._say(key, tag, AnalyticsDataType.TAG)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Say several tags."""
        for key, tag in tags.items():
            self.set_tag(key, tag)
