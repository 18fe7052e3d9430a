"""An alarm where engine and learner drift apart, and an end to it."""

from collections.abc import Sequence
from statistics import median

FIRST, LAST, FACTOR, FLOOR = 10, 5, 5.0, 0.01
"""Steps that are compared, by how much the last exceed the first, and the least divergence that matters, in nats."""


class Drifted(RuntimeError):
    """The divergence of engine and learner is above the configured limit."""


def drifted(engine_kl: Sequence[float]) -> bool:
    """Whether KL(engine ‖ learner) has risen well above what it was at first. By medians, so that single steps decide
    nothing. engine_kl: of each step, in nats; the estimator k3."""
    if len(engine_kl) < FIRST + LAST:
        return False
    now = median(engine_kl[-LAST:])
    return now > FLOOR and now > FACTOR * median(engine_kl[:FIRST])


def beyond(engine_kl: Sequence[float], limit: float | None) -> bool:
    """Whether the divergence of the last steps is above a limit, in nats; None for no limit."""
    return limit is not None and len(engine_kl) >= LAST and median(engine_kl[-LAST:]) > limit


def alarm(engine_kl: Sequence[float]) -> str:
    """In words."""
    first, last = median(engine_kl[:FIRST]), median(engine_kl[-LAST:])
    return (
        f"learner/engine_kl is {last:.3g} nats and was {first:.3g}: engine and learner drift apart; set "
        "learner.objective.correction to token, lower learner.lr, or compare their precisions"
    )
