"""Which experiment trackers get a run's metrics."""

from pathlib import Path
from typing import Literal

from umrg.config import Config

TrackerName = Literal["wandb", "swanlab", "mlflow"]


class TrackingConfig(Config):
    """Settings of `trackers`. Whatever else a tracker needs, such as its key, it takes from its own environment
    variables and files."""

    project: str = "medreasoner"
    """Project at wandb and SwanLab, experiment at MLflow."""
    offline: bool = False
    """Write into the run folder's `trackers/`, and send nothing."""
    mlflow_uri: str | None = None
    """MLflow's tracking server; null for that of MLFLOW_TRACKING_URI."""
    python: Path | None = None
    """Interpreter of the environment in which the trackers are installed; null for the one that runs the job."""
