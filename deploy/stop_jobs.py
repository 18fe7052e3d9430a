"""Stops the Ray jobs of this node's cluster and waits until they have ended: `python deploy/stop_jobs.py [SECONDS]`.

KubeRay ends pods without stopping the job that runs on them, when a RayJob is suspended, retried or past its deadline;
so this is the head's preStop hook. A driver that gets its SIGTERM says in its run's folder that it was interrupted,
and gives the folder free.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

ENDED = ("STOPPED", "SUCCEEDED", "FAILED")
PATIENCE_S = 130.0
"""More than RAY_JOB_STOP_WAIT_TIME_S of the manifests, and less than their terminationGracePeriodSeconds."""


def stop_jobs(client: Any, patience_s: float, sleep: Callable[[float], object] = time.sleep) -> list[str]:
    """Stop all jobs that have not ended, and wait for them. Returns the ids of those that did not end in time. client:
    a JobSubmissionClient."""
    left = [job.submission_id for job in client.list_jobs() if job.submission_id and job.status not in ENDED]
    for name in left:
        client.stop_job(name)
    deadline = time.monotonic() + patience_s
    while left and time.monotonic() < deadline:
        sleep(1.0)
        left = [name for name in left if client.get_job_status(name) not in ENDED]
    return left


if __name__ == "__main__":
    from ray.job_submission import JobSubmissionClient

    sys.exit(len(stop_jobs(JobSubmissionClient(), float(sys.argv[1]) if len(sys.argv) > 1 else PATIENCE_S)))
