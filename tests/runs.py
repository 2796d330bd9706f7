"""Small finished runs that several tests look at, made once a session in one process."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import torch

from pipeline.config import Config, parse_config
from pipeline.executor import SerialExecutor
from pipeline.plan import BlockKey
from pipeline.progress import LogProgress
from pipeline.run import Run, claim, prepare
from pipeline.stages.deform import deform, train_in_process
from pipeline.stages.estimate import estimate
from pipeline.stages.evaluate import evaluate
from pipeline.stages.sample import sample
from pipeline.stages.select import select
from pipeline.storage import Storage

_BASELINES = ["map", "temperature", "random", "gaussian", "laplace", "laplace_linearised", "swag"]
_WALK = {"walks": 24, "walks_per_shard": 6, "length": 6.0, "steps": 40, "record_every": 5, "rank": 8}
_COMMON = {
    "map": {"starts": 2, "steps": 300},
    "walk": _WALK,
    "deformation": {"rank": 8, "hidden": [16], "steps": 50},
    "evaluation": {"draws": 12, "baselines": _BASELINES},
}
CONFIGS = {
    "classes": {
        "name": "classes",
        "data": {
            "source": "sklearn:digits",
            "train_rows": 150,
            "validation": 0.1,
            "test": 0.1,
            "ood": ["sklearn:digits"],
        },
        "model": {"hidden": [6]},
        **_COMMON,
    },
    "plane": {
        "name": "plane",
        "data": {"source": "python:tests.runs:moons", "validation": 0.2, "test": 0.3},
        "model": {"hidden": [8]},
        "prior": {"precision": "auto"},
        **_COMMON,
        "walk": {**_WALK, "length": "auto"},
    },
    "curve": {
        "name": "curve",
        "data": {"source": "python:pipeline.data.synthetic:snelson_like", "task": "regression", "test": 0.3},
        "model": {"hidden": [8]},
        **_COMMON,
    },
}


def moons():
    """Two interleaved half circles."""
    from sklearn.datasets import make_moons

    return make_moons(150, noise=0.25, random_state=0)


def walked(config: Config) -> Run:
    """A new run up to its last walk, in this process."""
    run = prepare(config)
    claim(run)
    estimate(run, SerialExecutor(), LogProgress())
    sample(run, SerialExecutor(), LogProgress())
    return run


def stages(run: Run) -> None:
    """All stages in this process, with the one thread that a run takes by default: rounding depends on their number."""
    torch.set_num_threads(1)
    progress = LogProgress()
    estimate(run, SerialExecutor(), progress)
    sample(run, SerialExecutor(), progress)
    select(run, progress)
    deform(run, train_in_process, progress)
    evaluate(run, progress)


@functools.cache
def finished(name: str) -> Run:
    """A finished run of one of the configurations; do not write to it (see `copy_of`)."""
    folder = tempfile.mkdtemp(prefix="fwruns-")
    run = prepare(parse_config({**CONFIGS[name], "storage": folder}))
    claim(run)
    stages(run)
    return run


def moved(run: Run, place: Path) -> Run:
    """A copy of a run in another place."""
    target = place / run.config.run_id
    shutil.copytree(run.uri, target)
    return dataclasses.replace(run, storage=Storage.open(str(target)))


def damage(run_uri: str, key: BlockKey) -> None:
    """Change a byte of theta in a stored block of a run on disk."""
    path = Path(run_uri, key.path)
    data = bytearray(path.read_bytes())
    theta = pq.read_table(path, columns=["theta"]).column("theta").combine_chunks().to_numpy_ndarray()
    data[data.index(theta[0].tobytes())] ^= 1
    path.write_bytes(data)


def copy_of(name: str, place: Path, *without: str) -> Run:
    """A copy of a finished run in another place, without some of its objects."""
    run = moved(finished(name), place)
    for path in without:
        run.storage.delete(path)
    return run
