"""Fit the deformation of one start: the same function in one process and in every Ray Train worker."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from safetensors.torch import load, save
from torch import Tensor, nn

from pipeline.bayes.deformation.gaussian import Gaussian
from pipeline.build import load_problem
from pipeline.errors import RunError
from pipeline.fitting.job import FitJob, Refused, Rows, Team, Told, agreed, facts_path
from pipeline.fitting.reading import to_rows
from pipeline.fitting.residual import fit_residual
from pipeline.fitting.stored import by_walk, keys_of, read_marks, stored_rows
from pipeline.run import Run
from pipeline.store import SampleStore


def fit(run: Run, job: FitJob, team: Team) -> None:
    """Fit, and let the first worker write the weights, then the facts that name their digest.

    Raises:
        RunError: The walks are too few, or storage failed.
    """
    store = SampleStore.open(run.storage)
    problem = load_problem(run, job.start, store.plan)
    kind = run.config.deformation.kind
    if kind == "gaussian":
        tensors, facts = fit_gaussian(store, job, team)
    elif kind == "metric":
        from pipeline.fitting.metric import fit_metric

        tensors, facts = fit_metric(run, store.plan, problem, job, team)
    else:
        model, facts = fit_residual(run, store.plan, problem, job, team)
        tensors = model.to_tensors()
    if team.rank == 0:
        data = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
        digest = hashlib.sha256(data).hexdigest()
        if job.fitted(run) and run.storage.read_json(facts_path(job.start))["weights_sha256"] == digest:
            return  # by another driver, which may have settled what draws since then
        run.storage.replace(job.weights, data)
        facts |= {
            "kind": kind,
            "trained_on": job.digest,
            "workers": team.size,
            "radius": job.radius,
            "start": job.start,
        }
        run.storage.replace_json(facts_path(job.start), facts | {"weights_sha256": digest})


def fit_gaussian(store: SampleStore, job: FitJob, team: Team) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Nothing is learned: the control draws from the stored points themselves."""
    walks = 0
    with agreed(team):
        walks = sum(len(points) for points in store.points(job.radius, start=job.start))
    if walks < 2:
        raise Refused(
            f"deformation.kind: gaussian needs two walks a start that did not diverge; start {job.start} has {walks}."
        )
    return Gaussian(job.radius, store.plan.dim, walks, lambda radius: iter(())).to_tensors(), {"walks": walks}


class SerialTeam:
    """One worker in this process: the reference."""

    rank = 0
    size = 1

    def __init__(self, run: Run, job: FitJob):
        self._run, self._job = run, job
        self._store = SampleStore.open(run.storage)
        self._keys = keys_of(self._store, job.start, 0, 1)
        self._marks = read_marks(run.config.deformation.kind, self._store.plan, job.radius)
        self._checkpoint = f"{job.scratch}/serial-start{job.start}.safetensors"

    def sum(self, tensors: list[Tensor]) -> None:
        """Nothing to add."""

    def agree(self, error: RunError | None) -> None:
        """See `Team.agree`."""
        if error is not None:
            raise Refused(str(error)) from error

    def rows(self) -> Iterator[Rows]:
        """See `Team.rows`."""
        for columns in stored_rows(self._store, self._keys, self._marks):
            yield to_rows(columns, 0, 1, by_walk(self._store, self._job.start, 1))

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module itself."""
        return module

    def save(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """One file of tensors and one of facts, the facts last."""
        data = save(tensors)
        self._run.storage.replace(self._checkpoint, data)
        self._run.storage.replace_json(f"{self._checkpoint}.json", facts | {"sha256": hashlib.sha256(data).hexdigest()})

    def restore(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The last checkpoint whose two files belong together."""
        storage = self._run.storage
        try:
            facts, data = storage.read_json(f"{self._checkpoint}.json"), storage.read(self._checkpoint)
        except FileNotFoundError:  # none yet, or another driver has just finished and removed it
            return None
        return (load(data), facts) if hashlib.sha256(data).hexdigest() == facts["sha256"] else None


def train_in_process(run: Run, jobs: Sequence[FitJob], told: Told) -> None:
    """The serial reference of a trainer."""
    for job in jobs:
        fit(run, job, SerialTeam(run, job))
        told(job)
