"""Upper bounds as people read them: rounded, but never to less."""

from __future__ import annotations

import math

__all__ = ["upper"]


def upper(value: float, digits: int = 3) -> str:
    """An upper bound to so many digits, never below it (but for a part in 1e9, which is a float's own error).

    Example:
        >>> upper(4.3812), upper(8.0), upper(math.inf)
        ('4.39', '8', 'inf')
    """
    if not 0.0 < value < math.inf:
        return f"{value:g}"
    step = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    rounded = math.ceil(value / step - 1e-9) * step
    return f"{rounded if math.isfinite(rounded) else value:.{digits}g}"
