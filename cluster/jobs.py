"""Jobs on a Ray cluster, as they are seen from outside: through its dashboard's address."""

import asyncio
import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError, RpcError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from ray.util.state import list_actors

from umrg.mistake import Mistake

STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""Variable that says how many seconds a job has between SIGTERM and SIGKILL. Its supervisor reads it, and has the
variables of the job's runtime environment."""
STOP_WAIT_S = 120

_REQUEST_S = 60.0
_UNREACHABLE_S = 60.0
_EXAMPLE = "the URL of its dashboard, such as http://127.0.0.1:8265"
_SILENCE_S = 30.0
_PREFIX = "medreasoner."
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")

for _module in ("dashboard_sdk", "job.sdk"):  # which tell each upload and each connection that is closed
    logging.getLogger(f"ray.dashboard.modules.{_module}").setLevel(logging.WARNING)


class Unreachable(Mistake):
    """No cluster answers at the address, or its dashboard fails to."""


class Client(JobSubmissionClient):
    """Ray's client, with a deadline for each request and a sentence for what a user can mend. Its methods raise
    ValueError where no cluster is reached, where it knows no such job, or where the token is missing or wrong."""

    def __init__(self, address: str | None = None) -> None:
        if address is not None:
            # Ray prefers the environment to what it is given.
            os.environ[_ADDRESSES[0]] = address
        elif not any(map(os.environ.get, _ADDRESSES)):
            # Ray would take any cluster that it finds among this machine's processes.
            raise Mistake(f"say which cluster: give --address, {_EXAMPLE}, or set RAY_API_SERVER_ADDRESS to it")
        try:
            super().__init__(address)
        except AuthenticationError as error:
            raise _about_token(error, address) from None
        except (OSError, RpcError, RuntimeError, ValueError, LookupError, TypeError) as error:
            # The last two are from answers of something else than a dashboard.
            if isinstance(error, Mistake):
                raise
            raise Unreachable(f"no cluster is reached ({_first_line(error)}); give --address, {_EXAMPLE}") from error

    def _do_request(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._do_request(*args, **{"timeout": _REQUEST_S, **kwargs})
        except AuthenticationError as error:
            raise _about_token(error, self._address) from None
        except OSError as error:  # the base of all that `requests` raises
            raise Unreachable(
                f"no dashboard of Ray answers at {self._address} ({type(error).__name__}); check --address, and that "
                "the port can be reached from here"
            ) from None

    def _raise_error(self, r: requests.Response) -> None:
        last = r.text.strip().rpartition("\n")[2]
        said = f"{self._address} answers {r.status_code} ({r.reason if last.startswith('<') else last})"
        if r.status_code == HTTPStatus.NOT_FOUND:
            raise Mistake(f"{said}; check the job's name, and --address")
        if r.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise Unreachable(f"{said}; try again, or look at the logs of the head node")
        super()._raise_error(r)


def _about_token(error: AuthenticationError, address: str | None) -> Mistake:
    where = f"the cluster at {address}" if address else "the cluster"
    return Mistake(
        f"{where} did not accept this process's token ({_first_line(error)}); set RAY_AUTH_MODE=token, and give the "
        "cluster's token in RAY_AUTH_TOKEN, in the file that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


@dataclass(frozen=True)
class Metadata:
    """What a job that was submitted by `medreasoner submit` carries."""

    kind: str
    """train, sft or evaluate."""
    name: str
    """Of the run."""
    folder: str
    """Of the run, on the cluster."""
    config: str
    """The configuration file, where it was submitted."""
    overrides: Sequence[str]
    """What was laid over it."""

    def as_strings(self) -> dict[str, str]:
        """As Ray keeps it with the job."""
        return {f"{_PREFIX}{key}": json.dumps(value) for key, value in vars(self).items()}

    @classmethod
    def of(cls, job: JobDetails) -> "Metadata | None":
        """None for a job that was submitted in another way, or by a version that told less."""
        given = job.metadata or {}
        keys = {field.name: f"{_PREFIX}{field.name}" for field in fields(cls)}
        if not given.keys() >= set(keys.values()):
            return None
        return cls(**{name: json.loads(given[key]) for name, key in keys.items()})


def our_jobs(client: Client) -> list[tuple[JobDetails, Metadata]]:
    """The jobs that `medreasoner submit` submitted, the newest first."""
    jobs = [(job, metadata) for job in client.list_jobs() if (metadata := Metadata.of(job))]
    return sorted(jobs, key=lambda pair: pair[0].start_time or 0, reverse=True)


def find_job(client: Client, name: str | None) -> JobDetails:
    """A job by its ID, or the newest of a run's name or, without either, the newest of all. Raises ValueError."""
    if name is not None:
        for job in client.list_jobs():
            if job.submission_id == name:
                return job
    ours = our_jobs(client)
    for job, metadata in ours:
        if name in (None, metadata.name):
            return job
    known = ", ".join(sorted({metadata.name for _, metadata in ours})) or "none"
    raise Mistake(f"no job has {name or 'been submitted'}; the runs that were submitted there are: {known}")


def times(job: JobDetails) -> str:
    """Since when a job runs, or from when to when it ran, in this machine's time."""
    stamps = [datetime.fromtimestamp(ms / 1000) for ms in (job.start_time, job.end_time) if ms]
    return " – ".join(f"{stamp:%Y-%m-%d %H:%M}" for stamp in stamps)


def ended_because(job: JobDetails) -> str:
    """Why a job did not succeed, in a line. What its process printed last is left out, as its log has it."""
    message = (job.message or "Ray gave no reason").strip()
    return message.partition(", last available logs")[0].partition("\n")[0]


class Following:
    """A job's log, passed on while it grows. show: gets each new piece of text."""

    def __init__(self, client: Client, job: str, show: Callable[[str], None]) -> None:
        self._client, self._job, self._show = client, job, show
        self._shown = 0

    def until_end(self) -> JobStatus:
        """Show the log until the job has ended. A connection that breaks is made again. Raises ValueError if no cluster
        answers for a minute, or it does not know the job."""
        deadline = time.monotonic() + _UNREACHABLE_S
        while True:
            try:
                whole = asyncio.run(self._tail())
                status = self._client.get_job_status(self._job)
                if not whole:
                    self._add(self._client.get_job_logs(self._job), 0)
            except Unreachable:
                if time.monotonic() > deadline:
                    raise
            else:
                if status.is_terminal():
                    return status
                deadline = time.monotonic() + _UNREACHABLE_S
            time.sleep(1.0)

    async def _tail(self) -> bool:
        """Show what is new, as long as the connection lasts. Returns whether the log was shown to its end."""
        chunks = self._client.tail_job_logs(self._job)
        position = 0
        try:
            while True:
                chunk = asyncio.ensure_future(anext(chunks))
                while not (await asyncio.wait({chunk}, timeout=_SILENCE_S))[0]:
                    # A connection may be dead without a sign of it.
                    if (await asyncio.to_thread(self._client.get_job_status, self._job)).is_terminal():
                        chunk.cancel()
                        return False
                position = self._add(chunk.result(), position)
        except StopAsyncIteration:
            return True
        except (aiohttp.ClientError, RuntimeError, OSError):
            return False

    def _add(self, text: str, position: int) -> int:
        """Show what is new of a text that begins at a position of the log. Returns the position of its end."""
        end = position + len(text)
        if end > self._shown:
            self._show(text[max(0, self._shown - position) :])
            self._shown = end
        return end


def stop_wait(job: JobDetails) -> float | None:
    """Seconds that a job has between SIGTERM and SIGKILL; None where its submission does not say."""
    given = ((job.runtime_env or {}).get("env_vars") or {}).get(STOP_WAIT)
    try:
        seconds = float(given or math.nan)
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) else None


def stop(client: Client, job: JobDetails, say: Callable[[str], None], *, margin: float = 60.0) -> list[str]:
    """End a job, and wait until it has ended and its actors are gone. Returns what is left of it.

    margin: seconds to wait beyond what the job has for its end. Raises TimeoutError if it has not ended by then.
    """
    name, seconds = job.submission_id, stop_wait(job)
    if not job.status.is_terminal():
        client.stop_job(name)
        say(f"asked {name} to end" + ("" if seconds is None else f"; it has {seconds:g} s to do so"))
    patience = margin + (STOP_WAIT_S if seconds is None else seconds)
    deadline = time.monotonic() + patience
    while not (status := client.get_job_status(name)).is_terminal():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{name} did not end within {patience:.0f} s; it is {status.value}")
        time.sleep(0.5)
    say(f"{name} has ended: {status.value}")
    deadline = time.monotonic() + margin
    while (left := living_actors(client, name)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left


def living_actors(client: Client, job: str) -> list[str]:
    """The actors that a job has on the cluster, by class, process and node."""
    driver = client.get_job_info(job).job_id
    if driver is None:  # it never came so far as to connect
        return []
    found = list_actors(
        address=client.get_address(),
        filters=[("job_id", "=", driver), ("state", "!=", "DEAD")],
        limit=1000,
        timeout=int(_REQUEST_S),
    )
    return [f"{actor.class_name} (process {actor.pid}, node {str(actor.node_id)[:8]})" for actor in found]


def run_folder(job: JobDetails) -> Path | None:
    """The folder of a job's run, on the cluster; None for a job that was submitted in another way."""
    metadata = Metadata.of(job)
    return Path(metadata.folder) if metadata else None
