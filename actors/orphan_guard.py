"""An engine's processes end with the actor that started them, also where it is killed and can say nothing to them.

vLLM's engine core does not notice that its parent is gone. The actor leaves its process id in the environment, which
all its descendants inherit; the engine's workers, the only ones that import code of ours, watch it.
"""

import os
import signal
import threading
import time

import psutil

_OWNER = "MEDREASONER_ENGINE_OWNER"
_SECONDS = 2.0


def own() -> None:
    """Called in the actor, before it starts an engine."""
    os.environ[_OWNER] = str(os.getpid())


def follow() -> None:
    """Called in a worker of the engine: once the actor is gone, end the engine core and this process."""
    owner = os.environ.get(_OWNER)
    if owner is not None and int(owner) != os.getpid():
        threading.Thread(target=_watch, args=(int(owner), os.getppid()), daemon=True, name="orphan-guard").start()


def _watch(owner: int, parent: int) -> None:
    actor = psutil.Process(owner) if psutil.pid_exists(owner) else None
    while actor is not None and actor.is_running():
        time.sleep(_SECONDS)
    if parent != owner and os.getppid() == parent:
        os.kill(parent, signal.SIGKILL)
    os._exit(1)
