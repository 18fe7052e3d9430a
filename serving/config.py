"""What the service is started with."""

from pydantic import Field, PositiveFloat, PositiveInt

from actors.config import RolloutConfig, SegmenterConfig
from umrg.prompts import ReasonerConfig


class ServeConfig(ReasonerConfig):
    """expert: name or folder of the segmenter. rollout, segmenter: the engine and the expert, as in training.
    max_image_mib: largest image file that is taken. timeout: seconds that one request may last."""

    expert: str = "tiny"
    rollout: RolloutConfig = Field(default_factory=lambda: RolloutConfig(num_cpus=0.5))
    segmenter: SegmenterConfig = Field(default_factory=lambda: SegmenterConfig(num_cpus=0.1))
    max_image_mib: PositiveInt = 32
    timeout: PositiveFloat = 120.0
