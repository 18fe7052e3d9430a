"""The service's configuration."""

import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from actors.config import PoolConfig, RolloutConfig, SegmenterConfig
from serving.api import MOST_SAMPLES
from umrg.config import Config
from umrg.mistake import Mistake
from umrg.prompts import ReasonerConfig
from umrg.reasoner_folder import read_object


class Queue(Config):
    """How many requests a replica takes."""

    ongoing: PositiveInt
    """Requests that one replica works on at a time."""
    queued: PositiveInt
    """Requests that wait for a replica at each of its callers; what exceeds them is refused with 429."""


class IngressConfig(PoolConfig):
    """The replicas that speak HTTP."""

    decoders: PositiveInt = 1
    """Processes of each replica that decode images."""


class Limits(Config):
    """What a request may be, and how long it may last."""

    image_mib: PositiveInt = 32
    """Largest image file, in MiB."""
    image_megapixels: PositiveInt = 100
    """Largest image, in millions of pixels; read from its header, before it is decoded."""
    decode_seconds: PositiveFloat = 10.0
    """Longest time that the decoding of an image may take."""
    decode_mib: PositiveInt = 2048
    """Most memory of a process that decodes, in MiB."""
    query_characters: PositiveInt = 4000
    """Longest query."""
    chat_characters: PositiveInt = 16_000
    """Longest text of a chat's messages, which holds the instructions too."""
    samples: PositiveInt = Field(default=16, le=MOST_SAMPLES)
    """Most answers to one query."""
    request_seconds: PositiveFloat = 120.0
    """Longest time from a request's last byte to the answer."""
    upload_seconds: PositiveFloat = 30.0
    """Longest time that the sending of a request may take."""


class Key(Config):
    """A client's key, as the service knows it; `medreasoner key NAME` makes one."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    """Whose it is."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Digest of the key; the key itself is not kept anywhere."""
    per_minute: PositiveInt = 600
    """Requests that it may send in a minute."""
    concurrent: PositiveInt = 64
    """Requests that it may have under way."""


class ServeConfig(ReasonerConfig):
    """The service: the fields of a Serve application's `args`."""

    name: str | None = None
    """What clients call the model; null for the folder's name."""
    expert: str = "tiny"
    """Name of the expert, its folder or a converted file."""
    rollout: RolloutConfig = Field(default_factory=lambda: RolloutConfig(num_cpus=0.5))
    """The reasoner's replicas, each with an engine as in training. `temperature` is that of several samples, of which a
    request says how many; `n` is not read."""
    segmenter: SegmenterConfig = Field(default_factory=lambda: SegmenterConfig(num_cpus=0.1))
    """The expert's replicas, as in training."""
    ingress: IngressConfig = Field(default_factory=lambda: IngressConfig(num_cpus=0.1, actors=2))
    """The replicas that speak HTTP."""
    reasoner_queue: Queue = Queue(ongoing=48, queued=96)
    """Of each replica of the reasoner."""
    segmenter_queue: Queue = Queue(ongoing=64, queued=128)
    """Of each replica of the segmenter."""
    ingress_queue: Queue = Queue(ongoing=256, queued=256)
    """Of each replica that speaks HTTP."""
    limits: Limits = Limits()
    """What a request may be."""
    auth: Literal["off"] | None = None
    """`off` serves everybody who reaches the address; null asks for one of `keys`."""
    keys: tuple[Key, ...] = ()
    """The clients' keys."""
    keys_file: Path | None = None
    """A YAML file with more keys, read when the application is built."""

    @field_validator("auth", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # as YAML reads the word

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.auth == "off" and (self.keys or self.keys_file):
            raise Mistake("auth is off and there are keys; leave out one of both")
        return self

    @model_validator(mode="after")
    def _in_memory_alone(self) -> Self:
        if self.segmenter.embeddings.folder is not None:
            raise Mistake(
                "a service writes nothing of its clients' images to a disk; set segmenter.embeddings.folder to null"
            )
        return self

    @property
    def served_name(self) -> str:
        """What clients call the model: of a run's model the run's name."""
        folder = self.model.parent if self.model.name == "model" else self.model
        step = trained_steps(self.model) if folder.name.startswith("step-") else None
        return self.name or (folder.name if step is None else f"{folder.parents[1].name}-{folder.name}")


def trained_steps(model: Path) -> int:
    """The training step of a model folder that lies in a run or in a checkpoint of one, 0 for any other."""
    folder = model.parent if model.name == "model" else model
    if found := re.fullmatch(r"step-(\d+)", folder.name):
        return int(found[1])
    summary = folder / "summary.json"
    return int(read_object(summary).get("steps") or 0) if summary.is_file() else 0


def weights_written(model: Path) -> int:
    """When a model folder's weights were written last, in nanoseconds since 1970; 0 where there are none here."""
    return max((path.stat().st_mtime_ns for path in model.glob("*.safetensors")), default=0)
