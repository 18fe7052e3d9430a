"""The anatomical and pathological structures that phantoms show, and the queries about them."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Structure:
    """A kind of target, with implicit queries, which hint at the structure and never name it."""

    name: str
    supercategory: str
    modalities: tuple[str, ...]
    """The modalities that show it."""
    reasons: tuple[str, ...]
    """Noun phrases for what the queries hint at; a reasoning trace adds the structure's name and position."""
    queries: tuple[str, ...]
    """The queries that the bundled tiny reasoner is trained on."""
    held_out_queries: tuple[str, ...]
    """Queries that are held out of that training."""
