"""Figures that a training script says while it runs, with the calls of a TensorBoard writer."""

from __future__ import annotations

from collections.abc import Mapping

from sfl.client import api


class SummaryWriter:
    """Says figures on the site's log, as ``flare.log`` does."""

    def add_scalar(self, tag: str, scalar: float, global_step: int | None = None) -> None:
        """Say one figure."""
        api.log(tag, scalar, api.AnalyticsDataType.SCALAR, global_step=global_step)

    def add_scalars(self, tag: str, scalars: Mapping[str, float], global_step: int | None = None) -> None:
        """Say several figures under one tag."""
        for name, value in scalars.items():
            self.add_scalar(f"{tag}/{name}", value, global_step)

    def flush(self) -> None:
        """Nothing is held back."""
