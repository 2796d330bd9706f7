"""The order of the stages. Who does the work is handed in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from rich.console import Console

from pipeline.build import MAP_FILES
from pipeline.errors import RunError
from pipeline.executor import Executor, SerialExecutor
from pipeline.fitting.job import Trainer, facts_path, weights_path
from pipeline.progress import Progress
from pipeline.run import Run
from pipeline.store import SampleStore


def finished(run: Run) -> bool:
    """Whether every planned row is committed and every stage is done and made from the present blocks.

    Raises:
        RunError: A block's footer or a result is damaged; the message names it.
    """
    made = {entry.path for entry in run.storage.list()}
    if not {"plan.json", "radius.json", "evaluation.json", "evaluation/figures.safetensors", "report.html"} <= made:
        return False
    store = SampleStore.open(run.uri)
    needed = {key.path for key in store.keys()}
    needed |= {f"map/start={k}/{name}" for k in range(store.plan.starts) for name in MAP_FILES}
    recorded = {"radius.json": "blocks", "evaluation.json": "blocks"}
    if run.config.deformation.kind != "none":
        needed |= {path(k) for k in range(store.plan.starts) for path in (facts_path, weights_path)}
        recorded["deformation/deformation.json"] = "trained_on"
    if not needed | recorded.keys() <= made:
        return False
    if not _sound(run):
        return False
    digest = store.digest()
    return all(run.storage.read_json(path)[name] == digest for path, name in recorded.items())


def _sound(run: Run) -> bool:
    """Whether the results are as they were written; blocks, which are many, are read by `verify` alone."""
    from pipeline.stages.check_results import Results

    wrong = Results(run.storage).wrong
    for kind, path, detail in wrong:
        if kind != "gap" and path != "report.html":  # which is made again
            raise RunError(
                f"{run.uri}/{path} is damaged: {detail}. Run 'fiberwalk verify {run.uri} --repair', then run again."
            )
    return not wrong


Workers = AbstractContextManager[tuple[Executor, Trainer]]
"""Where shards run and who fits the deformation, held while the stages need them."""


def execute(run: Run, progress: Progress, workers: Workers) -> None:
    """Do every stage that is not done.

    Args:
        run: A claimed run.
        progress: Where it reports.
        workers: `in_this_process()`, or `workers.hands.on_ray(config)`.

    Raises:
        RunError: A stage failed; what is committed stays.
    """
    from pipeline.stages.deform import deform
    from pipeline.stages.estimate import estimate
    from pipeline.stages.evaluate import evaluate
    from pipeline.stages.report import report
    from pipeline.stages.sample import sample
    from pipeline.stages.select import select

    # Rounding depends on the number of threads, so that it is the same in every process and mode.
    torch.set_num_threads(max(1, int(run.config.cluster.cpus_per_actor)))
    with workers as (executor, trainer):
        estimate(run, executor, progress)
        sample(run, executor, progress)
        executor.release()
        select(run, progress)
        deform(run, trainer, progress)
        evaluate(run, progress)
    progress.note(f"Report: {report(run)}")


def show_result(run: Run, console: Console) -> None:
    """Print the evaluation table and the place of the report."""
    from pipeline.stages.evaluate import evaluation_table

    console.print(evaluation_table(run.storage.read_json("evaluation.json")))
    console.print(f"{run.uri}/report.html")


@contextmanager
def in_this_process() -> Iterator[tuple[Executor, Trainer]]:
    """The reference: one process, without Ray."""
    from pipeline.stages.deform import train_in_process

    yield SerialExecutor(), train_in_process
