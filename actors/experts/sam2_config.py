"""Sizes of the experts that are built as Segment Anything 2.1."""

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

Stages = tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt]


class Sam2Config(BaseModel):
    """Sizes of a SAM 2.1 image model, of a Hiera encoder (Ryali et al., 2023, arXiv:2306.00989) with a feature pyramid;
    the defaults are those that the published ones share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder_dim: PositiveInt
    """Channels of the first stage; each further one has twice as many, and twice as many heads."""
    encoder_heads: PositiveInt
    """Attention heads of the first stage."""
    blocks: Stages
    """Blocks of each stage."""
    global_layers: tuple[NonNegativeInt, ...]
    """The blocks, counted over all stages, that attend to the whole image instead of a window."""
    windows: Stages = (8, 4, 14, 7)
    """Side of an attention window in each stage, in tokens."""
    background: PositiveInt = 7
    """Side of the grid of position embeddings that is stretched over the image."""
    image_side: PositiveInt = 1024
    """Side of the square input, in pixels. The weights do not depend on it."""
    prompt_dim: PositiveInt = 256
    """Channels of the embedding, of prompts and of the decoder."""
    decoder_heads: PositiveInt = 8
    decoder_mlp_dim: PositiveInt = 2048

    @property
    def grid(self) -> int:
        """Side of the coarsest level of the embedding, in tokens."""
        return self.image_side // 16


# The sizes are those of sam2's configs/sam2.1/*.yaml.
HIERA_T = Sam2Config(encoder_dim=96, encoder_heads=1, blocks=(1, 2, 7, 2), global_layers=(5, 7, 9))
HIERA_S = Sam2Config(encoder_dim=96, encoder_heads=1, blocks=(1, 2, 11, 2), global_layers=(7, 10, 13))
HIERA_B = Sam2Config(encoder_dim=112, encoder_heads=2, blocks=(2, 3, 16, 3), global_layers=(12, 16, 20), background=14)
HIERA_L = Sam2Config(
    encoder_dim=144, encoder_heads=2, blocks=(2, 6, 36, 4), global_layers=(23, 33, 43), windows=(8, 4, 16, 8)
)
