"""Sizes of the experts that are built from segment-anything's modules."""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from umrg.mistake import Mistake


class SamConfig(BaseModel):
    """Sizes of a Segment Anything model; the defaults are those that ViT-B, ViT-L and ViT-H share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder_dim: PositiveInt
    encoder_depth: PositiveInt
    encoder_heads: PositiveInt
    global_layers: tuple[NonNegativeInt, ...]
    """The encoder layers that attend to the whole image instead of a window."""
    image_side: PositiveInt = 1024
    """Side of the square input, in pixels."""
    patch: PositiveInt = 16
    """Side of a patch, in pixels."""
    window: PositiveInt = 14
    """Side of an attention window, in tokens."""
    prompt_dim: PositiveInt = 256
    """Channels of the embedding, of prompts and of the decoder."""
    decoder_heads: PositiveInt = 8
    decoder_mlp_dim: PositiveInt = 2048
    multimask_outputs: NonNegativeInt = 3
    """How many alternative masks the decoder predicts beside its single one."""
    licence: str | None = None
    """Licence of the weights beside it; null where it is not stated."""

    @property
    def grid(self) -> int:
        """Side of the embedding, in tokens."""
        return self.image_side // self.patch


VIT_B = SamConfig(encoder_dim=768, encoder_depth=12, encoder_heads=12, global_layers=(2, 5, 8, 11))
VIT_L = SamConfig(encoder_dim=1024, encoder_depth=24, encoder_heads=16, global_layers=(5, 11, 17, 23))
VIT_H = SamConfig(encoder_dim=1280, encoder_depth=32, encoder_heads=16, global_layers=(7, 15, 23, 31))


def read_config(path: Path) -> SamConfig:
    """Read a `config.json`. Raises ValueError, naming the file and the first invalid field."""
    try:
        return SamConfig.model_validate_json(path.read_text())
    except FileNotFoundError as error:
        raise Mistake(f"{path.parent} is not an expert's folder: it has no {path.name}") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise Mistake(f"{path}: {field}: {first['msg']}") from error


def config_json(config: SamConfig) -> str:
    """The text of a `config.json` that `read_config` reads back."""
    return json.dumps(config.model_dump(exclude_none=True), indent=2) + "\n"
