"""An action to be taken first when the process is interrupted."""

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_ENDING = {signal.SIGINT, signal.SIGTERM}


@contextmanager
def first_of_all(act: Callable[[], object]) -> Iterator[None]:
    """Call `act` from a thread as soon as SIGINT or SIGTERM arrives: the main thread may be inside a call that blocks
    signals, and Ray installs handlers of its own while it starts. The signals' own handlers run as well."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, kernels = socket.socketpair()
    kernels.setblocking(False)
    before = signal.set_wakeup_fd(kernels.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_await, args=(ours, act), name="interruption", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        kernels.close()
        thread.join()
        ours.close()


def _await(signals: socket.socket, act: Callable[[], object]) -> None:
    while numbers := signals.recv(64):
        if _ENDING & set(numbers):
            act()
