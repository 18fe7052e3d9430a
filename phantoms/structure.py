"""What a phantom can show and how one may ask for it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Structure:
    """One kind of target.

    `queries` and `held_out_queries` are implicit: they hint at the structure and never name it. `reasons` are
    noun phrases for what the queries hint at, which a reasoning trace completes with the name and the place.
    """

    name: str
    supercategory: str
    modalities: tuple[str, ...]
    reasons: tuple[str, ...]
    queries: tuple[str, ...]
    held_out_queries: tuple[str, ...]
