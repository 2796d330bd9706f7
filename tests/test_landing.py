"""The landing of draws: steps have a closed form, points at the level stay, and only as many as help are taken."""

from __future__ import annotations

import dataclasses
import hashlib
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from pipeline.bayes.deformation.chain import Gains
from pipeline.bayes.deformation.landing import Landing
from pipeline.bayes.deformation.residual import Residual
from pipeline.bayes.target import Potential
from pipeline.build import load_problem
from pipeline.config import parse_config
from pipeline.errors import InputError
from pipeline.fitting import looks, work
from pipeline.fitting.fit import SerialTeam
from pipeline.fitting.job import FitJob, facts_path, weights_path
from pipeline.fitting.landing import LANDED, MOST_STEPS, SLACK, fit_landing
from pipeline.fitting.loading import load_learned
from pipeline.fitting.term import Term
from pipeline.progress import LogProgress
from pipeline.run import Run
from pipeline.stages import deform as stage
from pipeline.stages.select import select
from pipeline.store import SampleStore
from tests.runs import moved, walked
from tests.targets import softmax_classifier

RADIUS = 2.0


def landing_on(potential: Potential, star: Tensor, level: float) -> Landing:
    """A landing that looks at all rows."""
    _, nll_star = potential.nll_gradient(star[None])

    def slope(theta: Tensor, number: int) -> tuple[Tensor, Tensor]:
        gradient, nll = potential.nll_gradient(theta)
        return gradient, nll - nll_star

    return Landing(star, [RADIUS], [level], slope)


def test_a_step_meets_the_level_where_the_nll_is_taken_as_linear() -> None:
    potential, rng = softmax_classifier(), np.random.default_rng(0)
    star, offset = torch.from_numpy(rng.standard_normal((2, 20, potential.network.dim)))
    star = star[0]
    gradient, nll = potential.nll_gradient(offset + star)
    rise = nll - potential.nll(star[None])
    level = float(rise.median())
    landed = next(landing_on(potential, star, level).way_down(offset, RADIUS))
    high = rise > level
    linear = rise + (gradient * (landed - offset)).sum(1)
    torch.testing.assert_close(linear[high], torch.full((10,), level).double())
    along = torch.nn.functional.cosine_similarity(landed - offset, gradient)[high]
    torch.testing.assert_close(along, -torch.ones(10).double())
    assert int(high.sum()) == 10 and torch.equal(landed[~high], offset[~high])


def test_on_a_round_quadratic_the_distance_follows_its_recursion() -> None:
    """r -> r - (h r^2 / 2 - level) / (h r), Newton's iteration for the radius at the level, from outside only."""
    star, h, level, r = torch.zeros(6).double(), 5.0, 3.0, 5.0
    landing = Landing(star, [RADIUS], [level], lambda theta, number: (h * theta, 0.5 * h * theta.square().sum(1)))
    landing.steps = 4
    direction = torch.nn.functional.normalize(torch.arange(1.0, 7.0).double(), dim=0)
    landed = landing.land(r * direction[None], RADIUS)
    for _ in range(4):
        r -= (0.5 * h * r**2 - level) / (h * r)
    torch.testing.assert_close(landed[0], r * direction)
    assert level <= 0.5 * h * r**2 < 1.01 * level


def test_a_step_does_not_undo_the_one_before() -> None:
    """In a valley of curvatures 1 and 30 gradients point back and forth."""
    star, h = torch.zeros(2).double(), torch.tensor([1.0, 30.0]).double()
    level, start = 0.1, torch.tensor([[6.0, 0.6]]).double()

    def slope(theta: Tensor, number: int) -> tuple[Tensor, Tensor]:
        return theta * h, 0.5 * theta.square() @ h

    points = [start, *(p.clone() for p in islice(Landing(star, [RADIUS], [level], slope).way_down(start, RADIUS), 4))]
    steps = [after - before for before, after in pairwise(points)]
    angles = [float(torch.nn.functional.cosine_similarity(*pair)) for pair in pairwise(steps)]
    plain, plain_angles, last = start, [], None
    for _ in range(4):
        gradient, rise = slope(plain, 0)
        step = -gradient * (rise - level) / gradient.square().sum()
        if last is not None:
            plain_angles.append(float(torch.nn.functional.cosine_similarity(last, step)))
        plain, last = plain + step, step
    assert min(angles) > -1e-9 > -0.1 > min(plain_angles)
    assert float(slope(points[-1], 0)[1]) < float(slope(plain, 0)[1])


def test_draws_at_the_level_are_not_looked_at_again() -> None:
    seen: list[int] = []

    def slope(theta: Tensor, number: int) -> tuple[Tensor, Tensor]:
        seen.append(len(theta))
        return theta, 0.5 * theta.square().sum(1)

    landing = Landing(torch.zeros(1), [RADIUS], [0.5], slope, steps=5)
    offset = torch.tensor([[0.5], [4.0], [1.0]])
    landed = landing.land(offset, RADIUS)
    assert seen[:2] == [3, 1] and torch.equal(landed[::2], offset[::2]) and torch.equal(offset[1], torch.tensor([4.0]))
    torch.testing.assert_close(landed[1], landing.land(offset[1:2], RADIUS)[0])


def test_the_level_is_straight_between_marks_and_zero_at_the_estimate() -> None:
    landing = Landing(torch.zeros(2), [1.0, 3.0], [10.0, 20.0], lambda theta, number: (theta, theta[:, 0]))
    assert [landing.level(radius) for radius in (0.5, 1.0, 2.0, 3.0)] == [5.0, 10.0, 15.0, 20.0]


SETTINGS = {
    "name": "landing",
    "data": {"source": "sklearn:iris", "validation": 0.2, "test": 0.2},
    "model": {"hidden": [8]},
    "prior": {"precision": 0.1},
    "walk": {
        "walks": 40,
        "walks_per_shard": 20,
        "length": 6.0,
        "steps": 30,
        "record_every": 5,
        "correction": "momentum",
    },
    "deformation": {"rank": 8, "steps": 0},
    "evaluation": {"draws": 8},
}


@pytest.fixture(scope="module")
def iris(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = walked(parse_config({**SETTINGS, "storage": str(tmp_path_factory.mktemp("landing"))}))
    select(run, LogProgress())
    stage.deform(run, stage.train_in_process, LogProgress())
    return run


def spoiled(run: Run) -> tuple[Residual, Term, SerialTeam]:
    """The model of a run with learned steps that keep the free displacement: its draws lie far too high."""
    model = load_learned(run, 0)
    assert isinstance(model, Residual)
    after = [Gains(torch.zeros_like(g.inside), torch.zeros_like(g.outside)) for g in model.chain.after]
    for gains in after:
        gains.inside[0], gains.outside[0] = 1.0, 1.0
    chain = dataclasses.replace(model.chain, after=after, cores=[torch.zeros_like(core) for core in model.chain.cores])
    model = dataclasses.replace(model, chain=chain, landing=dataclasses.replace(model.landing, steps=0), remainder=None)
    store = SampleStore.open(run.storage)
    job = FitJob(0, model.radius, store.digest())
    team = SerialTeam(run, job)
    return model, Term(run, load_problem(run, 0, store.plan), model, job, team, 1.0, 100), team


def test_draws_that_fit_worse_than_walks_land_at_their_level(iris: Run) -> None:
    model, term, team = spoiled(iris)
    facts = fit_landing(team, model, term)
    rises, most = facts["landing_nll_rise"], LANDED * facts["walk_nll_rise"] + SLACK
    assert rises[0] > 2 * most and 0 < facts["landing_steps"] < MOST_STEPS
    assert len(rises) == facts["landing_steps"] + 1 and rises[-1] <= most < min(rises[:-1])
    drawn = term.nll_rise(model.draw(np.random.default_rng(0), 200))
    assert float(drawn.mean()) < 1.5 * most


def test_rises_from_some_of_the_rows_are_those_of_all_within_sampling(
    iris: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five standard errors, without replacement: a false alarm in 1e6."""
    monkeypatch.setattr(work, "OPERATIONS", 1.0)
    monkeypatch.setattr(work, "FEWEST_JUDGED_ROWS", 30)
    model, term, _ = spoiled(iris)
    potential = load_problem(iris, 0, SampleStore.open(iris.storage).plan).potential
    star, position = model.chain.theta_star, model.draw(np.random.default_rng(0), 1)
    ends = [
        potential.likelihood.nll(potential.network.outputs(t.to(star), potential.x), potential.y)
        for t in (position[0], star)
    ]
    rises, n = (ends[0] - ends[1]).double(), term.work.judged
    assert 30 == n < len(rises)
    error = len(rises) * float(rises.std()) * ((1 - n / len(rises)) / n) ** 0.5
    assert 0 < abs(float(term.nll_rise(position)) - float(rises.sum())) < 5 * error


def test_a_landing_that_climbs_is_not_taken(iris: Run) -> None:
    """The check above fails for a slope with the wrong sign, and then draws stay as they were."""
    model, term, team = spoiled(iris)
    slope = model.landing.slope

    def wrong(theta: Tensor, number: int) -> tuple[Tensor, Tensor]:
        gradient, rise = slope(theta, number)
        return -gradient, rise

    model.landing.slope = wrong
    facts = fit_landing(team, model, term)
    assert facts["landing_steps"] == 0 and len(facts["landing_nll_rise"]) == MOST_STEPS + 1


def test_each_step_of_a_landing_sees_other_rows(iris: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SampleStore.open(iris.storage)
    problem = load_problem(iris, 0, store.plan)
    whole = looks.sample_rows(iris, problem, store.plan, 4)
    assert all(torch.equal(sample, torch.arange(problem.potential.rows)) for sample in whole)
    monkeypatch.setattr(looks, "LOOK_ROWS", 10)
    samples = looks.sample_rows(iris, problem, store.plan, 4)
    assert len(samples) == MOST_STEPS + 1 and all(len(set(sample.tolist())) == 10 for sample in samples)
    assert not set(samples[0].tolist()) & set(samples[1].tolist())
    assert set(torch.cat(samples).tolist()) == set(range(problem.potential.rows))


def test_looks_on_a_sample_are_scaled_to_all_rows(iris: Run) -> None:
    """The mean over samples that hold every row once is the gradient, and the rise, on all rows."""
    problem = load_problem(iris, 0, SampleStore.open(iris.storage).plan)
    parts = [torch.arange(first, problem.potential.rows, 3) for first in range(3)]
    assert len({len(part) for part in parts}) == 1
    _, slope = looks.looks_of(problem, [parts[0], *parts])
    theta = (problem.theta_star + 0.1)[None]
    gradient, nll = problem.potential.nll_gradient(theta)
    found = [slope(theta, number) for number in range(3)]
    torch.testing.assert_close(sum(g for g, _ in found) / 3, gradient, rtol=1e-4, atol=1e-4)
    rise = nll - problem.potential.nll(problem.theta_star[None])
    torch.testing.assert_close(sum(n for _, n in found) / 3, rise, rtol=1e-4, atol=1e-4)


def test_the_landing_survives_its_file(iris: Run) -> None:
    model, _, _ = spoiled(iris)
    model.landing.steps = 3
    again = Residual.from_tensors(model.to_tensors(), model.chain.look, model.landing.slope)
    draws = [m.draw(np.random.default_rng(1), 4) for m in (model, again)]
    assert torch.equal(*draws)
    model.landing.steps = 0
    assert not torch.equal(model.draw(np.random.default_rng(1), 4), draws[0])


def test_weights_without_a_landing_are_refused_with_the_way_out(iris: Run, tmp_path: Path) -> None:
    run, path = moved(iris, tmp_path), weights_path(0)
    old = save({name: t for name, t in load(run.storage.read(path)).items() if not name.startswith("landing.")})
    run.storage.replace(path, old)
    facts = run.storage.read_json(facts_path(0)) | {"weights_sha256": hashlib.sha256(old).hexdigest()}
    run.storage.replace_json(facts_path(0), facts)
    with pytest.raises(InputError, match="earlier version"):
        load_learned(run, 0)
