"""The published smoothing and damping of geometric rewards, each with adjustable strength.

From MedReasoner (Yan et al., 2025, arXiv:2508.08177); docs/rewards.md, "Smoothing" and "Damping".
"""

import math
from functools import cache

_LOG_4 = math.log(4.0)


def slog(value: float) -> float:
    """Increasing smoothing 0.9·ln(3v + 1)/ln 4 + 0.1: from 0.1 at 0 through 1 at 1, and above 1 beyond."""
    return 0.9 * math.log(3.0 * value + 1.0) / _LOG_4 + 0.1


def sexp(value: float, *, centre: float, steepness: float = 3.0) -> float:
    """Decreasing smoothing: the logistic 1/(1 + e^{k(v - c)}), min-max normalised over v in [0, 2], times 0.9
    plus 0.1. It falls from 1 at 0 to 0.1 at 2; `value` must lie in [0, 2]."""
    low, span = _range(centre, steepness)
    return 0.9 * (_logistic(value, centre, steepness) - low) / span + 0.1


def blend(raw: float, smoothed: float, strength: float) -> float:
    """Linear interpolation from the raw value (strength 0) to the smoothed one (strength 1, as published), exact at
    both ends."""
    return strength * smoothed + (1.0 - strength) * raw


def damp(reward: float, first: float, second: float, strength: float = 1.0) -> float:
    """r·(0.7 + 0.3·(v1 + v2)/2) for two validities in [0, 1], or less of that reduction with less strength. Clamped to
    [0, 1] and rounded to 4 places, as published."""
    # Two products and not one factor: so ties such as 0.08125 round the way the published scores do.
    damped = reward * 0.7 + reward * 0.3 * (first + second) / 2
    return round(max(0.0, min(1.0, blend(reward, damped, strength))), 4)


def _logistic(value: float, centre: float, steepness: float) -> float:
    return 1.0 / (1.0 + math.exp(steepness * (value - centre)))


@cache
def _range(centre: float, steepness: float) -> tuple[float, float]:
    low = _logistic(2.0, centre, steepness)
    return low, _logistic(0.0, centre, steepness) - low
