"""What the service is started with."""

from pydantic import Field, PositiveFloat, PositiveInt

from actors.config import RolloutConfig, SegmenterConfig
from umrg.config import Config, ModelFolder
from umrg.prompts import PromptStyle


class ServeConfig(Config):
    """model: a Qwen-VL folder, or a run that holds one. expert: name or folder of the segmenter. prompt, think: asked
    otherwise than the folder's prompt.json says. rollout, segmenter: the engine and the expert, as in training.
    max_image_mib: largest image file that is taken. timeout: seconds that one request may last."""

    model: ModelFolder
    expert: str = "tiny"
    prompt: PromptStyle | None = None
    think: bool | None = None
    rollout: RolloutConfig = Field(default_factory=lambda: RolloutConfig(num_cpus=0.5))
    segmenter: SegmenterConfig = Field(default_factory=lambda: SegmenterConfig(num_cpus=0.1))
    max_image_mib: PositiveInt = 32
    timeout: PositiveFloat = 120.0
