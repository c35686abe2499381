"""What protections may stand together, and on what federation. Each refusal says what to do."""

from __future__ import annotations

from collections.abc import Sequence

from sfl.core.mechanism import Mechanism
from sfl.core.transform import Transform, flat
from sfl.errors import CompositionError
from sfl.privacy.filters.compress import ErrorFeedback
from sfl.types import FederationConfig

__all__ = ["check_examples", "check_together"]


def check_together(mechanisms: Sequence[Mechanism], federation: FederationConfig) -> None:
    """Refuse what cannot keep its promise.

    Raises:
        CompositionError: Naming the parts that do not fit, and what to change.
    """
    if not mechanisms:
        return
    _check_order(mechanisms)
    _check_once(mechanisms, federation)
    if federation.weighting == "examples":
        raise CompositionError(
            "weighting must be equal under a mechanism, got examples: the weight of a site would tell the size of its "
            "data, and scale what it adds to the sum past the clip bound. Leave --weighting out."
        )
    central = any(mechanism.placement == "central" for mechanism in mechanisms)
    if central and federation.sampling == "fixed" and federation.fraction_fit < 1.0:
        raise CompositionError(
            f"fraction_fit must be 1 under central noise with fixed sampling, got {federation.fraction_fit}: a "
            "site less would change who else is drawn. Set sampling=poisson, or sampling=turns."
        )
    least = max(mechanism.least_sites for mechanism in mechanisms)
    if least > federation.min_available_clients or (least and federation.sampling == "poisson"):
        raise CompositionError(
            f"min_available_clients must be at least {least}, with sampling fixed or by turns, as the noise is shared "
            f"out among so many sites, got {federation.min_available_clients} and {federation.sampling}. Raise it."
        )


def check_examples(transforms: Sequence[Transform], federation: FederationConfig) -> None:
    """Refuse what would break the promise to a site's examples.

    Raises:
        CompositionError: Naming the part that does not fit, and what to change.
    """
    if federation.weighting == "examples":
        raise CompositionError(
            "weighting must be equal where sites' examples are private, got examples: the weight of a site would tell "
            "how many it has. Leave --weighting out."
        )
    if any(isinstance(transform, ErrorFeedback) for transform in flat(transforms)):
        raise CompositionError(
            "error feedback must not carry what examples have left from round to round where each round's sample of "
            "them is accounted by itself. Leave --compress-error-feedback out."
        )


def _check_order(mechanisms: Sequence[Mechanism]) -> None:
    """The last clip bounds what reaches the sum: noise of a site's own must come before it."""
    seen = ""
    for mechanism in mechanisms:
        if seen and not mechanism.on_sum:
            raise CompositionError(
                f"mechanisms must have those of a site's own noise first, got {type(mechanism).__name__} after {seen}: "
                "its noise would pass the clip bound of the sum. Swap them."
            )
        seen = seen or (type(mechanism).__name__ if mechanism.on_sum else "")


def _check_once(mechanisms: Sequence[Mechanism], federation: FederationConfig) -> None:
    """Two mechanisms that hide the same unit from the same adversary would be paid for twice."""
    seen: dict[tuple[str, str], str] = {}
    for mechanism in mechanisms:
        event = mechanism.event(federation.planned_sites, federation.num_clients)
        kind = (event.unit, event.adversary)
        if kind in seen:
            raise CompositionError(
                f"one mechanism must protect a {event.unit} against one adversary, got {seen[kind]} and "
                f"{event.mechanism}: the second would spend budget on what the first has hidden. Choose one."
            )
        seen[kind] = event.mechanism
