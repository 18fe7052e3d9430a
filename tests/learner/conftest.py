"""A rank within the test process."""

import socket

import pytest


@pytest.fixture(scope="package")
def one_rank():
    """This process as the only rank of a process group; afterwards its environment is as it was."""
    with socket.socket() as probe, pytest.MonkeyPatch.context() as patch:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
        probe.close()
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "")  # put back when the context ends
        patch.setenv("DS_ACCELERATOR", "cpu")
        import deepspeed

        from learner.collectives import join

        join(0, 1, host="127.0.0.1", port=port, device="cpu", seconds=120)
        yield
        deepspeed.comm.destroy_process_group()
