"""A model whose draws reach less far than the walks learns again nearer by, once, whatever interrupts it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.fitting.job import FitJob, Told, weights_path
from pipeline.posterior import Posterior
from pipeline.progress import LogProgress
from pipeline.run import Run
from pipeline.stages import deform as stage
from pipeline.stages.check_results import Results
from pipeline.stages.learned_radius import NEARER, learned_radius, next_radius
from pipeline.store import SampleStore
from tests.runs import moved
from tests.test_deformation_runs import IRIS, chosen


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def walks(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return chosen(IRIS, tmp_path_factory.mktemp("nearer"))


@pytest.mark.parametrize(("share", "again"), [(0.25, True), (0.8, False)])
def test_it_learns_again_where_draws_fall_far_short_and_goes_on_after_a_kill(
    share: float, again: bool, walks: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = moved(walks, tmp_path)
    shutil.rmtree(f"{run.uri}/deformation", ignore_errors=True)
    selected = float(run.storage.read_json("radius.json")["radius"])
    nearer = selected * math.sqrt(share)
    fits: list[tuple[int, float]] = []

    def draws_reach(run: Run, plan: Any, models: Any, choice: dict[str, Any]) -> dict[str, Any]:
        reach = share if choice["radius"] == selected else 1.0
        return {"draw_radius": reach * choice["radius"], "draw_radius_curve": []}

    def trainer(run: Run, jobs: Sequence[FitJob], told: Told) -> None:
        for job in jobs:
            if len(fits) == 3 and killed:
                killed.clear()
                raise Killed
            fits.append((job.start, job.radius))
            stage.train_in_process(run, [job], told)

    monkeypatch.setattr(stage, "choose_draw_radius", draws_reach)
    killed = [True]
    if again:
        with pytest.raises(Killed):
            stage.deform(run, trainer, LogProgress())
    stage.deform(run, trainer, LogProgress())
    first = [(0, selected), (1, selected)]
    assert fits == first + ([(0, nearer), (1, nearer)] if again else []), "nothing is fitted twice"
    facts = run.storage.read_json("deformation/deformation.json")
    assert facts["radius"] == selected and facts["learned_to"] == (nearer if again else selected)
    assert Posterior(run).radius == pytest.approx(nearer if again else share * selected)
    stage.deform(run, trainer, LogProgress())
    assert len(fits) == (4 if again else 2), "a finished one is left alone"
    if again:
        run.storage.replace(NEARER, run.storage.read(NEARER).replace(b'"radius"', b'"radios"'))
        assert ("damaged", NEARER) in [wrong[:2] for wrong in Results(run.storage).wrong], "or nobody mends it"


def test_a_fit_that_comes_back_as_the_best_is_not_made_again(
    walks: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = moved(walks, tmp_path)
    shutil.rmtree(f"{run.uri}/deformation", ignore_errors=True)
    selected = float(run.storage.read_json("radius.json")["radius"])
    fits: list[float] = []
    first: list[bytes] = []

    def worse_nearer_by(run: Run, plan: Any, models: Any, choice: dict[str, Any]) -> dict[str, Any]:
        score = 9.0 if choice["radius"] == selected else 10.0
        curve = [{"radius": choice["radius"], "validation_nll": score}]
        return {"draw_radius": choice["radius"], "draw_radius_curve": curve}

    def trainer(run: Run, jobs: Sequence[FitJob], told: Told) -> None:
        fits.extend(job.radius for job in jobs)
        stage.train_in_process(run, jobs, told)
        first.extend(run.storage.read(job.weights) for job in jobs)

    monkeypatch.setattr(stage, "choose_draw_radius", worse_nearer_by)
    stage.deform(run, trainer, LogProgress())
    assert fits == [selected, selected, selected / 2, selected / 2]
    assert [run.storage.read(weights_path(start)) for start in (0, 1)] == first[:2]
    assert run.storage.read_json("deformation/deformation.json")["learned_to"] == selected
    assert not run.storage.list("deformation/kept")


def test_what_was_found_for_other_blocks_does_not_count(walks: Run, tmp_path: Path) -> None:
    run = moved(walks, tmp_path)
    shutil.rmtree(f"{run.uri}/deformation", ignore_errors=True)
    selected = float(run.storage.read_json("radius.json")["radius"])
    run.storage.replace_json(NEARER, {"trained_on": "others", "selected": selected, "radius": selected / 4})
    fits: list[float] = []

    def trainer(run: Run, jobs: Sequence[FitJob], told: Told) -> None:
        fits.extend(job.radius for job in jobs)
        stage.train_in_process(run, jobs, told)

    stage.deform(run, trainer, LogProgress())
    assert fits[:2] == [selected, selected]


@pytest.mark.parametrize(
    ("scores", "radii"),
    [
        ((0.30,), (8.0,)),  # as good as the walks, whose validation NLL is .30
        ((0.40, 0.30), (8.0, 4.0)),
        ((0.40, 0.35, 0.32), (8.0, 4.0, 2.0)),  # no more than three
        ((0.40, 0.45), (8.0, 4.0, 8.0)),  # the better one comes back
        ((0.40, None), (8.0, 4.0, 8.0)),
        ((0.40, 0.35, 0.36), (8.0, 4.0, 2.0, 4.0)),
    ],
)
def test_draws_that_are_worse_than_the_walks_are_learned_nearer_while_that_helps_and_the_best_stays(
    scores: tuple[float | None, ...], radii: tuple[float, ...], walks: Run, tmp_path: Path
) -> None:
    run = moved(walks, tmp_path)
    if run.storage.exists(NEARER):
        run.storage.delete(NEARER)
    plan = SampleStore.open(run.storage).plan
    choice = {"radius": 8.0, "curve": [{"radius": 4.0, "validation_nll": 0.1}, {"radius": 8.0, "validation_nll": 0.30}]}
    seen = [8.0]
    for score in [*scores, 0.0]:
        curve = [{"radius": seen[-1], "validation_nll": score}]
        tuned = {"draw_radius": seen[-1], "draw_radius_curve": curve}
        further = next_radius(run, plan, "these", choice, tuned)
        if further is None:
            break
        assert learned_radius(run, "these", 8.0) == further, "a killed one goes on there"
        seen.append(further)
    assert tuple(seen) == radii
    assert learned_radius(run, "others", 8.0) == 8.0
