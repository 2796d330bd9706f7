"""A model whose draws reach less far than the walks learns again nearer by, once, whatever interrupts it."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.fitting.job import FitJob
from pipeline.posterior import Posterior
from pipeline.progress import LogProgress
from pipeline.run import Run
from pipeline.stages import deform as stage
from pipeline.stages.check_results import Results
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

    def trainer(run: Run, job: FitJob) -> None:
        if len(fits) == 3 and killed:
            killed.clear()
            raise Killed
        fits.append((job.start, job.radius))
        stage.train_in_process(run, job)

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
        run.storage.replace(stage.NEARER, run.storage.read(stage.NEARER).replace(b'"radius"', b'"radios"'))
        assert ("damaged", stage.NEARER) in [wrong[:2] for wrong in Results(run.storage).wrong], "or nobody mends it"


def test_what_was_found_for_other_blocks_does_not_count(walks: Run, tmp_path: Path) -> None:
    run = moved(walks, tmp_path)
    shutil.rmtree(f"{run.uri}/deformation", ignore_errors=True)
    selected = float(run.storage.read_json("radius.json")["radius"])
    run.storage.replace_json(stage.NEARER, {"trained_on": "others", "selected": selected, "radius": selected / 4})
    fits: list[float] = []

    def trainer(run: Run, job: FitJob) -> None:
        fits.append(job.radius)
        stage.train_in_process(run, job)

    stage.deform(run, trainer, LogProgress())
    assert fits[:2] == [selected, selected]
