"""What is to be done first when somebody ends the process."""

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_ENDING = {signal.SIGINT, signal.SIGTERM}


@contextmanager
def first_of_all(act: Callable[[], object]) -> Iterator[None]:
    """`act` is called as soon as SIGINT or SIGTERM comes, by a thread: the main thread may be in the middle of a call
    that heeds no signals, and Ray has handlers of its own while it starts. What the signals do else they still do."""
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
