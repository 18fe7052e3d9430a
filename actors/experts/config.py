"""Sizes of the experts built from segment-anything's parts, and where published weights come from."""

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError


class SamConfig(BaseModel):
    """Sizes of one Segment Anything model; the defaults are those shared by ViT-B, L and H.

    Lengths are input pixels for `image_side` and `patch`, tokens for `window`, channels for `*_dim`.
    `global_layers` are the encoder layers that attend to the whole image instead of a window.
    `multimask_outputs` is how many alternative masks the decoder offers beside its single one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder_dim: PositiveInt
    encoder_depth: PositiveInt
    encoder_heads: PositiveInt
    global_layers: tuple[NonNegativeInt, ...]
    image_side: PositiveInt = 1024
    patch: PositiveInt = 16
    window: PositiveInt = 14
    prompt_dim: PositiveInt = 256
    decoder_heads: PositiveInt = 8
    decoder_mlp_dim: PositiveInt = 2048
    multimask_outputs: NonNegativeInt = 3

    @property
    def grid(self) -> int:
        """Side of the embedding, in tokens."""
        return self.image_side // self.patch


VIT_B = SamConfig(encoder_dim=768, encoder_depth=12, encoder_heads=12, global_layers=(2, 5, 8, 11))
VIT_L = SamConfig(encoder_dim=1024, encoder_depth=24, encoder_heads=16, global_layers=(5, 11, 17, 23))
VIT_H = SamConfig(encoder_dim=1280, encoder_depth=32, encoder_heads=16, global_layers=(7, 15, 23, 31))


@dataclass(frozen=True, kw_only=True)
class PublishedExpert:
    """An expert whose weights are published elsewhere.

    checkpoint: name of the official file. source: where to get it.
    """

    config: SamConfig
    checkpoint: str
    source: str


_SAM_SOURCE = "https://dl.fbaipublicfiles.com/segment_anything/"

PUBLISHED_EXPERTS = {
    "sam_vit_b": PublishedExpert(config=VIT_B, checkpoint="sam_vit_b_01ec64.pth", source=_SAM_SOURCE),
    "sam_vit_l": PublishedExpert(config=VIT_L, checkpoint="sam_vit_l_0b3195.pth", source=_SAM_SOURCE),
    "sam_vit_h": PublishedExpert(config=VIT_H, checkpoint="sam_vit_h_4b8939.pth", source=_SAM_SOURCE),
    "medsam_vit_b": PublishedExpert(
        config=VIT_B, checkpoint="medsam_vit_b.pth", source="https://github.com/bowang-lab/MedSAM"
    ),
}


def read_config(path: Path) -> SamConfig:
    """Read a `config.json`. ValueError names the file and the first field that is wrong."""
    try:
        return SamConfig.model_validate_json(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent} is not an expert's folder: it has no {path.name}") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ValueError(f"{path}: {field}: {first['msg']}") from error


def config_json(config: SamConfig) -> str:
    """The text of a `config.json` that `read_config` reads back."""
    return json.dumps(config.model_dump(), indent=2) + "\n"
