"""All reward terms by name, and the presets: named sets of weighted terms.

To add a term, write it in a module of this package and list it in `TERMS`; its options follow from its signature
(`rewards.options`), and whether masks are decoded for it from its decorator (`rewards.case.looks_at_masks`). A term
that stays outside this project needs neither: a configuration names it by import path (`rewards.user_terms`).
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rewards import box, format, mask, points, text
from rewards.case import Term
from rewards.user_terms import load_user_term
from umrg.mistake import Mistake

TERMS: Mapping[str, Term] = {
    "format_think": format.format_think,
    "format_seg": format.format_seg,
    "format_strict": format.format_strict,
    "format_json": format.format_json,
    "bbox_iou": box.bbox_iou,
    "bbox_align": box.bbox_align,
    "bbox_scale": box.bbox_scale,
    "bbox_iou_above": box.bbox_iou_above,
    "bbox_l1_below": box.bbox_l1_below,
    "bbox_position_valid": box.bbox_position_valid,
    "bbox_area_valid": box.bbox_area_valid,
    "points_dice": points.points_dice,
    "points_align": points.points_align,
    "points_angle": points.points_angle,
    "points_near": points.points_near,
    "points_position_valid": points.points_position_valid,
    "points_spread_valid": points.points_spread_valid,
    "mask_dice": mask.mask_dice,
    "mask_iou": mask.mask_iou,
    "boundary": mask.boundary,
    "answer_length": text.answer_length,
    "repetition": text.repetition,
}
"""Every term of this project, under its published name where it has one."""

MASK_TERMS: Mapping[str, Term] = {name: term for name, term in TERMS.items() if hasattr(term, "looks_at_masks")}
"""The terms for which the expert must run."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named set of terms."""

    weights: Mapping[str, float]
    """The weight of each term, by name."""
    published: bool = True
    """Whether completions are read and thresholds scaled as in the published code (`rewards.scoring.Scorer`)."""


_BASE = {
    "format_strict": 1.0,
    "format_json": 1.0,
    "bbox_iou_above": 1.0,
    "bbox_l1_below": 1.0,
    "points_near": 1.0,
}
_SOFT = {"format_think": 1.0, "format_seg": 1.0, "bbox_iou": 1.0, "points_dice": 1.0}
_HARD = {"bbox_align": 1.0, "bbox_scale": 1.0, "points_align": 1.0, "points_angle": 1.0}

PRESETS: Mapping[str, Preset] = {
    "base": Preset(weights=_BASE),
    "soft": Preset(weights=_SOFT),
    "hard": Preset(weights=_SOFT | _HARD),
    # The mask is the goal and weighs most. The box counts half as much; it gives a direction while the mask does not
    # overlap yet. Many pairs of points prompt the same mask equally well, and a format once learnt needs little reward
    # to persist, so these weigh least.
    "mask": Preset(
        weights={
            "format_think": 0.5,
            "format_seg": 0.5,
            "bbox_iou": 1.0,
            "points_dice": 0.5,
            "mask_dice": 2.0,
        },
        published=False,
    ),
}
"""`base`, `soft` and `hard` are the published presets, unweighted sums. `mask` is this project's own: format, box,
points and the expert's mask, 4.5 at most."""


def find_term(name: str) -> Term:
    """The term of that name, or at that import path (`my_pkg.my_module:my_term`).

    Raises ValueError, which suggests the closest name or says what is wrong with the path.
    """
    if ":" in name:
        return load_user_term(name)
    if name not in TERMS:
        raise Mistake(_unknown("reward term", name, TERMS))
    return TERMS[name]


def find_preset(name: str) -> Preset:
    """The preset of that name. Raises ValueError, which suggests the closest name."""
    if name not in PRESETS:
        raise Mistake(_unknown("reward preset", name, PRESETS))
    return PRESETS[name]


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return f"there is no {what} {name!r}; did you mean {nearest!r}? Known are {', '.join(known)}"
