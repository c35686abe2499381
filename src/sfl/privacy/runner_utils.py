"""From a runner's options to the mechanisms of a recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from sfl.core.mechanism import DpEvent, Mechanism
from sfl.core.secure import SecureSum
from sfl.core.transform import Transform
from sfl.errors import CompositionError
from sfl.privacy.accountant import Guarantee
from sfl.privacy.adaptive_clip import AdaptiveClip
from sfl.privacy.budget import PrivacyBudget
from sfl.privacy.config import PrivacyConfig
from sfl.privacy.correlated import BandedMechanism
from sfl.privacy.dp import GaussianMechanism, calibrate_noise_multiplier
from sfl.privacy.filters.assembly import filters, selection
from sfl.privacy.he import CKKS
from sfl.privacy.rules import check_together
from sfl.privacy.secagg.protocol import SecAgg
from sfl.privacy.shuffle import ShuffledGaussian
from sfl.privacy.skellam import SkellamMechanism
from sfl.types import FederationConfig

__all__ = ["Protections", "build_protections", "calibrated", "cost"]

_COUNT_SHARE = 20.0  # Andrew et al. 2021: the noise on the count is a twentieth of the cohort …
_COUNT_LEAST = 1.2  # … and at least so many times z, which makes the noise on the update a tenth larger at most


@dataclass(frozen=True, slots=True)
class Protections:
    """What a recipe is given.

    Attributes:
        mechanisms: In the order of the sites.
        budget: For the ledger; ``None`` without a mechanism.
        example_budget: What each example of a site may lose, if sites train by DP-SGD.
        secure: What keeps single updates from the server.
        transforms: Filters that an update passes before them.
        released: Filters that it passes after them.
    """

    mechanisms: tuple[Mechanism, ...] = ()
    budget: PrivacyBudget | None = None
    transforms: tuple[Transform, ...] = ()
    released: tuple[Transform, ...] = ()
    example_budget: PrivacyBudget | None = None
    secure: SecureSum | None = None


def build_protections(config: PrivacyConfig, federation: FederationConfig) -> Protections:
    """The protections that the options ask for.

    Raises:
        CompositionError: If they cannot keep what they promise with this federation.
    """
    transforms, released = filters(config)
    config = calibrated(config, federation)
    mechanisms = all_mechanisms(config, federation)
    if not mechanisms:
        return Protections((), None, transforms, released, example_budget(config), secure_sum(config))
    limit = math.inf if config.dp_max_epsilon is None else config.dp_max_epsilon
    budget = PrivacyBudget(
        delta=config.dp_delta, max_epsilon=limit, accountant=config.dp_accountant, dataset=config.dataset_id
    )
    return Protections(mechanisms, budget, transforms, released, example_budget(config), secure_sum(config))


def secure_sum(config: PrivacyConfig) -> SecureSum | None:
    """What keeps single updates from the server; ``None`` if nothing does."""
    if config.he:
        return CKKS(**config.he_terms)
    return SecAgg(**config.secagg_terms) if config.secagg else None


def example_budget(config: PrivacyConfig) -> PrivacyBudget | None:
    """What each example of a site may lose; ``None`` without DP-SGD."""
    if not config.dpsgd:
        return None
    limits = [limit for limit in (config.dpsgd_target_epsilon, config.dpsgd_max_epsilon) if limit is not None]
    return PrivacyBudget(
        delta=config.dpsgd_delta,
        max_epsilon=min(limits, default=math.inf),
        accountant=config.dp_accountant,
        dataset=config.dataset_id,
    )


def all_mechanisms(config: PrivacyConfig, federation: FederationConfig) -> tuple[Mechanism, ...]:
    """Those that the options ask for, in the order of the sites: a site's own noise comes before the sum's.

    Raises:
        CompositionError: If they cannot keep what they promise with this federation.
    """
    own = [mechanism] if (mechanism := selection(config)) is not None else []
    return (*own, site_mechanism(config, federation)) if config.dp else tuple(own)


def calibrated(config: PrivacyConfig, federation: FederationConfig) -> PrivacyConfig:
    """The same with ``dp_target_epsilon`` said as noise, and as a limit; unchanged without one."""
    if not config.dp or config.dp_target_epsilon is None:
        return config
    target = config.dp_target_epsilon

    def whole_run(noise: float) -> DpEvent:
        return _whole_run(replace(config, dp_noise=noise), federation)

    noise = calibrate_noise_multiplier(target, whole_run, delta=config.dp_delta, method=config.dp_accountant)
    limit = target if config.dp_max_epsilon is None else min(target, config.dp_max_epsilon)
    return replace(config, dp_noise=noise, dp_target_epsilon=None, dp_max_epsilon=limit)


def cost(config: PrivacyConfig, federation: FederationConfig) -> list[Guarantee]:
    """What all planned rounds cost together, with the noise that the options name.

    Raises:
        CompositionError: If a run would refuse them.
    """
    mechanisms = all_mechanisms(config, federation)
    check_together(mechanisms, federation)
    budget = PrivacyBudget(delta=config.dp_delta, accountant=config.dp_accountant)
    return budget.spent([_all_rounds(mechanism, federation) for mechanism in mechanisms])


def _whole_run(config: PrivacyConfig, federation: FederationConfig) -> DpEvent:
    return _all_rounds(site_mechanism(config, federation), federation)


def _all_rounds(mechanism: Mechanism, federation: FederationConfig) -> DpEvent:
    event = mechanism.event(federation.planned_sites, federation.num_clients)
    return replace(event, count=math.ceil(federation.num_rounds / federation.turns))


def site_mechanism(config: PrivacyConfig, federation: FederationConfig) -> Mechanism:
    """The mechanism of site-level privacy.

    Raises:
        CompositionError: If it cannot keep what it promises with this federation.
    """
    if config.dp_mode == "server":
        return _central(config, federation)
    if federation.sampling == "poisson":
        raise CompositionError(
            f"sampling must be fixed or by turns with dp_mode={config.dp_mode}: its adversary sees who takes part, or "
            "the noise is shared out among them, got poisson. Use sampling=fixed."
        )
    if config.secagg and config.dp_mode == "client":
        return SkellamMechanism(
            clip_norm=config.dp_clip,
            noise_multiplier=config.dp_noise,
            shares=federation.min_available_clients,
            per_layer=config.per_layer_clip,
        )
    plain = GaussianMechanism(
        clip_norm=config.dp_clip,
        noise_multiplier=config.dp_noise,
        where="local" if config.dp_mode == "local" else "distributed",
        per_layer=config.per_layer_clip,
        shares=federation.min_available_clients if config.dp_mode == "client" else 0,
    )
    if not config.dp_shuffle:
        return plain
    return ShuffledGaussian(
        local=plain,
        shuffled=federation.min_available_clients,
        delta=config.dp_delta / 2.0,
        rounds=math.ceil(federation.num_rounds / federation.turns),
    )


def _central(config: PrivacyConfig, federation: FederationConfig) -> Mechanism:
    poisson = federation.sampling == "poisson" and federation.fraction_fit < 1.0
    rate = federation.fraction_fit if poisson else 1.0
    if config.dp_mechanism == "banded-mf":
        if federation.turns == 1 or (config.dp_bands or 1) > federation.turns:
            raise CompositionError(
                "dp_mechanism=banded-mf must come with as many turns as bands, and at least two, got "
                f"{federation.turns} and dp_bands={config.dp_bands}. Set sampling=turns and a smaller fraction_fit."
            )
        return BandedMechanism(
            clip_norm=config.dp_clip,
            noise_multiplier=config.dp_noise,
            bands=config.dp_bands or federation.turns,
            per_layer=config.per_layer_clip,
        )
    if not config.dp_adaptive_clip:
        return GaussianMechanism(
            clip_norm=config.dp_clip,
            noise_multiplier=config.dp_noise,
            per_layer=config.per_layer_clip,
            sampling_rate=rate,
        )
    cohort = federation.planned_cohort
    count_noise = config.dp_count_noise or max(cohort / _COUNT_SHARE, _COUNT_LEAST * config.dp_noise)
    return AdaptiveClip(
        noise_multiplier=config.dp_noise,
        count_noise=count_noise,
        cohort=cohort,
        initial_clip=config.dp_clip,
        target_quantile=config.dp_target_quantile,
        sampling_rate=rate,
        per_layer=config.per_layer_clip,
    )
