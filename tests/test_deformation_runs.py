"""The deformation of small runs: what it must reproduce exactly, what it draws, and what survives a broken fit."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load
from scipy import stats
from torch import Tensor

from pipeline.bayes.deformation.chain import Gains
from pipeline.bayes.deformation.residual import Residual
from pipeline.build import load_problem
from pipeline.config import parse_config
from pipeline.errors import InputError, RunError
from pipeline.fitting import work
from pipeline.fitting.fit import SerialTeam, facts_path, fit
from pipeline.fitting.job import FitJob, Told
from pipeline.fitting.loading import load_learned
from pipeline.fitting.reading import Directions
from pipeline.fitting.term import Term
from pipeline.posterior import Posterior
from pipeline.progress import LogProgress
from pipeline.run import Run
from pipeline.stages import deform as stage
from pipeline.stages.select import select
from pipeline.store import SampleStore
from tests.checks import FALSE_ALARM
from tests.runs import moved, walked

LINEAR = {
    "name": "linear",
    "data": {"source": "sklearn:diabetes", "task": "regression", "validation": 0.2, "test": 0.2},
    "model": {"hidden": []},
    "likelihood": {"kind": "gaussian", "noise_std": 0.7},
    "walk": {
        "walks": 64,
        "walks_per_shard": 32,
        "length": 2.0,
        "steps": 20,
        "record_every": 5,
        "correction": "plain",
        "guard": False,
    },
    "deformation": {"rank": 11, "steps": 0},
    "evaluation": {"draws": 8},
}
"""A linear network: U is exactly quadratic, so that a walk's end is a linear function of its drift."""
IRIS = {
    "name": "tiny",
    "data": {"source": "sklearn:iris", "validation": 0.2, "test": 0.2},
    "model": {"hidden": [6]},
    "map": {"starts": 2, "steps": 300},
    "prior": {"precision": 0.1},
    "walk": {"walks": 48, "walks_per_shard": 12, "length": 20.0, "steps": 20, "record_every": 2, "correction": "plain"},
    "deformation": {"rank": 8, "hidden": [16], "steps": 60},
    "evaluation": {"draws": 8},
}


def chosen(settings: dict, folder: Path) -> Run:
    """Walks of these settings, with the radius that was chosen for them."""
    run = walked(parse_config({**settings, "storage": str(folder)}))
    select(run, LogProgress())
    return run


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = chosen(LINEAR, tmp_path_factory.mktemp("linear"))
    stage.deform(run, stage.train_in_process, LogProgress())
    return run


@pytest.fixture(scope="module")
def iris_walks(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return chosen(IRIS, tmp_path_factory.mktemp("iris"))


@pytest.fixture(scope="module")
def iris(iris_walks: Run) -> Run:
    stage.deform(iris_walks, stage.train_in_process, LogProgress())
    return iris_walks


def summary(run: Run) -> dict:
    return run.storage.read_json("deformation/deformation.json")


def test_on_a_quadratic_held_out_walks_are_reproduced(linear: Run) -> None:
    found = summary(linear)
    assert found["heldout_error"] < 1e-6 and len(found["heldout_error_by_radius"]) > 1
    assert all(point["error"] < 1e-6 for point in found["heldout_error_by_radius"])


def test_on_a_quadratic_draws_rise_as_walks_do(linear: Run) -> None:
    store, radius = SampleStore.open(linear.storage), summary(linear)["radius"]
    walks = np.concatenate([points.potential for points in store.points(radius)])
    draws = np.concatenate([b.potential for b in Posterior(linear).draw_batches(400, seed=3, potential=True)])  # type: ignore
    z = (draws.mean() - walks.mean()) / np.hypot(draws.std() / 20, walks.std() / 8)
    assert abs(z) < stats.norm.ppf(1 - FALSE_ALARM / 2)


def test_a_broken_model_is_seen(linear: Run, tmp_path: Path) -> None:
    """The first check fails for weights that are half as large."""
    run = moved(linear, tmp_path)
    model = load_learned(run, 0)
    assert isinstance(model, Residual)
    store, radius = SampleStore.open(run.storage), model.radius
    points = next(store.points(radius))
    directions = directions_of(run, points.walk)
    truth = torch.from_numpy(points.theta) - model.chain.theta_star
    good = model.deform(directions, radius) - model.chain.theta_star
    halved = [Gains(gains.inside / 2, gains.outside) for gains in model.chain.after]
    broken = dataclasses.replace(model.chain, after=halved, cores=[core / 2 for core in model.chain.cores])
    bad = dataclasses.replace(model, chain=broken).deform(directions, radius) - model.chain.theta_star
    free = truth - directions * radius
    assert error(good, truth, free) < 1e-5
    assert error(bad, truth, free) > 1e-3


def directions_of(run: Run, walks: np.ndarray) -> Tensor:
    store = SampleStore.open(run.storage)
    return Directions(run, store.plan, load_problem(run, 0), torch.float32).of(walks)


def error(found: Tensor, truth: Tensor, free: Tensor) -> float:
    return float((found - truth).square().sum() / free.square().sum())


def test_same_seed_same_draws(iris: Run) -> None:
    first, again = Posterior(iris), Posterior.load(iris.uri)
    assert torch.equal(first.draw(20, seed=4), again.draw(20, seed=4))
    assert not torch.equal(first.draw(20, seed=4), first.draw(20, seed=5))
    pieces = torch.cat([batch.theta for batch in first.draw_batches(20, seed=4, batch=3)])
    torch.testing.assert_close(pieces, first.draw(20, seed=4), rtol=1e-4, atol=1e-5)


def test_weights_survive_their_file(iris: Run) -> None:
    model = load_learned(iris, 1)
    assert isinstance(model, Residual)
    again = Residual.from_tensors(model.to_tensors(), model.chain.look, model.landing.slope)
    rng = np.random.default_rng
    assert torch.equal(model.draw(rng(0), 4), again.draw(rng(0), 4))


def test_draws_at_any_recorded_radius_and_no_other(iris: Run) -> None:
    posterior = Posterior(iris)
    for radius in (0.2, 1.1, 20.0):
        assert torch.isfinite(posterior.draw(4, radius=radius)).all()
    with pytest.raises(InputError, match="at most 20"):
        posterior.draw(4, radius=20.5)
    with pytest.raises(InputError, match="at least 1"):
        posterior.draw(0)


def test_predictions_are_averages_in_the_unit_of_the_target(linear: Run) -> None:
    data = linear.dataset
    from sklearn.datasets import load_diabetes

    raw, posterior = np.asarray(load_diabetes(return_X_y=True)[0]), Posterior(linear)
    mean, aleatoric, epistemic = posterior.predict(raw[:5], draws=16)
    problem = posterior.problem(0)
    x = torch.as_tensor(np.asarray(data.schema.encode(raw[:5]))).to(problem.theta_star)
    outputs = torch.stack([problem.network.outputs(t, x)[:, 0] for t in posterior.draw(16)]).double().numpy()
    np.testing.assert_allclose(mean, outputs.mean(0) * data.schema.y_std + data.schema.y_mean, rtol=1e-5)
    np.testing.assert_allclose(epistemic, outputs.std(0) * data.schema.y_std, rtol=1e-3)
    np.testing.assert_allclose(aleatoric, 0.7 * data.schema.y_std, rtol=1e-5)


def test_state_dicts_load_into_the_network(iris: Run) -> None:
    posterior = Posterior(iris)
    theta = posterior.draw(2, seed=1)
    for row, state in zip(theta, posterior.state_dicts(2, seed=1), strict=True):
        module = posterior.problem(0).network.module
        module.load_state_dict(state, strict=True)
        assert torch.equal(posterior.problem(0).network.theta(), row)


def test_a_finished_fit_is_left_alone_and_other_blocks_are_learned_anew(iris: Run, tmp_path: Path) -> None:
    run, fits = moved(iris, tmp_path), []

    def trainer(run: Run, jobs: Sequence[FitJob], told: Told) -> None:
        fits.extend(job.start for job in jobs)
        stage.train_in_process(run, jobs, told)

    stage.deform(run, trainer, LogProgress())
    assert fits == []
    run.storage.replace_json("deformation/deformation.json", summary(run) | {"trained_on": "of other blocks"})
    for start in (0, 1):
        facts = run.storage.read_json(facts_path(start))
        run.storage.replace_json(facts_path(start), facts | {"trained_on": "of other blocks"})
    stage.deform(run, trainer, LogProgress())
    assert fits == [0, 1]
    assert summary(run)["trained_on"] == SampleStore.open(run.storage).digest()
    assert not run.storage.list("deformation/train")


@pytest.mark.parametrize("stage_of_death", ["chain", "remainder"])
def test_a_killed_fit_goes_on_and_gives_the_same_weights(iris: Run, tmp_path: Path, stage_of_death: str) -> None:
    run = moved(iris, tmp_path)
    job = FitJob(0, summary(run)["learned_to"], summary(run)["trained_on"])
    run.storage.delete(job.weights)

    class Killed(Exception):
        pass

    class Dying(SerialTeam):
        def save(self, step: int, tensors: dict, facts: dict) -> None:
            super().save(step, tensors, facts)
            if facts["step"] if stage_of_death == "remainder" else len(facts["squares"]) == 2:
                raise Killed

    restored: list[dict] = []

    class Next(SerialTeam):
        def restore(self) -> tuple[dict, dict] | None:
            found = super().restore()
            restored.append(found[1] if found else {})
            return found

    with pytest.raises(Killed):
        fit(run, job, Dying(run, job))
    fit(run, job, Next(run, job))
    assert len(restored[0]["squares"]) >= 2 and bool(restored[0]["step"]) == (stage_of_death == "remainder")
    before, after = load(iris.storage.read(job.weights)), load(run.storage.read(job.weights))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_fit_that_may_do_least_is_whole(iris: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = moved(iris, tmp_path)
    job = FitJob(0, summary(run)["learned_to"], summary(run)["trained_on"])
    for name, value in {"OPERATIONS": 1, "FEWEST_STEPS": 20, "FEWEST_ROWS": 10, "FEWEST_JUDGED_ROWS": 30}.items():
        monkeypatch.setattr(work, name, value)
    fit(run, job, SerialTeam(run, job))
    facts = run.storage.read_json(facts_path(0))
    assert facts["steps"] == 20 and [point["step"] for point in facts["curve"]] == [0, 4, 8, 12, 16, 20]
    assert torch.isfinite(load_learned(run, 0).draw(np.random.default_rng(0), 8)).all()


def test_a_training_that_gives_no_numbers_is_left_out(
    iris: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fresh draws without a finite potential, and every loss: what is written is JSON, and the chain stays."""
    run = moved(iris, tmp_path)
    shutil.rmtree(Path(run.uri, "deformation"))
    monkeypatch.setattr(Term, "rise", lambda self, position: torch.full((len(position),), torch.inf).double())
    monkeypatch.setattr(Term, "pull", lambda self, base, correction, step: (correction.sum() * torch.nan, 1.0))
    stage.deform(run, stage.train_in_process, LogProgress())
    facts = summary(run)["starts"][0]
    assert not facts["remainder"] and len(facts["curve"]) > 1
    assert {point["rise_ratio"] for point in facts["curve"]} == {None} and facts["curve"][1]["loss"] is None
    assert torch.isfinite(Posterior(run).draw(8)).all()


def test_kind_none_does_nothing(iris_walks: Run, tmp_path: Path) -> None:
    run = of_kind(iris_walks, tmp_path, kind="none")
    stage.deform(run, stage.train_in_process, LogProgress())
    assert not run.storage.exists("deformation/deformation.json")
    with pytest.raises(InputError, match="no deformation"):
        Posterior(run)


@pytest.mark.parametrize("kind", ["gaussian", "metric"])
def test_other_kinds_fit_and_draw(kind: str, iris_walks: Run, tmp_path: Path) -> None:
    run = of_kind(iris_walks, tmp_path, kind=kind)
    stage.deform(run, stage.train_in_process, LogProgress())
    draws = Posterior(run).draw(6, seed=2)
    assert draws.shape == (6, SampleStore.open(run.storage).plan.dim) and torch.isfinite(draws).all()
    assert torch.equal(draws, Posterior(run).draw(6, seed=2))
    assert summary(run)["kind"] == kind


def of_kind(run: Run, folder: Path, kind: str) -> Run:
    run = moved(run, folder)
    shutil.rmtree(f"{run.uri}/deformation", ignore_errors=True)
    deformation = run.config.deformation.model_copy(update={"kind": kind})
    return dataclasses.replace(run, config=run.config.model_copy(update={"deformation": deformation}))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_metric_kind_refuses_walks_that_never_moved(workers: int, iris_walks: Run, tmp_path: Path) -> None:
    run = of_kind(iris_walks, tmp_path, kind="metric")
    team = SerialTeam(run, FitJob(0, 2.0, ""))
    still = [dataclasses.replace(rows, radius=np.full(len(rows.walk), 2.0)) for rows in team.rows()]
    team.size, team.rows = workers, lambda: iter(still)  # type: ignore[method-assign]
    with pytest.raises(RunError, match=r"two recorded radii .* Use a smaller walk\.record_every \(it is 2\)"):
        fit(run, FitJob(0, 2.0, ""), team)


def test_what_does_not_fit_into_memory_is_refused_with_arithmetic(iris: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "machine_memory", lambda: 1000)
    with pytest.raises(RunError, match=r"D x \(3 x rank \+ 40\)"):
        stage.check_memory(iris, 11_000_000)
