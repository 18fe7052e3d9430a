"""How a run stands, read from its folder and its lease. Nothing is left there, and its driver notices nothing."""

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.config import SftConfig, TrainConfig, schema_of
from cluster.lease import SILENCE, Holder, Machine, holder_of, lease_path
from cluster.records import whole_rows
from cluster.run_folder import RunFolder, Status, kept_values
from umrg.mistake import Mistake

RECORDS = ("metrics.jsonl", "results.jsonl", "evaluations.json")
"""The files that grow while a run goes on."""

Kind = Literal["train", "sft", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What a run is, what it has done, and whether somebody is at it."""

    kind: Kind
    status: Status
    """By its summary."""
    done: int
    """Steps taken, or rows answered."""
    total: int | None
    """Steps or rows in all; None if that is not known."""
    recorded: float | None
    """When the newest record was written, in seconds since the epoch by the storage's clock; None without any."""
    holder: Holder | None
    """Of the run's lease; None where nobody holds it."""
    gone: bool | None
    """Whether the holder has ended; None if it is on another machine, or nobody holds the lease."""
    silent_since: float | None = None
    """The last heartbeat of a holder that cannot be looked at, if it is so old that the holder has probably ended; in
    seconds since the epoch by the storage's clock."""
    error: str = ""
    """That ended the run, if it failed."""

    @property
    def progress(self) -> str:
        """`after step 12 of 100`, or `after 40 of 128 rows`."""
        total = "" if self.total is None else f" of {self.total:,}"
        if self.kind == "evaluate":
            return f"after {self.done:,}{total} rows"
        return f"after step {self.done:,}{total}" if self.done else f"before the first step{total}"

    def __str__(self) -> str:
        """In a sentence, without a full stop."""
        when = "" if self.recorded is None else f", recorded at {clock(self.recorded)}"
        if self.status == "failed":
            return f"failed {self.progress}{when}: {self.error}"
        if self.status != "running":
            return f"{self.status} {self.progress}{when}"
        if self.holder is None:
            return f"no longer running, or copied while it was, {self.progress}{when}"
        if self.gone:
            return f"killed {self.progress}{when} (it was {self.holder})"
        if self.silent_since is not None:
            silent = f"no heartbeat since {clock(self.silent_since)}, the run is probably dead"
            return f"{silent}, {self.progress}{when} ({self.holder})"
        return f"running, {self.progress}{when} ({self.holder})"


def standing(run: RunFolder) -> Standing:
    """How a run stands. Raises ValueError where the folder is no run's."""
    values, summary = kept_values(run.path), run.read_json("summary.json") or {}
    kind = kind_of(run)
    if kind == "evaluate":
        done, total = len(whole_rows(run.path / "results.jsonl", n=values.get("n", 0))), _rows(summary)
    else:
        done, total = max((line["step"] for line in run.metrics()), default=0), values.get("steps")
    files = [file for name in RECORDS if (file := run.path / name).exists()]
    holder = holder_of(lease_path(run.path))
    gone = Machine().gone(holder.process) if holder and holder.process else None
    return Standing(
        kind=kind,
        status=run.status(),
        done=done,
        total=total,
        recorded=max((file.stat().st_mtime for file in files), default=None),
        holder=holder,
        gone=gone,
        silent_since=_silent_since(lease_path(run.path)) if holder and gone is None else None,
        error=str(summary.get("error", "")),
    )


def kind_of(run: RunFolder) -> Kind:
    """What made a run's folder."""
    schema = schema_of(run.path / "config.yaml")
    return "train" if schema is TrainConfig else "sft" if schema is SftConfig else "evaluate"


def refuse_empty(run: RunFolder, found: Standing) -> None:
    """Raise ValueError where a run has recorded nothing yet."""
    if found.recorded is None:
        raise Mistake(f"{run.path} has recorded nothing yet; it is {found}")


def _silent_since(lease: Path) -> float | None:
    """When a lease was last written to, if that is longer ago than `SILENCE`."""
    # A driver that succeeded another may still have the lease under its claim's name.
    files = [lease, *lease.parent.glob(f"{lease.name}.after-*")]
    beat = max((file.stat().st_mtime for file in files if file.exists()), default=None)
    return beat if beat is not None and beat < _storage_clock(lease.parent) - SILENCE else None


def _storage_clock(folder: Path) -> float:
    """The time of the machine that keeps a folder, or this one's where nothing can be written there."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


def _rows(summary: dict[str, dict[str, int]]) -> int | None:
    return summary.get("prompts", {}).get("rows")


def clock(seconds: float) -> str:
    """A time since the epoch, for messages."""
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds))
