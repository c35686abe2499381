"""The recipe of averaging under homomorphic encryption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from sfl.client.callbacks import TrimSiteMemory
from sfl.core.aggregator import Aggregator, WeightedMean
from sfl.core.secure import SecureSum
from sfl.errors import CompositionError, ConfigError
from sfl.privacy.he import CKKS
from sfl.recipe.averaging import FedAvgRecipe
from sfl.server.callbacks import TrimMemory

__all__ = ["FedAvgRecipeWithHE"]


@dataclass(frozen=True, kw_only=True)
class FedAvgRecipeWithHE(FedAvgRecipe):
    """Federated averaging whose server adds up ciphertexts: CKKS with keys that sites alone have.

    It takes the arguments of NVIDIA FLARE's recipe of this name, and runs in every environment: simulated sites make
    keys of their own, provisioned ones have them in their kits. Each site weighs its model before it encrypts it; the
    server keeps the global model as ciphertext, and sites decrypt it. ``RunResult.open`` does, with a site's key.

    Attributes:
        encrypt_layers: Which arrays are encrypted: all by default, those of a list of names, or those in whose name a
            regular expression is found.
        he_clip: Largest number that is encrypted; see ``CKKS.clip``.
        he_max_weight: Largest number of examples that a site counts with; 1 lets all sites count the same.
        he_holder: The one site that can decrypt; see ``CKKS.holder``.
        server_memory_gc_rounds: After each n-th round the server collects garbage and gives memory back; 0 never.
        client_memory_gc_rounds: So do sites; see ``TrimSiteMemory``.
        cuda_empty_cache: Whether sites empty torch's cache on a GPU after each round.

    Raises:
        ConfigError: If an argument is out of its range.
        CompositionError: If the aggregator is not the mean.
    """

    name: str = "fedavg_he"
    aggregator: Aggregator | None = None  # pyright: ignore[reportIncompatibleVariableOverride] - as its namesake
    encrypt_layers: Sequence[str] | str | None = None
    he_clip: float = 64.0
    he_max_weight: int = 65_536
    he_holder: str = ""
    server_memory_gc_rounds: int = 1
    client_memory_gc_rounds: int = 0
    cuda_empty_cache: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (
            ("min_clients", self.min_clients),
            ("num_rounds", self.num_rounds),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}.")
        for name, value in (
            ("server_memory_gc_rounds", self.server_memory_gc_rounds),
            ("client_memory_gc_rounds", self.client_memory_gc_rounds),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ConfigError(f"{name} must be a whole number of at least 0, got {value!r}.")
        if self.aggregator is None:
            object.__setattr__(self, "aggregator", WeightedMean())
        if not isinstance(self.aggregator, Aggregator):
            raise ConfigError(f"aggregator must be an Aggregator of sfl, got {type(self.aggregator).__name__}.")
        if self.secure not in (None, self.encryption()):  # which refuses what is out of range
            raise CompositionError("secure must be left to this recipe, got one. Use FedAvgRecipe(secure=...).")

    def encryption(self) -> SecureSum:
        """What it stands for."""
        layers: Any = self.encrypt_layers
        if layers is not None and not isinstance(layers, str):
            layers = tuple(layers) if isinstance(layers, Sequence) else layers
        return CKKS(layers=layers, clip=self.he_clip, max_weight=self.he_max_weight, holder=self.he_holder)

    def resolved(self) -> Self:
        """The same job, with what keeps updates from the server."""
        if self.secure is not None:
            return super().resolved()
        weighting = self.federation.weighting or ("examples" if self.he_max_weight > 1 else "")
        job = super().resolved()
        federation = replace(job.federation, weighting=weighting) if weighting else job.federation
        callbacks, site_callbacks = job.callbacks, job.site_callbacks
        if self.server_memory_gc_rounds:
            callbacks = (*callbacks, TrimMemory(self.server_memory_gc_rounds))
        if self.client_memory_gc_rounds or self.cuda_empty_cache:
            own = TrimSiteMemory(every=self.client_memory_gc_rounds, cuda=self.cuda_empty_cache)
            site_callbacks = (*site_callbacks, own)
        secure = self.encryption()
        return replace(job, secure=secure, federation=federation, callbacks=callbacks, site_callbacks=site_callbacks)
