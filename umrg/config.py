"""What every part of a run's configuration is: frozen, and without room for unknown keys. Imports no torch."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A part of a run's configuration. Each package keeps the part that it reads; `cluster.config` joins them."""

    model_config = ConfigDict(frozen=True, extra="forbid")
