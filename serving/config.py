"""The service's configuration."""

from pydantic import Field, PositiveFloat, PositiveInt

from actors.config import RolloutConfig, SegmenterConfig
from umrg.prompts import ReasonerConfig


class ServeConfig(ReasonerConfig):
    """The service: the fields of a Serve application's `args`."""

    expert: str = "tiny"
    """Name or folder of the expert."""
    rollout: RolloutConfig = Field(default_factory=lambda: RolloutConfig(num_cpus=0.5))
    """The engine's replicas, as in training; n and temperature are not used: answers are greedy."""
    segmenter: SegmenterConfig = Field(default_factory=lambda: SegmenterConfig(num_cpus=0.1))
    """The expert's replicas, as in training."""
    max_image_mib: PositiveInt = 32
    """Largest image file that is accepted, in MiB."""
    timeout: PositiveFloat = 120.0
    """Seconds that one request may last."""
