"""Clusters of several nodes on one machine: each node is `ray start` with processes of its own.

Not `ray.cluster_utils.Cluster`: it starts nodes from within the test's process, in which Ray's key-value store then is
that of a cluster that is soon gone. When Serve looks there in the tests' one cluster, Ray ends the process. Asking for
Ray's state by a cluster's address does the same; by its dashboard's it does not.
"""

import os
import shlex
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from ray.util.state import list_nodes
from ray.util.state.common import NodeState

from tests.runs import cluster_folder

NODE = "MEDREASONER_TEST_NODE"
SECONDS = 120
"""A node has so long to start, and to be known to the cluster."""
RAY = Path(sys.executable).parent / "ray"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Fence:
    """What a node lies behind that has a network and folders of its own."""

    ip: str
    folder: Path
    """Of its Ray session."""
    command: Sequence[str]
    """Runs what follows behind the fence."""


@contextmanager
def fences(count: int, hidden: Sequence[Path]) -> Iterator[tuple[str, list[Fence]]]:
    """The address of this machine for nodes behind fences, and the fences. Each has an interface and a shared memory of
    its own, and sees hidden folders empty. Skips the test where the user may not make them."""
    if (
        os.geteuid()
        or subprocess.run(["unshare", "--mount", "--net", "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("needs the right to make network and mount namespaces")
    name, made = uuid.uuid4().hex[:6], []
    net = f"10.213.{int(name, 16) % 254}"

    def run(*command: str) -> None:
        subprocess.run(command, check=True, capture_output=True)

    # Networks of namespaces are joined by a bridge, as machines are by a switch.
    run("ip", "link", "add", f"br-{name}", "type", "bridge")
    try:
        run("ip", "address", "add", f"{net}.1/24", "dev", f"br-{name}")
        run("ip", "link", "set", f"br-{name}", "up")
        with ExitStack() as stack:
            for i in range(count):
                space, outer, ip = f"{name}-{i}", f"v{name}-{i}", f"{net}.{i + 2}"
                run("ip", "netns", "add", space)
                stack.callback(run, "ip", "netns", "delete", space)
                run("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
                run("ip", "link", "set", outer, "master", f"br-{name}", "up")
                run("ip", "-netns", space, "address", "add", f"{ip}/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    run("ip", "-netns", space, "link", "set", device, "up")
                mounts = "; ".join(f"mount -t tmpfs none {shlex.quote(str(each))}" for each in (*hidden, "/dev/shm"))
                inner = ("unshare", "--mount", "sh", "-c", f'set -e; {mounts}; exec "$@"', "sh")
                made.append(Fence(ip, stack.enter_context(cluster_folder()), ("ip", "netns", "exec", space, *inner)))
            yield f"{net}.1", made
    finally:
        run("ip", "link", "delete", f"br-{name}")


@dataclass
class Node:
    """A node of a cluster. Whatever descends from it has its mark in the environment."""

    mark: str
    labels: Mapping[str, str] = field(default_factory=dict)
    id: str = ""

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(NODE) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def kill(self) -> None:
        """As when a machine loses its power: nothing is told or cleaned up."""
        deadline = time.monotonic() + 30
        while found := self.processes():  # those that were being started, too
            assert time.monotonic() < deadline, found
            for process in found:
                with suppress(psutil.Error):
                    process.kill()
            time.sleep(0.05)


@dataclass
class Nodes:
    """A cluster: its head, and the nodes that were added to it."""

    folders: ExitStack
    """Each node keeps its session in a folder of its own, as on a machine of its own: in a common one Ray would unpack
    what is sent to a node over what others are reading."""
    ip: str
    """Of the head, and of all nodes but fenced ones."""
    address: str
    dashboard: str
    members: list[Node] = field(default_factory=list)

    def add(
        self,
        cpus: float,
        gpus: float = 0,
        labels: Mapping[str, str] | None = None,
        fence: Fence | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Node:
        """Start a node, and wait until the cluster knows it. gpus: logical ones. fence: what it lies behind."""
        started = Node(uuid.uuid4().hex, labels or {})
        self.members.append(started)
        told = ",".join(f"{key}={value}" for key, value in {**started.labels, "test-node": started.mark}.items())
        _start(
            started,
            *(f"--address={self.address}", f"--num-cpus={cpus:g}", f"--num-gpus={gpus:g}", f"--labels={told}"),
            f"--node-ip-address={fence.ip if fence else self.ip}",
            f"--temp-dir={fence.folder if fence else self.folders.enter_context(cluster_folder())}",
            around=fence.command if fence else (),
            environment=environment or {},
        )
        deadline = time.monotonic() + SECONDS
        while not started.id:
            assert time.monotonic() < deadline, f"no node {started.mark} in {self.nodes()}"
            for node in self.nodes():
                if node.labels.get("test-node") == started.mark and node.state == "ALIVE":
                    started.id = node.node_id
            time.sleep(0.2)
        return started

    def nodes(self) -> list[NodeState]:
        found: list[NodeState] = list_nodes(address=self.dashboard, limit=1000)
        return found

    def of_kind(self, kind: str) -> list[Node]:
        """The nodes with a label `kind`."""
        return [node for node in self.members if node.labels.get("kind") == kind]

    def remove(self, node: Node) -> None:
        node.kill()
        self.members.remove(node)

    def close(self) -> None:
        for node in self.members:
            node.kill()


@contextmanager
def started_cluster(
    *arguments: str, ip: str = "127.0.0.1", port: int | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[Nodes]:
    """A cluster of a head, which has neither CPUs nor GPUs but by arguments of `ray start`."""
    with ExitStack() as folders:
        port, dashboard, folder = port or free_port(), free_port(), folders.enter_context(cluster_folder())
        head = Node(uuid.uuid4().hex)
        cluster = Nodes(folders, ip, f"{ip}:{port}", f"http://127.0.0.1:{dashboard}", [head])
        try:
            _start(
                head,
                *("--head", f"--port={port}", f"--dashboard-port={dashboard}", f"--node-ip-address={ip}"),
                *("--num-cpus=0", "--num-gpus=0", "--include-dashboard=true", f"--temp-dir={folder}"),
                *arguments,
                around=(),
                environment=environment or {},
            )
            yield cluster
        finally:
            cluster.close()


def _start(node: Node, *arguments: str, around: Sequence[str], environment: Mapping[str, str]) -> None:
    # The agent's usual port, that jobs are submitted to, is one a machine.
    done = subprocess.run(
        [*around, str(RAY), "start", *arguments, "--dashboard-agent-listen-port=0", "--disable-usage-stats"],
        env={**os.environ, NODE: node.mark, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout
