"""A connection to Ray that leaves the process's signals alone."""

import os
import signal
import threading

import ray

from actors.code import sent_code
from umrg.mistake import Mistake


def is_local() -> bool:
    """Whether the cluster is one that this process started for itself, and which will have no other nodes."""
    return bool(ray._private.worker._global_node.head)


def connect() -> bool:
    """Connect to the cluster named by RAY_ADDRESS or by a Ray job, or start a local one. Returns False if there was a
    connection before, which is not ours to end. Raises ValueError where RAY_ADDRESS leads to no cluster."""
    if ray.is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS")
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        with sent_code() as code:
            actor_logs = bool(os.environ.get("MEDREASONER_ACTOR_LOGS"))
            ray.init(logging_level="ERROR", log_to_driver=actor_logs, runtime_env=code)
    except SystemExit:
        # From the handler that Ray puts there while it starts.
        raise KeyboardInterrupt from None
    except (ConnectionError, ValueError) as error:  # Ray's for an address that is none
        if not address or isinstance(error, Mistake):
            raise
        said = str(error).strip().partition("\n")[0].rstrip(".")
        raise Mistake(
            f"RAY_ADDRESS={address} leads to no cluster ({said}); give its head's HOST:PORT, or auto on one of its "
            "nodes, or unset it, and a cluster is started for the run"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminate)
    return True
