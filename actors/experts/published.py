"""The experts whose weights are published elsewhere."""

from dataclasses import dataclass
from typing import Literal

from actors.experts.sam2_config import HIERA_B, HIERA_L, HIERA_S, HIERA_T, Sam2Config
from actors.experts.sam_config import VIT_B, VIT_H, VIT_L, SamConfig

Config = SamConfig | Sam2Config
FamilyName = Literal["sam", "sam_med2d", "sam2"]


@dataclass(frozen=True, kw_only=True)
class PublishedExpert:
    """An expert whose weights are published elsewhere."""

    family: FamilyName
    """How it is built and loaded (`actors.experts.registry.FAMILIES`)."""
    config: Config
    """Sizes of the model, and of its input with preprocessing `published`."""
    native: Config | None = None
    """The same with preprocessing `native`; None where there is no such."""
    checkpoint: str
    """Name of the official file."""
    source: str
    """Where to get that file."""
    licence: str
    """Licence of its weights."""
    sha256: str | None = None
    """What the digest of that file begins with; None where it is not known."""


_SAM = (("vit_b", VIT_B, "01ec64"), ("vit_l", VIT_L, "0b3195"), ("vit_h", VIT_H, "4b8939"))
_SAM2 = (
    ("t", "tiny", HIERA_T, "7402e0d8"),
    ("s", "small", HIERA_S, "6d1aa6f3"),
    ("b+", "base_plus", HIERA_B, "a2345aed"),
    ("l", "large", HIERA_L, "2647878d"),
)

PUBLISHED_EXPERTS = {
    **{
        f"sam_{size}": PublishedExpert(
            family="sam",
            config=config,
            checkpoint=f"sam_{size}_{sha256}.pth",
            source="https://dl.fbaipublicfiles.com/segment_anything/",
            licence="Apache-2.0 (Meta AI)",
            sha256=sha256,
        )
        for size, config, sha256 in _SAM
    },
    "medsam_vit_b": PublishedExpert(
        family="sam",
        config=VIT_B,
        native=VIT_B,
        checkpoint="medsam_vit_b.pth",
        source="https://github.com/bowang-lab/MedSAM",
        licence="Apache-2.0 (bowang-lab MedSAM)",
    ),
    "sam_med2d": PublishedExpert(
        family="sam_med2d",
        config=VIT_B.model_copy(update={"image_side": 256}),
        checkpoint="sam-med2d_b.pth",
        source="https://github.com/OpenGVLab/SAM-Med2D",
        licence="Apache-2.0 (OpenGVLab SAM-Med2D)",
    ),
    "medsam2": PublishedExpert(
        family="sam2",
        config=HIERA_T,
        native=HIERA_T.model_copy(update={"image_side": 512}),
        checkpoint="MedSAM2_latest.pt",
        source="https://huggingface.co/wanglab/MedSAM2",
        # That of the page with the weights; the code beside them is under Apache-2.0.
        licence="CC-BY-SA-4.0 (bowang-lab MedSAM2)",
    ),
    **{
        f"sam2.1_{size}": PublishedExpert(
            family="sam2",
            config=config,
            checkpoint=f"sam2.1_hiera_{word}.pt",
            source="https://dl.fbaipublicfiles.com/segment_anything_2/092824/",
            licence="Apache-2.0 (Meta AI)",
            sha256=sha256,
        )
        for size, word, config, sha256 in _SAM2
    },
}
