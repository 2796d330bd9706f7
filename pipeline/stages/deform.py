"""The deformation stage: fit one model a start, judge its draws beside the walks, write ``deformation.json``."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import torch
from pyarrow.fs import FileType

from pipeline.bayes.bootstrap import finite_or_none
from pipeline.bayes.deformation.base import Deformation
from pipeline.build import Problem, load_problem
from pipeline.errors import RunError
from pipeline.fitting.fit import train_in_process
from pipeline.fitting.job import FOLDER, FitJob, Trainer, facts_path, memory_estimate
from pipeline.fitting.loading import Source, dealt, in_batches, load_learned, load_sources
from pipeline.fitting.stored import batch_rows
from pipeline.machine import machine_memory
from pipeline.plan import stream
from pipeline.progress import Progress
from pipeline.run import Run, versions
from pipeline.stages.draw_radius import choose_draw_radius
from pipeline.stages.gaussian_share import choose_share
from pipeline.stages.kept_fits import bring_back, forget
from pipeline.stages.learned_radius import learned_radius, next_radius
from pipeline.store import SampleStore

__all__ = ["deform", "train_in_process"]
log = logging.getLogger("fiberwalk")
SUMMARY = f"{FOLDER}/deformation.json"
JUDGED = 128
"""Draws a start whose potential is measured."""


def deform(run: Run, trainer: Trainer, report: Progress) -> None:
    """Fit what is missing; a fit of other blocks than the present ones is done again.

    Raises:
        RunError: Too little memory, or the fit failed.
    """
    settings = run.config.deformation
    if settings.kind == "none":
        return
    store = SampleStore.open(run.storage)
    digest = store.digest()
    choice = run.storage.read_json("radius.json")
    selected = float(choice["radius"])
    jobs = _jobs(run, store, digest, selected)
    if run.storage.exists(SUMMARY):
        if run.storage.read_json(SUMMARY)["trained_on"] != digest:
            report.note("The blocks have changed since the deformation was fitted: fitting it again.")
        elif all(_complete(run, job) for job in jobs):
            return
    check_memory(run, store.plan.dim)
    _fit(run, trainer, report, jobs)
    tuned: dict[str, Any] = {"draw_radius": selected, "gaussian_share": 1.0}
    if settings.kind != "gaussian":
        models, tuned = _tune(run, store, jobs, choice)
        while (nearer := next_radius(run, store.plan, digest, choice, tuned)) is not None:
            models.clear()  # the next fit needs the memory
            report.note(f"Draws learned up to radius {jobs[0].radius:.4g} are compared with some up to {nearer:.4g}.")
            jobs = _jobs(run, store, digest, selected)
            _fit(run, trainer, report, jobs)
            models, tuned = _tune(run, store, jobs, choice)
        tuned |= _choose(run, store, models, report, selected, tuned["draw_radius"])
    found = []
    for job in jobs:
        settled = {name: tuned[name] for name in ("draw_radius", "gaussian_share")} | {"gaussian_radius": selected}
        if settings.kind != "gaussian" and tuned["gaussian_share"]:
            settled |= {"gaussian_walks": store.undiverged(job.start), "gaussian_lands": settings.kind == "residual"}
        facts = run.storage.read_json(facts_path(job.start)) | settled
        run.storage.replace_json(facts_path(job.start), facts)
        found.append(judge(run, store, job.start, facts))
    forget(run)
    summary = summarise(run, selected, digest, found) | {"learned_to": jobs[0].radius} | tuned
    run.storage.replace_json(SUMMARY, summary)
    report.note(f"Deformation: {_line(summary)}")


def _complete(run: Run, job: FitJob) -> bool:
    """Whether a fit is there, and what was settled about its draws."""
    return job.fitted(run) and "gaussian_share" in run.storage.read_json(facts_path(job.start))


def _jobs(run: Run, store: SampleStore, digest: str, selected: float) -> list[FitJob]:
    """A fit for each start."""
    radius = learned_radius(run, digest, selected)
    return [FitJob(start, radius, digest) for start in range(store.plan.starts)]


def _fit(run: Run, trainer: Trainer, report: Progress, jobs: list[FitJob]) -> None:
    """Fit what is not fitted, now or on the way to another radius."""
    bring_back(run, jobs)
    missing = [job for job in jobs if not job.fitted(run)]
    with report.bar("Deformation", len(jobs), len(jobs) - len(missing)) as bar:
        if missing:
            trainer(run, missing, lambda job: bar.advance(1, f"start {job.start}"))
    _remove_scratch(run, jobs[0])


def _tune(
    run: Run, store: SampleStore, jobs: list[FitJob], choice: dict[str, Any]
) -> tuple[list[Deformation], dict[str, Any]]:
    """The fitted models, and how far out to draw: at most up to where they have learned."""
    models = [load_learned(run, job.start) for job in jobs]
    return models, choose_draw_radius(run, store.plan, models, choice | {"radius": jobs[0].radius})


def _choose(
    run: Run, store: SampleStore, models: list[Deformation], report: Progress, selected: float, drawn_at: float
) -> dict[str, Any]:
    """What draws beside what was learned; see `stages.gaussian_share`."""
    chosen = choose_share(run, store, store.plan, models, selected, drawn_at)
    if chosen["gaussian_share"] and "mixed_validation_nll" in chosen:
        learned, gaussian, both = (
            math.inf if (nll := chosen[f"{name}_validation_nll"]) is None else nll
            for name in ("learned", "gaussian", "mixed")
        )
        report.note(
            f"A Gaussian of the walks' points gives {chosen['gaussian_share']:.0%} of the draws: on validation rows "
            f"learned draws have NLL {learned:.4f}, those of the Gaussian {gaussian:.4f}, both together {both:.4f}."
        )
    return chosen


def check_memory(run: Run, dim: int) -> None:
    """Raise RunError with the arithmetic where a worker of the fit would not fit in this machine's memory."""
    settings = run.config.deformation
    if settings.kind == "gaussian":
        return
    need = memory_estimate(dim, settings.rank, batch_rows(dim))
    have = machine_memory()
    if have and need > have:
        raise RunError(
            f"The deformation needs {need / 2**30:.1f} GiB a worker (D x (3 x rank + 40) x 4 bytes and 1 GiB, "
            f"D = {dim}, rank = {settings.rank}), this machine has {have / 2**30:.1f} GiB. Lower "
            "deformation.rank, or set deformation.kind: none."
        )


def judge(run: Run, store: SampleStore, start: int, facts: dict[str, Any]) -> dict[str, Any]:
    """Add what its draws are worth: their rise of U, and how many lie above 99 % of the walks.

    Held against walks at the radius of learned draws; those of a Gaussian may lie further out, and higher.
    """
    problem = load_problem(run, start, store.plan)
    star = float(problem.potential.value(problem.theta_star[None])[0])
    radius = float(facts["draw_radius"])
    walk = np.concatenate([points.potential for points in store.points(radius, start=start)]) - star
    drawn = dealt(load_sources(run, start), JUDGED)
    rises = {source.name: potential_of(problem, source, run, count) - star for source, count in drawn if count}
    rise, learned = np.concatenate(list(rises.values())), rises.get("learned")
    level = float(np.quantile(walk, 0.99))
    return facts | {
        "walk_potential_rise": float(walk.mean()),
        "walk_potential_rise_99": level,
        "potential_rise": finite_or_none(float(rise.mean())),
        "potential_rise_learned": None if learned is None else finite_or_none(float(learned.mean())),
        "potential_rise_median": finite_or_none(float(np.median(rise))),
        "share_above_99": float((~(rise <= level)).mean()),
    }


def potential_of(problem: Problem, source: Source, run: Run, draws: int) -> np.ndarray:
    """Potential of fresh draws, (draws,)."""
    rng = stream(run.config.seed, f"deform-report-{source.name}", source.start)
    batches = in_batches(source.model, rng, draws, max(1, (256 << 20) // (8 * source.model.dim)))
    parts = [problem.potential.value(theta.to(problem.theta_star)).double().cpu() for theta in batches]
    return torch.cat(parts).numpy()


def summarise(run: Run, radius: float, digest: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """What ``deformation.json`` holds: means over starts, and each start by itself."""

    def mean(name: str) -> float | None:
        values = [facts[name] for facts in found if facts.get(name) is not None]
        return float(np.mean(values)) if values else None

    names = (
        "heldout_error",
        "potential_rise",
        "potential_rise_learned",
        "walk_potential_rise",
        "walk_potential_rise_99",
        "share_above_99",
    )
    return {
        "kind": run.config.deformation.kind,
        "radius": radius,
        "trained_on": digest,
        "seed": run.config.seed,
        "workers": found[0]["workers"],
        "versions": versions(),
        **{name: mean(name) for name in names},
        "heldout_error_by_radius": found[0].get("heldout_error_by_radius"),
        "curve": found[0].get("curve"),
        "starts": found,
    }


def _remove_scratch(run: Run, job: FitJob) -> None:
    """Remove checkpoints. Another driver of the same run may do so at the same moment, or still write there."""
    if run.storage.protocol == "file" or run.storage.list(job.scratch):
        files, base = run.storage.arrow_filesystem()
        try:
            if files.get_file_info(f"{base}/{FOLDER}/train").type != FileType.NotFound:
                files.delete_dir(f"{base}/{FOLDER}/train")
        except OSError as error:
            log.info("Checkpoints were not removed (%s): another driver has done it, or the next run will.", error)


def _line(facts: dict[str, Any]) -> str:
    error = facts.get("heldout_error")
    rises = (
        f"rise of U {facts['potential_rise']:.4g}, walks {facts['walk_potential_rise']:.4g}"
        if facts["potential_rise"]
        else ""
    )
    if facts["draw_radius"] < facts["radius"]:
        rises += f", drawn at radius {facts['draw_radius']:.4g}"
    return (f"held-out error {error:.3f}, " if error is not None else "") + rises
