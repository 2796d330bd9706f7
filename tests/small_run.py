"""A run of a few seconds, in this process or as a command, for tests that interrupt it in every way."""

from __future__ import annotations

import functools
import hashlib
import tempfile
from pathlib import Path
from typing import Any

from pipeline.config import parse_config
from pipeline.executor import SerialExecutor
from pipeline.progress import LogProgress
from pipeline.run import Run, claim, prepare
from pipeline.stages.estimate import estimate
from pipeline.stages.sample import settle_plan
from pipeline.storage import Storage

SETTINGS: dict[str, Any] = {
    "name": "small",
    "data": {"source": "sklearn:iris", "validation": 0.2, "test": 0.2},
    "model": {"hidden": [8]},
    "map": {"steps": 300},
    "walk": {"walks": 24, "walks_per_shard": 4, "length": 4.0, "steps": 40, "record_every": 5, "rank": 8},
    "deformation": {"kind": "residual", "rank": 8, "hidden": [8], "steps": 20},
    "evaluation": {"draws": 8},
}

TRAINED: dict[str, Any] = {
    "name": "trainer",
    "data": {"source": "sklearn:iris", "validation": 0.2, "test": 0.2},
    "model": {"hidden": [6]},
    "map": {"steps": 300},
    "prior": {"precision": 0.1},
    "walk": {"walks": 40, "walks_per_shard": 10, "length": 20.0, "steps": 20, "record_every": 5, "correction": "plain"},
    "deformation": {"rank": 8, "hidden": [16], "steps": 60, "workers": 2},
}
"""A run for tests of Ray Train: walks that bend, so that learned steps leave something to train for."""


@functools.cache
def _planned() -> dict[str, bytes]:
    """The objects of a run before its first block; made once."""
    with tempfile.TemporaryDirectory(prefix="fiberwalk-") as place:
        run = prepare(parse_config(SETTINGS | {"storage": place}))
        claim(run)
        estimate(run, SerialExecutor(), LogProgress())
        settle_plan(run, SerialExecutor(), LogProgress())
        return {entry.path: run.storage.read(entry.path) for entry in run.storage.list()}


def planned_run(place: str, **cluster: Any) -> Run:
    """A run whose MAP estimate and plan are made, and no block yet."""
    run = prepare(parse_config(SETTINGS | {"storage": place, "cluster": {"max_restarts": 3} | cluster}))
    for path, data in _planned().items():
        run.storage.create(path, data)
    return run


def with_cluster(run: Run, **cluster: Any) -> Run:
    """The same run on another pool."""
    from dataclasses import replace

    config = run.config.model_copy(update={"cluster": run.config.cluster.model_copy(update=cluster)})
    return replace(run, config=config)


def write_config(folder: Path) -> str:
    """The same settings as a file for the command line."""
    import yaml

    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return str(path)


def contents(storage: Storage) -> dict[str, str]:
    """sha256 of every object that must not depend on what died on the way, by path.

    That is all but the configuration, which names place and cluster, the report, which shows it, checkpoints, and marks
    that tests leave.
    """
    others = ("config.yaml", "report.html", "deformation/train/", "died-")
    paths = [entry.path for entry in storage.list() if not entry.path.startswith(others)]
    return {path: hashlib.sha256(storage.read(path)).hexdigest() for path in paths}
