"""Fits up to other radii, kept while several are compared: the one that comes back as the best is not made again."""

from __future__ import annotations

from pipeline.errors import RunError
from pipeline.fitting.job import FOLDER, FitJob, facts_path
from pipeline.run import Run

KEPT = f"{FOLDER}/kept"


def bring_back(run: Run, jobs: list[FitJob]) -> None:
    """Put fits of the same blocks up to other radii aside, and bring back what these jobs have made before."""
    for job in jobs:
        weights, facts = job.weights, facts_path(job.start)
        if run.storage.exists(facts) and run.storage.exists(weights):
            found = run.storage.read_json(facts)
            if found["trained_on"] == job.digest and found["radius"] != job.radius:
                _copy(run, (weights, facts), _aside(job, found["radius"]))
        if not job.fitted(run):
            _copy(run, _aside(job, job.radius), (weights, facts))


def forget(run: Run) -> None:
    """Remove what was put aside."""
    for entry in run.storage.list(KEPT):
        run.storage.delete(entry.path)


def _aside(job: FitJob, radius: float) -> tuple[str, str]:
    folder = f"{KEPT}/{job.digest[:12]}-radius{radius:.6g}/start={job.start}"
    return f"{folder}/weights.safetensors", f"{folder}/fit.json"


def _copy(run: Run, source: tuple[str, str], target: tuple[str, str]) -> None:
    """Weights, then the facts that name their digest; nothing where the two do not belong together."""
    storage = run.storage
    try:
        facts = storage.read_json(source[1])
        data = storage.read_checked(source[0], facts["weights_sha256"])
    except (FileNotFoundError, RunError):  # not there, removed by another driver, or damaged: it is fitted again
        return
    storage.replace(target[0], data)
    storage.replace_json(target[1], facts)
