"""Whatever dies, and wherever the work is done, the store holds the same bytes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import InputError, RunError
from pipeline.executor import SerialExecutor
from pipeline.fitting.job import FitJob
from pipeline.run import Run
from pipeline.shard import run_shard
from pipeline.stages.deform import _remove_scratch
from pipeline.stages.verify import verify
from pipeline.storage import Storage
from pipeline.store import SampleStore
from tests.proxy import Proxy
from tests.s3server import S3Server
from tests.small_run import contents, planned_run, with_cluster


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process writes that nobody disturbs: the reference."""
    run = planned_run(str(tmp_path_factory.mktemp("reference")))
    walk(run, SerialExecutor())
    return contents(run.storage)


def walk(run: Run, executor: Any, function: Any = run_shard) -> list[Any]:
    return list(executor.stream(function, run, SampleStore.open(run.uri).plan.shards()))


@pytest.fixture
def pool(ray_cluster: Any) -> Iterator[Any]:
    from workers.walker import RayExecutor

    executors = []

    def make(run: Run) -> RayExecutor:
        executors.append(RayExecutor(run.config))
        return executors[-1]

    yield make
    for executor in executors:
        executor.release()


@pytest.mark.ray
@pytest.mark.parametrize("actors", [1, 2, 3])
def test_ray_equals_serial(pool: Any, tmp_path: Path, undisturbed: dict[str, str], actors: int):
    run = planned_run(str(tmp_path), actors=actors)
    walk(run, pool(run))
    assert contents(run.storage) == undisturbed


def dying(run: Run, shard: Any) -> Iterator[Any]:
    """Run a shard; the process is killed once after the first block of every second shard."""
    mark = Path(run.uri, f"died-{shard.index}")
    for event in run_shard(run, shard):
        yield event
        if shard.index % 2 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.ray
def test_killed_actors_lose_nothing(pool: Any, tmp_path: Path, undisturbed: dict[str, str]):
    run = planned_run(str(tmp_path), actors=3)
    walk(run, pool(run), dying)
    assert len(list(Path(run.uri).glob("died-*"))) == 3
    assert contents(run.storage) == undisturbed


@pytest.mark.cluster
@pytest.mark.ray
def test_the_shards_of_a_lost_node_go_elsewhere(
    ray_cluster: Any, pool: Any, tmp_path: Path, undisturbed: dict[str, str]
):
    node = ray_cluster.add_node(num_cpus=4)
    run = planned_run(str(tmp_path), actors=6)
    executor = pool(run)
    events = executor.stream(slowly, run, SampleStore.open(run.uri).plan.shards())
    next(events)
    ray_cluster.remove_node(node, allow_graceful=False)
    list(events)
    assert contents(run.storage) == undisturbed


@pytest.mark.ray
def test_actors_without_room_hold_nobody_up(pool: Any, tmp_path: Path, undisturbed: dict[str, str]):
    run = planned_run(str(tmp_path), actors=6)  # the cluster has room for four
    walk(run, pool(run), slowly)
    assert contents(run.storage) == undisturbed


def slowly(run: Run, shard: Any) -> Iterator[Any]:
    for event in run_shard(run, shard):
        time.sleep(0.2)
        yield event


def always_dying(run: Run, shard: Any) -> Iterator[Any]:
    if shard.index == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    yield from run_shard(run, shard)


@pytest.mark.ray
def test_a_shard_that_always_crashes_ends_the_run_after_the_others(
    pool: Any, tmp_path: Path, undisturbed: dict[str, str]
):
    run = planned_run(str(tmp_path), actors=2, max_restarts=1)
    with pytest.raises(RunError, match="1 of 6 pieces of work failed 2 times in a row"):
        walk(run, pool(run), always_dying)
    there = contents(run.storage)
    assert there == {path: digest for path, digest in undisturbed.items() if "shard=00002" not in path}
    walk(run, pool(run))
    assert contents(run.storage) == undisturbed


def raising(run: Run, shard: Any) -> Iterator[Any]:
    if shard.index == 1:
        raise InputError("data.source: no such thing") if run.config.cluster.max_restarts else ValueError("odd thing")
    yield shard.index


@pytest.mark.ray
def test_errors_of_the_function_keep_their_kind_and_their_words(pool: Any, tmp_path: Path):
    run = planned_run(str(tmp_path), actors=1)
    with pytest.raises(InputError, match=r"^data\.source: no such thing$"):
        walk(run, pool(run), raising)
    run = with_cluster(run, max_restarts=0)
    with pytest.raises(RunError, match="ValueError: odd thing"):
        walk(run, pool(run), raising)


def nothing(run: Run, item: int) -> Iterator[int]:
    yield item


@pytest.mark.ray
def test_thousands_of_items_stream_with_every_result_once(pool: Any, tmp_path: Path):
    run = planned_run(str(tmp_path), actors=2)
    events = pool(run).stream(nothing, run, range(3000))
    assert sorted(events) == [(number, number) for number in range(3000)]


def test_two_threads_on_the_same_shards_are_harmless(tmp_path: Path, undisturbed: dict[str, str]):
    run = planned_run(str(tmp_path))
    threads = [threading.Thread(target=walk, args=(run, SerialExecutor())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents(run.storage) == undisturbed
    assert verify(run.uri).complete


def test_checkpoints_that_two_drivers_remove_at_once_fail_neither(tmp_path: Path):
    run, job = planned_run(str(tmp_path)), FitJob(0, 1.0, "0" * 64)
    for turn in range(20):
        for number in range(30):
            run.storage.create(f"{job.scratch}/{turn}/{number}", b"checkpoint")
        with ThreadPoolExecutor(4) as pool:
            done = [pool.submit(_remove_scratch, run, job) for _ in range(4)]
        assert [future.result() for future in done] == [None] * 4


@pytest.mark.s3
def test_spoiled_requests_change_no_byte(s3: S3Server, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, str]):
    with Proxy(s3.port, seed=1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.share, proxy.budget, proxy.stall_seconds = 0.25, 30, 0.2
        run = planned_run(f"s3://{s3.bucket}/spoiled-{os.urandom(4).hex()}")
        walk(run, SerialExecutor())
        assert sum(proxy.counts.values()) >= 5
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    assert contents(run.storage) == undisturbed
    assert verify(run.uri).sound


@pytest.mark.s3
def test_a_server_that_is_killed_and_started_again_is_waited_for(s3: S3Server, undisturbed: dict[str, str]):
    run = planned_run(f"s3://{s3.bucket}/killed-{os.urandom(4).hex()}")
    thread = threading.Thread(target=walk, args=(run, SerialExecutor()))
    thread.start()
    store = SampleStore(Storage.open(run.uri), SampleStore.open(run.uri).plan, run.config.run_id)
    while len(store.entries()) < 3:
        time.sleep(0.05)
    s3.kill()
    s3.start()
    thread.join()
    assert contents(run.storage) == undisturbed
