"""A run as a Ray job: what is sent, and with which settings."""

import os
import shlex
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from actors.code import checkout, code, in_mib, pack, size_of
from cluster.config import (
    EvaluateConfig,
    LearningConfig,
    SftConfig,
    TrainConfig,
    config_text,
    load_config,
    schema_of,
)
from cluster.config_keys import flat
from cluster.jobs import STOP_WAIT, STOP_WAIT_S, Client, Metadata, Unreachable
from umrg.config import uri
from umrg.mistake import Mistake

NAMED_BYTES = 32 * 2**20
"""Largest file or folder that is sent because the configuration names it."""

_AGENT_S = 120.0
_OF_NODES = {
    "runs": "/a/folder/that/all/nodes/share",
    "cache": "/a/folder/of/each/node",
    "segmenter.embeddings.folder": "/a/folder/of/each/node",
    "tracking.python": "/an/interpreter/of/the/head/node",
}
"""Keys of paths that are the cluster's own, which are neither sent nor looked for here; and what to give them."""
_KINDS = {TrainConfig: "train", SftConfig: "sft", EvaluateConfig: "evaluate"}


@dataclass(frozen=True)
class Submission:
    """A job that could be submitted."""

    config: TrainConfig | SftConfig | EvaluateConfig
    """As the job will read it."""
    metadata: Metadata
    files: Mapping[str, Path | bytes]
    """What is sent, by its path in the job's working directory."""
    left_out: Sequence[str]
    """Entries of the checkout of which nothing is sent."""
    python: str = "python"
    """The interpreter, as the head node finds it."""

    @property
    def entrypoint(self) -> str:
        return f"exec {shlex.quote(self.python)} -m cluster.cli {self.metadata.kind} {shlex.quote(self.config_file)}"

    @property
    def config_file(self) -> str:
        return _config_file(self.config.name)

    def summary(self) -> str:
        """What is sent and what is not, in a line."""
        size = in_mib(sum(map(size_of, self.files.values())))
        without = f"; nothing of {', '.join(self.left_out)}" if self.left_out else ""
        return f"{len(self.files)} files, {size}{without}"


def prepare(path: Path, overrides: Sequence[str], *, python: str = "python") -> Submission:
    """A run of a configuration file as a job. `resume` is `auto` unless given. Raises ValueError for what cannot work
    on a cluster: relative paths of what is the nodes' own, files that are named but neither sent nor shared, a
    package too large."""
    schema = schema_of(path)
    config = load_config(schema, path, overrides)
    if isinstance(config, LearningConfig) and "resume" not in config.model_fields_set:
        config = config.model_copy(update={"resume": "auto"})
    for key, path in _relative(config):
        if key in _OF_NODES:
            raise Mistake(
                f"{key} is {path}, which would lie in Ray's cache on the cluster; give {key}={_OF_NODES[key]}"
            )
    root = checkout()
    files: dict[str, Path | bytes] = {} if root is None else {**code(root)}
    files |= modules_of(config)
    files |= named_files(config, files, Path.cwd())
    files[_config_file(config.name)] = config_text(config).encode()
    metadata = Metadata(
        kind=_KINDS[schema],
        name=config.name,
        folder=str(config.runs / config.name),
        config=str(path),
        overrides=list(overrides),
    )
    left_out = [] if root is None else _left_out(root, files)
    return Submission(config, metadata, files, left_out, python)


def _config_file(name: str) -> str:
    return f"submitted/{name}.yaml"


def _left_out(root: Path, files: Mapping[str, object]) -> list[str]:
    sent = {name.partition("/")[0] for name in files}
    return sorted({entry.name for entry in root.iterdir()} - sent)


def modules_of(config: TrainConfig | SftConfig | EvaluateConfig) -> dict[str, Path]:
    """The files of the user's own reward terms and of what these import, unless they come from installed packages."""
    terms = config.reward.terms if isinstance(config, TrainConfig) else []
    names = {term.name.partition(":")[0].partition(".")[0] for term in terms if ":" in term.name}
    # The terms were imported when the configuration was checked.
    return {name: file for module in names for name, file in _files_of(sys.modules[module]).items()}


def _files_of(module: ModuleType) -> dict[str, Path]:
    origin = Path(next(iter(module.__path__))) if hasattr(module, "__path__") else Path(str(module.__file__))
    if "site-packages" in origin.parts:
        return {}
    base = origin.parent
    beside = [path for name in sys.modules for path in (_file_of(base, name),) if path]
    return {path.relative_to(base).as_posix(): path for path in (*beside, *origin.rglob("*.py"))}


def _file_of(base: Path, module: str) -> Path | None:
    """The file of an imported module that lies beneath a folder by the module's whole name."""
    file = getattr(sys.modules[module], "__file__", None)
    stem = base.joinpath(*module.split("."))
    places = (stem.with_suffix(".py"), stem / "__init__.py")
    return next((place for place in places if str(place) == file), None)


def named_files(
    config: TrainConfig | SftConfig | EvaluateConfig, files: Mapping[str, object], here: Path
) -> dict[str, Path]:
    """The files and folders that the configuration names by relative paths, which on the cluster are looked for in what
    is sent. files: what is sent already. Raises ValueError for one that is not here, or too large to be sent."""
    found: dict[str, Path] = {}
    for key, path in relative_paths(config):
        source = here / path
        if ".." in path.parts or not source.exists():
            raise _unsent(key, path, "is not in the working directory")
        inner = [source] if source.is_file() else [each for each in source.rglob("*") if each.is_file()]
        size = sum(map(size_of, inner))
        if size > NAMED_BYTES:
            raise _unsent(key, path, f"has {in_mib(size)} and is not sent")
        found |= {each.relative_to(here).as_posix(): each for each in inner}
    return {name: file for name, file in found.items() if files.get(name) != file}


def relative_paths(config: TrainConfig | SftConfig | EvaluateConfig) -> list[tuple[str, Path]]:
    """Dotted keys and relative paths of a configuration, but for URIs and what is the nodes' own."""
    return [(key, path) for key, path in _relative(config) if key not in _OF_NODES and not uri(path)]


def _relative(config: TrainConfig | SftConfig | EvaluateConfig) -> list[tuple[str, Path]]:
    values = flat(config.model_dump())
    listed = {key: value if isinstance(value, list) else [value] for key, value in values.items()}
    paths = [(key, each) for key, each_of in listed.items() for each in each_of if isinstance(each, Path)]
    expert = str(values.get("expert", ""))
    # Elsewhere a text is never a path: a prompt's file is read when the configuration is.
    folders = [("expert", Path(expert))] if os.sep in expert else []
    return [(key, path) for key, path in paths + folders if not path.is_absolute()]


def _unsent(key: str, path: Path, why: str) -> Mistake:
    return Mistake(f"{key} is {path}, which {why}; give its full path on storage that all nodes share")


def submit(submission: Submission, client: Client, say: Callable[[str], None]) -> str:
    """Send a job to a cluster. Returns its ID. Raises ValueError where the package is larger than Ray accepts, or
    the cluster takes no job."""
    job = f"{submission.config.name}-{uuid.uuid4().hex[:6]}"
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "working_dir.zip"
        pack(submission.files, archive)
        environment = {"working_dir": str(archive), "env_vars": {STOP_WAIT: str(STOP_WAIT_S)}}
        send_job(client, submission.entrypoint, job, environment, submission.metadata.as_strings(), say)
    return job


def send_job(
    client: Client,
    entrypoint: str,
    job: str,
    runtime_env: dict[str, Any],
    metadata: dict[str, str],
    say: Callable[[str], None],
    *,
    patience: float = _AGENT_S,
) -> None:
    """Submit a job, once a cluster that has just begun can take one. Raises ValueError if that takes more than
    `patience` seconds."""
    deadline = time.monotonic() + patience
    waiting = False
    while True:
        try:
            client.submit_job(entrypoint=entrypoint, submission_id=job, runtime_env=runtime_env, metadata=metadata)
            return
        except Unreachable as error:
            if "No available agent" not in str(error):
                raise
            if time.monotonic() >= deadline:
                raise Unreachable(
                    f"the head node's agent took no job within {patience:.0f} s; see its dashboard_agent.log, and "
                    "submit again"
                ) from error
        if not waiting:
            say("waiting for the agent of the head node, which starts jobs")
            waiting = True
        time.sleep(2.0)
