"""A Ray cluster of several nodes, and an S3 server, on this machine without Docker.

    python infra/local_cluster.py --workers 2

starts them on loopback, prints what to set in another terminal, and ends exactly what it started on Ctrl-C. Token
authentication is on. Meant for trying out jobs, resume and node loss before there is a real cluster.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

SECONDS = 120
"""Longest wait for a cluster to answer."""


@dataclass(frozen=True)
class Ports:
    """Ports of the head. Ray keeps 10002 to 19999 for workers, so these lie elsewhere."""

    head: int = 6399
    dashboard: int = 8299
    agent: int = 52399
    """Of the head's agent; each further node takes the next one."""


@dataclass
class Node:
    """One Ray node: a process that was started here, and all that it starts."""

    process: subprocess.Popen[bytes]

    def family(self) -> list[psutil.Process]:
        """The process and its descendants, youngest last."""
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        return []

    def kill(self) -> None:
        """End it as a lost machine does: at once, without a word to the others."""
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """Ask it and all that it started to end, and end what is left after a while."""
        stop_all([self])


def stop_all(nodes: list[Node]) -> None:
    """End nodes at the same time: one after the other takes ten seconds each."""
    family = [process for node in nodes for process in node.family()]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(family, timeout=5)
    for process in [*family, *(process for node in nodes for process in node.family())]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    for node in nodes:
        node.process.wait()


class LocalCluster:
    """A head without processors of its own and some worker nodes, on loopback.

    Args:
        workers: Number of worker nodes.
        cpus: Logical processors of each worker node; may exceed the machine's.
        ports: Ports of the head.
        environment: What the nodes see beside this process's environment, storage credentials for example.
    """

    def __init__(
        self, workers: int = 2, cpus: int = 2, ports: Ports | None = None, environment: Mapping[str, str] | None = None
    ):
        self.ports = ports or Ports()
        self.address = f"http://127.0.0.1:{self.ports.dashboard}"
        self.folder = Path(tempfile.mkdtemp(prefix="fwc-"))
        self.token_file = self.folder / "token"
        self.token_file.touch(0o600)
        self.token_file.write_text(secrets.token_hex(32))
        self.nodes: list[Node] = []
        self._count, self._cpus, self._environment = workers, cpus, dict(environment or {})

    @property
    def client_environment(self) -> dict[str, str]:
        """What a program needs to submit jobs here."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_file)}

    def start(self) -> LocalCluster:
        """Start all nodes and wait until jobs can be submitted."""
        head = [f"--port={self.ports.head}", "--dashboard-host=127.0.0.1", f"--dashboard-port={self.ports.dashboard}"]
        self._start_node(["--head", *head, "--include-dashboard=true", "--num-cpus=0"])
        self._get("/api/version")
        for _ in range(self._count):
            self.add_worker()
            self._wait_for_nodes(len(self.nodes))  # one after the other is quicker where processors are few
        return self

    def add_worker(self) -> Node:
        """Start one more worker node."""
        return self._start_node([f"--address=127.0.0.1:{self.ports.head}", f"--num-cpus={self._cpus}"])

    def stop(self) -> None:
        """End every process that was started here, and remove its files."""
        stop_all(self.nodes)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start_node(self, options: list[str]) -> Node:
        ray = Path(sysconfig.get_path("scripts")) / "ray"
        common = [
            "--block",
            "--node-ip-address=127.0.0.1",
            "--disable-usage-stats",
            f"--object-store-memory={128 << 20}",
        ]
        number = len(self.nodes)
        # A folder each, as on machines of their own: a node removes the files of a job when it has no part in it.
        own = [f"--dashboard-agent-listen-port={self.ports.agent + number}", f"--temp-dir={self.folder}/{number}"]
        # The nodes must find this environment's python first, whatever the shell has.
        path = f"{ray.parent}{os.pathsep}{os.environ.get('PATH', '')}"
        environment = {**os.environ, "PATH": path, **self._environment, **self.client_environment}
        environment["RAY_raylet_start_wait_time_s"] = str(SECONDS)
        environment.pop("RAY_ADDRESS", None)
        with open(self.folder / f"node-{number}.log", "wb") as log:
            process = subprocess.Popen(
                [str(ray), "start", *options, *common, *own],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=environment,
                cwd=self.folder,
                start_new_session=True,
            )
        self.nodes.append(Node(process))
        return self.nodes[-1]

    def _get(self, path: str) -> bytes:
        """Return the answer of the job server to a GET, tried until it comes."""
        end = time.monotonic() + SECONDS
        request = urllib.request.Request(self.address + path)
        request.add_header("Authorization", f"Bearer {self.token_file.read_text()}")
        while True:
            try:
                with urllib.request.urlopen(request, timeout=5) as answer:
                    return answer.read()
            except (urllib.error.URLError, OSError) as error:
                self._check(end, f"nothing answers at {self.address}{path} ({error})")
            time.sleep(0.3)

    def _wait_for_nodes(self, count: int) -> None:
        end = time.monotonic() + SECONDS
        while self._get("/api/v0/nodes?detail=false").count(b'"ALIVE"') < count:
            self._check(end, f"fewer than {count} nodes have joined")
            time.sleep(0.3)

    def _check(self, end: float, what: str) -> None:
        """End everything if a node has ended by itself, or if it is too late."""
        ended = [node for node in self.nodes if node.process.poll() is not None]
        if ended or time.monotonic() > end:
            logs = "\n".join(file.read_text() for file in sorted(self.folder.glob("node-*.log")))
            self.stop()
            raise RuntimeError(f"the cluster did not start: {what}, {len(ended)} nodes ended.\n{logs}")

    def __enter__(self) -> LocalCluster:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


@contextlib.contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Start the S3 server that the tests use; gives the environment of its clients."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.s3server import S3Server

    folder = Path(tempfile.mkdtemp(prefix="fws3-"))
    try:
        with S3Server(folder) as server:
            yield server.environment
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Run until interrupted."""
    parser = argparse.ArgumentParser(description="A Ray cluster and an S3 server on this machine.")
    parser.add_argument("--workers", type=int, default=2, help="worker nodes (default 2)")
    parser.add_argument("--port", type=int, help="take ports from here on instead of 6399, 8299 and 52399")
    parser.add_argument("--cpus", type=int, default=2, help="logical processors of a worker node (default 2)")
    given = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):  # a shell lets what it starts in the background ignore the latter
        signal.signal(number, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), s3_server() as storage:
        ports = Ports(given.port, given.port + 1, given.port + 2) if given.port else Ports()
        with LocalCluster(given.workers, given.cpus, ports, storage) as cluster:
            exports = {**storage, **cluster.client_environment}
            lines = [f"export {name}={value}" for name, value in exports.items()]
            lines.append(
                f"fiberwalk submit configs/smoke.yaml --address {cluster.address} --storage s3://bucket/runs --wait"
            )
            lost = "".join(
                f"\nA worker node is lost with: kill -9 -- -{node.process.pid}" for node in cluster.nodes[1:]
            )
            sys.stdout.write("\n".join(["In another terminal:", *lines, f"{lost}\nCtrl-C ends it all.", ""]))
            sys.stdout.flush()
            signal.pause()


if __name__ == "__main__":
    main()
