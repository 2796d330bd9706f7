"""Jobs on a cluster of three nodes with a real S3 server: sent over HTTP, losing a node, sent again."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.local_cluster import LocalCluster, Ports
from pipeline.config import load_config
from pipeline.errors import InputError
from pipeline.storage import Storage
from pipeline.store import SampleStore
from tests.runs import walked
from tests.s3server import KEY, SECRET, S3Server, free_ports

SMOKE = str(Path(__file__).parents[1] / "configs" / "smoke.yaml")
# Many short shards, so that a node is lost in the middle of some of them; then two Ray Train workers on what is left.
LONGER = [
    "name=submitted", "walk.walks=96", "walk.walks_per_shard=8", "walk.steps=400", "walk.record_every=100",
    "deformation.steps=40",
]  # fmt: skip


@pytest.fixture(scope="module")
def cluster(s3_server: S3Server) -> Iterator[LocalCluster]:
    head, dashboard, agent = free_ports(3)
    quick = {"RAY_health_check_period_ms": "500"}  # a lost node is noticed after five looks, 3 s apart by default
    with LocalCluster(2, 2, Ports(head, dashboard, agent), s3_server.environment | quick) as started:
        yield started


def client(cluster: LocalCluster, server: S3Server, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A `fiberwalk` of somebody who may use the cluster; Ray keeps tokens a process, so it gets one of its own."""
    variables = {**os.environ, **server.environment, **cluster.client_environment, **environment}
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    return subprocess.Popen(command, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def submit_command(cluster: LocalCluster, storage: str) -> list[str]:
    sets = [part for item in LONGER for part in ("--set", item)]
    return ["submit", SMOKE, "--address", cluster.address, "--storage", storage, "--wait", *sets]


def committed(uri: str) -> int:
    """Blocks in a store, 0 before it is planned."""
    storage = Storage.open(uri)
    return len(storage.list("walks", ".parquet")) if storage.exists("plan.json") else 0


def leaks(data: bytes) -> bool:
    return SECRET.encode() in data or KEY.encode() in data


@pytest.mark.cluster
@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.timeout(900)
def test_a_job_that_loses_a_node_ends_with_the_serial_store_and_a_second_one_finds_nothing_to_do(
    cluster: LocalCluster, s3: S3Server, tmp_path: Path
) -> None:
    storage = f"s3://{s3.bucket}/submitted"
    config = load_config(SMOKE, LONGER)
    uri = f"{storage}/{config.run_id}"
    job = client(cluster, s3, *submit_command(cluster, storage))
    end = time.monotonic() + 240
    while committed(uri) < 2:
        assert job.poll() is None and time.monotonic() < end, job.communicate()[0]
        time.sleep(0.1)
    cluster.nodes[1].kill()
    before = committed(uri)
    log, _ = job.communicate(timeout=300)
    assert job.returncode == 0, log
    store = SampleStore.open(uri)
    blocks = len(store.plan.shards()) * store.plan.blocks_per_shard
    assert before < blocks == committed(uri)

    reference = walked(load_config(SMOKE, [*LONGER, f"storage={json.dumps(str(tmp_path))}"]))
    assert store.digest() == SampleStore.open(reference.uri).digest()
    assert {entry.path for entry in store.storage.list()} >= {"evaluation.json", "report.html"}
    assert store.storage.read_json("deformation/deformation.json")["workers"] == 2

    again = client(cluster, s3, *submit_command(cluster, storage))
    log, _ = again.communicate(timeout=240)
    assert again.returncode == 0 and "nothing to do" in log, log

    names = [entry.path for entry in Storage.open(storage).list()]
    assert not [name for name in names if leaks(Storage.open(storage).read(name))]
    files = [path for path in cluster.folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 20
    assert not [str(path) for path in files if leaks(path.read_bytes())]
    assert not leaks(log.encode())


@pytest.mark.cluster
@pytest.mark.ray
@pytest.mark.s3
def test_the_exit_status_of_a_job_is_that_of_the_run(cluster: LocalCluster, s3: S3Server) -> None:
    wrong = ["--set", "walk.walks=16", "--set", "data.source=sklearn:nothing"]
    command = ["submit", SMOKE, "--address", cluster.address, "--storage", f"s3://{s3.bucket}/wrong", "--wait", *wrong]
    job = client(cluster, s3, *command)
    log, _ = job.communicate(timeout=240)
    assert job.returncode == 2 and "sklearn:nothing" in log, log


@pytest.mark.cluster
@pytest.mark.ray
@pytest.mark.s3
def test_strangers_are_refused(cluster: LocalCluster, s3: S3Server, tmp_path: Path) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{cluster.address}/api/jobs/", timeout=10)
    assert refused.value.code in (401, 403)
    token = tmp_path / "token"
    token.write_text("0" * 64)
    stranger = client(cluster, s3, *submit_command(cluster, f"s3://{s3.bucket}/x"), RAY_AUTH_TOKEN_PATH=str(token))
    log, _ = stranger.communicate(timeout=60)
    assert stranger.returncode == 2 and "asks for a token" in log and log.count("\n") == 1, log


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:9", "no Ray cluster answers at http://127.0.0.1:9"),
        ("127.0.0.1:8265", "--address must be http://HOST:8265"),
        ("http://user:pass@127.0.0.1:8265", "must not hold credentials"),
    ],
)
def test_a_wrong_address_is_one_line(address: str, message: str, tmp_path: Path) -> None:
    from workers.jobs import submit

    with pytest.raises(InputError) as caught:
        submit(SMOKE, address, storage=str(tmp_path))
    assert message in str(caught.value) and "\n" not in str(caught.value) and "pass@" not in str(caught.value)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a user's module, what it imports, data, and things that stay at home."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("import numpy\nimport helper.deep\nfrom json import dumps\n")
    (tmp_path / "helper").mkdir()
    (tmp_path / "helper" / "__init__.py").write_text("")
    (tmp_path / "helper" / "deep.py").write_text("import other\n")
    (tmp_path / "other.py").write_text("")
    (tmp_path / "unrelated.py").write_text("")
    (tmp_path / ".env").write_text("AWS_SECRET_ACCESS_KEY=x")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("a,b\n1,2\n")
    (tmp_path / "data" / "unused.csv").write_text("a,b\n1,2\n")
    return tmp_path


def staged(own: Path, *sets: str, remote: bool = True) -> tuple[set[str], str]:
    from workers.package import stage

    folder = own.parent / f"{own.name}-job"
    folder.mkdir()
    storage = stage(load_config(SMOKE, sets), folder, remote=remote)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in files if not re.match(r"(pipeline|workers)/", name)}, storage


def test_a_job_takes_along_the_users_code_and_what_it_imports_and_nothing_else(own: Path) -> None:
    files, _ = staged(own, "data.source=python:mine:load", "storage=s3://bucket/runs")
    assert files == {"config.yaml", "mine.py", "helper/__init__.py", "helper/deep.py", "other.py"}


def test_small_files_under_relative_paths_go_along_under_their_names(own: Path) -> None:
    files, _ = staged(own, "data.source=csv:data/train.csv", "data.target=b", "storage=s3://bucket/runs")
    assert files == {"config.yaml", "data/train.csv"}


def test_a_cluster_on_this_machine_sees_its_folders(own: Path) -> None:
    assert staged(own, "storage=./runs", remote=False)[1] == str(own / "runs")


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["storage=./runs"], "storage: ./runs is a folder of this machine"),
        (["data.source=csv:/data/x.csv", "data.target=b"], "data.source: /data/x.csv lies on this machine"),
        (["data.source=csv:../x.csv", "data.target=b"], "leaves the working directory"),
        (["data.source=csv:missing.csv", "data.target=b"], "does not exist in the working directory"),
        (["model.weights=/data/w.safetensors"], "model.weights: /data/w.safetensors lies on this machine"),
    ],
)
def test_what_a_distant_cluster_cannot_see_is_refused(own: Path, sets: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        staged(own, "storage=s3://bucket/runs", *sets)
    assert message in str(caught.value)


def test_a_job_that_is_too_large_is_refused_with_the_arithmetic(own: Path) -> None:
    for name in ("one", "two"):
        with open(own / "data" / f"{name}.csv", "wb") as file:
            file.truncate(30 * 2**20)
    with pytest.raises(InputError, match=r"60\.\d MiB \(data/.*30\.0 \+ data/.*30\.0 .*at most 50 MiB"):
        staged(
            own, "data.source=csv:data/one.csv", "data.target=b", 'data.ood=["csv:data/two.csv"]', "storage=s3://b/r"
        )
