"""What a runner can be told about privacy; imports nothing heavy."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from sfl.errors import ConfigError, check_rules
from sfl.privacy.example_config import ExampleConfig
from sfl.privacy.filters.config import FilterConfig
from sfl.privacy.secure_config import SecureConfig

__all__ = ["DpMechanism", "DpMode", "PrivacyConfig"]

DpMode = Literal["server", "client", "local"]
DpMechanism = Literal["gaussian", "banded-mf"]


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig(FilterConfig, ExampleConfig, SecureConfig):
    """Protections of a run: with filters (``FilterConfig``), of examples (``ExampleConfig``), and from the server
    (``SecureConfig``).

    Attributes:
        dp: Site-level differential privacy: clip each site's update, add Gaussian noise.
        dp_noise: Noise multiplier: standard deviation of the noise on the sum over the clip bound.
        dp_clip: Largest L2 norm of a site's update.
        dp_delta: The δ at which ε is reported.
        dp_mode: Who adds the noise: server (on the sum; the server is trusted), client (each site a share of it; the
            server is trusted with the shares, or, with secagg, sees their sum alone), or local (each site noises its
            own release; the server need not be trusted).
        dp_mechanism: gaussian (new noise in each round) or banded-mf (noise that cancels over the rounds; with
            sampling=turns).
        dp_bands: Rounds over which banded-mf noise cancels; by default as many as there are turns.
        dp_adaptive_clip: Let the clip bound follow a quantile of the sites' norms, privately; dp_clip is the first.
        dp_target_quantile: The share of sites that the adaptive bound should leave unclipped.
        dp_count_noise: Noise on the count of unclipped sites; by default a twentieth of a round's sites, or more.
        dp_shuffle: Count on a shuffler outside SFL that hides from the server who sent which update (dp_mode local).
        dp_target_epsilon: Find the noise with which all planned rounds cost at most this ε; in place of dp_noise.
        dp_max_epsilon: End the run before a round that would pass this ε.
        dp_accountant: pld (privacy-loss distributions) or prv (a second library, as a cross-check).
        per_layer_clip: Clip each array by itself, to dp_clip over the root of their number.
        dataset_id: Name of the data that the sites hold: private runs of the same name are counted together.
    """

    dp: bool = False
    dp_noise: float = 1.0
    dp_clip: float = 1.0
    dp_delta: float = 1e-5
    dp_mode: DpMode = "server"
    dp_mechanism: DpMechanism = "gaussian"
    dp_bands: int | None = None
    dp_adaptive_clip: bool = False
    dp_target_quantile: float = 0.5
    dp_count_noise: float | None = None
    dp_shuffle: bool = False
    dp_target_epsilon: float | None = None
    dp_max_epsilon: float | None = None
    dp_accountant: Literal["pld", "prv"] = "pld"
    per_layer_clip: bool = False
    dataset_id: str = ""

    def __post_init__(self) -> None:
        FilterConfig.__post_init__(self)
        ExampleConfig.__post_init__(self)
        SecureConfig.__post_init__(self)
        rules = (
            ("dp_noise", self.dp_noise, 0.0 <= self.dp_noise < math.inf, "finite and 0 or more"),
            ("dp_clip", self.dp_clip, 1e-9 <= self.dp_clip <= 1e9, "between 1e-9 and 1e9"),
            ("dp_delta", self.dp_delta, 1e-30 <= self.dp_delta < 1.0, "at least 1e-30 and below 1"),
            ("dp_mode", self.dp_mode, self.dp_mode in ("server", "client", "local"), "server, client or local"),
            (
                "dp_mechanism",
                self.dp_mechanism,
                self.dp_mechanism in ("gaussian", "banded-mf"),
                "gaussian or banded-mf",
            ),
            ("dp_bands", self.dp_bands, self.dp_bands is None or self.dp_bands >= 1, "at least 1"),
            ("dp_target_quantile", self.dp_target_quantile, 0.0 < self.dp_target_quantile < 1.0, "in (0, 1)"),
            ("dp_accountant", self.dp_accountant, self.dp_accountant in ("pld", "prv"), "pld or prv"),
            (
                "dataset_id",
                self.dataset_id,
                re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]{0,59})?", self.dataset_id) is not None,
                "at most 60 letters, digits, dots, dashes and underscores",
            ),
        )
        check_rules(rules)
        for name in ("dp_target_epsilon", "dp_max_epsilon", "dp_count_noise"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise ConfigError(f"{name} must be positive and finite, got {value}.")
        self._check_together()

    def _check_together(self) -> None:
        asked = [name for name in _WITH_DP if getattr(self, name) != getattr(PrivacyConfig, name)]
        if self.selects_privately:  # which has a budget, too
            asked = [name for name in asked if name not in ("dp_max_epsilon", "dp_delta")]
        if asked and not self.dp:
            raise ConfigError(f"{', '.join(asked)} must come with dp, got none. Add --dp.")
        if self.secagg and self.dp_mode == "client" and self.dp_accountant == "prv":
            raise ConfigError(
                "dp_accountant must be pld with secagg and dp_mode=client, got prv: it knows reals alone."
            )
        if self.dp_bands is not None and self.dp_mechanism != "banded-mf":
            raise ConfigError("dp_bands must come with dp_mechanism=banded-mf, got gaussian. Leave it out.")
        if self.dp_count_noise is not None and not self.dp_adaptive_clip:
            raise ConfigError("dp_count_noise must come with dp_adaptive_clip, got none. Add --dp-adaptive-clip.")
        if self.dp_target_quantile != PrivacyConfig.dp_target_quantile and not self.dp_adaptive_clip:
            raise ConfigError("dp_target_quantile must come with dp_adaptive_clip, got none. Add --dp-adaptive-clip.")
        self._check_modes()

    def _check_modes(self) -> None:
        if self.secagg and self.dp_mode == "client" and self.dp_accountant == "prv":
            raise ConfigError(
                "dp_accountant must be pld with secagg and dp_mode=client, got prv: it knows reals alone."
            )
        if self.dp_shuffle and self.dp_accountant == "prv":
            raise ConfigError("dp_accountant must be pld with dp_shuffle, whose events have a δ, got prv. Use pld.")
        if self.dp_shuffle and self.dp_mode != "local":
            raise ConfigError(
                f"dp_shuffle must come with dp_mode=local, got {self.dp_mode}: shuffling hides who sent which noisy "
                "update, and under the other modes no update is private by itself. Use --dp-mode local, or neither."
            )
        if self.dp_mechanism == "banded-mf" and (self.dp_mode != "server" or self.dp_adaptive_clip):
            raise ConfigError(
                "dp_mechanism=banded-mf must come with dp_mode=server and a fixed clip bound: its noise is that of the "
                "sum over all rounds. Leave --dp-adaptive-clip out."
            )
        if self.dp_adaptive_clip and self.dp_mode != "server":
            raise ConfigError(
                f"dp_adaptive_clip must come with dp_mode=server, got {self.dp_mode}: elsewhere a server that is not "
                "trusted would choose the bound, and see each site's count. Use --dp-mode server, or a fixed bound."
            )


_WITH_DP = (
    "dp_noise",
    "dp_clip",
    "dp_delta",
    "dp_mode",
    "dp_target_epsilon",
    "dp_max_epsilon",
    "per_layer_clip",
    "dp_mechanism",
    "dp_bands",
    "dp_adaptive_clip",
    "dp_count_noise",
    "dp_shuffle",
)
"""Options that say how: given without ``dp`` they would be taken for protection that is not there."""
