"""Fit deformations with Ray Train: several workers, rows streamed by Ray Data, checkpoints in the run's own storage.

The workers run the same function as the serial reference, for one start after the other: to start them takes longer
than many a fit. A worker that dies is started again by Ray Train; a driver that died is replaced by running the same
command, since a trainer with the same place and name goes on from its checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import ray
import ray.data
import ray.train
import torch
from ray.data import ExecutionOptions
from ray.exceptions import RayTaskError
from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.errors import RunError
from pipeline.fitting.fit import fit
from pipeline.fitting.job import FitJob, Refused, Rows, Told
from pipeline.fitting.reading import to_rows
from pipeline.fitting.stored import batch_rows, by_walk, keys_of, read_marks
from pipeline.run import Run
from pipeline.store import SampleStore
from workers.reader import rows_of

TASK_BYTES = 64 << 20
"""Bytes that one reading task takes in."""
WATCH_SECONDS = 2.0
"""Between looks for fits that have ended."""
RAY_TRAIN = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""Whoever reports a checkpoint waits until the controller looks again: by default up to two seconds, longer than many
a fit takes between them. The watcher is one more process to start, and nobody here would listen to it."""
TENSORS, FACTS = "state.safetensors", "facts.json"


def train(run: Run, jobs: Sequence[FitJob], told: Told) -> None:
    """Fit deformations on `deformation.workers` workers of the connected cluster.

    Raises:
        RunError: Workers failed more than `cluster.max_restarts` times; running again goes on from the last checkpoint.
    """
    workers = run.config.deformation.workers
    files, base = run.storage.arrow_filesystem()
    folder, name = f"{base}/{jobs[0].scratch}".rsplit("/", 1)
    if run.storage.protocol == "file":
        Path(folder).mkdir(parents=True, exist_ok=True)
    for variable, value in RAY_TRAIN.items():
        os.environ.setdefault(variable, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray's own changes to come
        trainer = TorchTrainer(
            _WORKER,
            train_loop_config={"run": ray.put(run), "jobs": list(jobs)},
            scaling_config=_scaling(workers, run.config.cluster.gpus_per_actor),
            torch_config=TorchConfig(backend="gloo"),
            datasets={_points(job, rank): _dataset(run, job, rank, workers) for job in jobs for rank in range(workers)},
            dataset_config=DataConfig(datasets_to_split=[], execution_options=ExecutionOptions(preserve_order=True)),
            run_config=RunConfig(
                name=name,
                storage_path=folder,
                storage_filesystem=files,
                failure_config=FailureConfig(max_failures=run.config.cluster.max_restarts),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
            ),
        )
        try:
            with _watched(run, jobs, told):
                refused = trainer.fit().return_value
                if refused:
                    raise RunError(refused)
        except ray.train.TrainingFailedError as error:
            raise RunError(f"The deformation failed: {_reason(error)} Run again to go on.") from error


@contextlib.contextmanager
def _watched(run: Run, jobs: Sequence[FitJob], told: Told) -> Iterator[None]:
    """Tell of fits that have ended, while the trainer keeps this thread. Seen by their facts in the run's storage."""
    ended, waiting = threading.Event(), list(jobs)

    def watch() -> None:
        while waiting and not ended.wait(WATCH_SECONDS):
            with contextlib.suppress(OSError, RunError):  # of the storage, which the workers meet too
                while waiting and not ended.is_set() and waiting[0].fitted(run):
                    told(waiting.pop(0))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    while waiting:
        told(waiting.pop(0))


def _scaling(workers: int, gpus: float) -> ScalingConfig:
    """Ask for as much as leaves a whole processor to the task that reads, also after a node is lost.

    Ray schedules by these numbers and nothing else: how many threads a worker computes with is set in it.
    """
    have = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    share = cpu_share([node.get("CPU", 0.0) for node in have], workers)
    if not gpus:
        return ScalingConfig(num_workers=workers, resources_per_worker={"CPU": share})
    accelerators = sum(node.get("GPU", 0.0) for node in have)
    gpu_share = min(gpus, accelerators / workers) if accelerators else gpus
    return ScalingConfig(num_workers=workers, use_gpu=True, resources_per_worker={"CPU": share, "GPU": gpu_share})


def cpu_share(nodes: Sequence[float], workers: int) -> float:
    """CPUs to ask for each training worker, given those of each node.

    One, where the others still hold all workers and a reader when the largest node is lost; otherwise what fits the
    smallest node beside a reader. Without this a cluster that has lost a node waits for ever: its workers have taken
    all processors, and wait for rows that nobody can read.
    """
    have = [cpus for cpus in nodes if cpus > 0]
    if not have or sum(have) - max(have) >= workers + 1:
        return 1.0
    return min(1.0, math.floor(max(0.0, min(have) - 1) / workers * 100) / 100)


def train_worker(config: dict[str, Any]) -> str | None:
    """What each worker does; returns what all have refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run, jobs = cast(Run, ray.get(config["run"])), cast(list[FitJob], config["jobs"])
        context = ray.train.get_context()
        torch.set_num_threads(max(1, int(run.config.cluster.cpus_per_actor)))
        for job in jobs:
            team = RayTeam(run, job, context.get_world_rank(), context.get_world_size())
            if team.fitted():
                continue
            try:
                fit(run, job, team)
            except Refused as error:  # one that is raised would be tried again
                return f"The deformation of start {job.start} failed: {error}"
        ray.train.report({"done": True})
    return None


_WORKER = train_worker


class RayTeam:
    """One worker among those of Ray Train; see `pipeline.fitting.job.Team`."""

    def __init__(self, run: Run, job: FitJob, rank: int, size: int):
        self.rank, self.size, self._run, self._job = rank, size, run, job
        store = SampleStore.open(run.storage)
        self._shared, self._batch = by_walk(store, job.start, size), batch_rows(store.plan.dim)
        self._empty = not keys_of(store, job.start, rank, size)

    def fitted(self) -> bool:
        """Whether there is nothing left to do. The first worker decides: another driver may end the same fit."""
        return self._of_first(self.rank == 0 and self._job.fitted(self._run))

    def _of_first(self, value: Any) -> Any:
        """What the first worker has, on all of them."""
        box = [value]
        if self.size > 1:
            torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def sum(self, tensors: list[Tensor]) -> None:
        """All-reduce in place."""
        if self.size > 1:
            for work in [torch.distributed.all_reduce(tensor, async_op=True) for tensor in tensors]:
                cast(Any, work).wait()

    def agree(self, error: RunError | None) -> None:
        """See `pipeline.fitting.job.Team.agree`."""
        met: list[str | None] = [None if error is None else str(error)]
        if self.size > 1:
            met = met * self.size
            torch.distributed.all_gather_object(met, met[self.rank])
        for text in met:
            if text is not None:
                raise Refused(text) from error

    def rows(self) -> Iterator[Rows]:
        """Batches of this worker's own stream, in the order of the blocks."""
        if self._empty:
            return
        stream = cast(Any, ray.train.get_dataset_shard(_points(self._job, self.rank)))
        try:
            for columns in stream.iter_batches(batch_size=self._batch, batch_format="numpy", prefetch_batches=1):
                yield to_rows(dict(columns), self.rank, self.size, self._shared)
        except RayTaskError as error:
            if not isinstance(error.cause, RunError):
                raise
            raise type(error.cause)(str(error.cause).splitlines()[0]) from error  # Ray adds lines of its own

    def wrap(self, module: nn.Module) -> nn.Module:
        """Distributed data parallel where there is more than one worker."""
        # Buffers are the same on all workers, and stay so.
        return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False) if self.size > 1 else module

    def save(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Report a checkpoint; the first worker brings the files."""
        if self.rank:
            ray.train.report({"step": step})
            return
        with tempfile.TemporaryDirectory(prefix="fiberwalk-") as folder:
            save_file(tensors, Path(folder, TENSORS))
            Path(folder, FACTS).write_text(json.dumps(facts | {"start": self._job.start}), encoding="utf-8")
            ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def restore(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The last checkpoint that Ray Train knows, if it is one of this start.

        That of the first worker: the others are told only of the one that they began with, which may be gone by now.
        """
        checkpoint = self._of_first(ray.train.get_checkpoint())
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as folder:
            facts = json.loads(Path(folder, FACTS).read_text(encoding="utf-8"))
            return (load_file(Path(folder, TENSORS)), facts) if facts["start"] == self._job.start else None


def _points(job: FitJob, rank: int) -> str:
    return f"points-{job.start}-{rank}"


def _dataset(run: Run, job: FitJob, rank: int, size: int) -> ray.data.Dataset:
    """The rows of one worker, read through the store when it asks for them: its checks, its patience, its batches.

    Ray's own reader asks for the footers of all files first, in processes of their own, and gives up where the store
    waits.
    """
    store = SampleStore.open(run.storage)
    keys, entries = keys_of(store, job.start, rank, size), store.entries()
    if not keys:
        return ray.data.from_items([{"walk": -1}])
    tasks = max(1, sum(entries[key].size for key in keys) // TASK_BYTES)
    shards = groupby(keys, key=lambda key: key.shard)
    items = [{"shard": shard, "blocks": [key.block for key in blocks]} for shard, blocks in shards]
    blocks = ray.data.from_items(items, override_num_blocks=min(tasks, len(items)))
    marks = read_marks(run.config.deformation.kind, store.plan, job.radius)
    read = cast(Any, functools.partial(rows_of, run.storage, marks))
    return blocks.map_batches(read, batch_size=None, batch_format="numpy")


def _reason(error: BaseException) -> str:
    """The last line of what went wrong in a worker."""
    failures = getattr(error, "worker_failures", None)
    cause = next(iter(failures.values())) if failures else error
    while isinstance(cause, RayTaskError) and isinstance(cause.cause, BaseException):
        cause = cause.cause
    lines = [line for line in str(cause).splitlines() if line.strip()]
    return lines[-1].strip().rstrip(".") + "." if lines else type(cause).__name__ + "."
