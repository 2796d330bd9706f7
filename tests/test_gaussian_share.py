"""What draws: learned points, a Gaussian of the walks' points, or some of both, as validation rows say."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from scipy import stats

from pipeline.bayes.deformation import landed
from pipeline.bayes.deformation.gaussian import Gaussian
from pipeline.bayes.deformation.landed import Landed
from pipeline.bayes.deformation.landing import Landing
from pipeline.bayes.deformation.residual import Residual
from pipeline.errors import InputError, RunError
from pipeline.fitting.fit import SerialTeam, fit
from pipeline.fitting.job import FitJob, facts_path
from pipeline.fitting.loading import dealt, gaussian_beside, gaussian_of, load_learned, load_sources
from pipeline.plan import stream
from pipeline.posterior import Posterior
from pipeline.progress import LogProgress
from pipeline.run import Run
from pipeline.stages import deform as stage
from pipeline.stages import gaussian_share
from pipeline.stages.comparison import Comparison
from pipeline.stages.draw_radius import draws_at
from pipeline.stages.gaussian_share import LEAST, SHARES, _mixtures, posterior_mean_share
from pipeline.store import SampleStore
from tests.runs import copy_of

SUMMARY = "deformation/deformation.json"


FINE = np.linspace(0, 1, 20_001)


def mixed(first: np.ndarray, second: np.ndarray, shares: np.ndarray = FINE) -> np.ndarray:
    """NLL of each row under (1 - w) p + w q."""
    with np.errstate(divide="ignore"):
        return -np.log(np.outer(1 - shares, np.exp(-first)) + np.outer(shares, np.exp(-second)))


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 1), (3, 0), (2, 5), (40, 2), (0, 200)])
def test_rows_that_only_one_can_explain_give_the_mean_of_a_beta_law(first: int, second: int) -> None:
    """Uniform before, Beta(second + 1, first + 1) after; rows that both explain alike, or neither, change nothing."""
    known, none = np.full(7, 0.3), np.full(3, np.inf)
    p = np.concatenate([known, np.zeros(first), np.full(second, np.inf), none])
    q = np.concatenate([known, np.full(first, np.inf), np.zeros(second), none])
    expected = stats.beta(second + 1, first + 1).mean()
    assert posterior_mean_share(FINE, mixed(p, q)) == pytest.approx(expected, abs=1e-4)
    assert posterior_mean_share(FINE, mixed(q, p)) == pytest.approx(1 - expected, abs=1e-4)


def test_sixteenths_are_fine_enough() -> None:
    """For rows as they come, and too coarse a choice of shares is seen."""
    rng = np.random.default_rng(0)
    first, second = rng.gamma(1.0, 0.7, 50), rng.gamma(1.0, 0.8, 50)
    expected = posterior_mean_share(FINE, mixed(first, second))
    assert posterior_mean_share(SHARES, mixed(first, second, SHARES)) == pytest.approx(expected, abs=0.01)
    ends = np.array([0.0, 1.0])
    assert abs(posterior_mean_share(ends, mixed(first, second, ends)) - expected) > 0.1


def test_mixtures_are_scored_with_as_many_draws_as_a_prediction_averages(tmp_path: Path) -> None:
    """The NLL of each share is that of the draws which a model with this share would average."""
    run = copy_of("classes", tmp_path)
    store, radius = SampleStore.open(run.storage), run.storage.read_json(SUMMARY)["radius"]
    rows = run.dataset.validation
    c = Comparison.open(run, store.plan, {"validation": rows.x})
    models = [load_learned(run, start) for start in range(2)]
    gaussians = [gaussian_beside(model, store, start, radius) for start, model in enumerate(models)]
    found = _mixtures(c, draws_at(c, models, radius), draws_at(c, gaussians, radius, "test"))
    learned, gaussian = list(draws_at(c, models, radius)), list(draws_at(c, gaussians, radius, "test"))
    assert [len(theta) for _, theta in learned] == [6, 6] == [len(theta) for _, theta in gaussian]
    for number, most in ((0, 0), (4, 1), (8, 3), (16, 6)):  # of six, as they are dealt
        some = [(start, theta[: 6 - most]) for start, theta in learned]
        some += [(start, theta[:most]) for start, theta in gaussian]
        np.testing.assert_allclose(found[number], c.validation_rows([(s, t) for s, t in some if len(t)]), rtol=1e-12)


def test_where_no_share_gives_every_row_a_chance_what_was_learned_stays() -> None:
    never = np.array([[np.inf, 0.1], [0.1, np.inf]])
    assert posterior_mean_share(np.array([0.0, 1.0]), never) == 0
    assert posterior_mean_share(SHARES, np.full((len(SHARES), 3), np.inf)) == 0


def test_draws_of_the_gaussian_go_back_to_a_curved_fiber(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points of the unit circle: their combinations lie off it, and each goes down to the level or stays."""
    angles = torch.linspace(0, 2 * torch.pi, 40, dtype=torch.float64)
    circle, star, level = torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([1.0, 0.0]).double(), 0.02

    def slope(theta: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        off = theta.square().sum(1) - 1
        return 10 * off[:, None] * theta, 2.5 * off.square()

    plain = Gaussian(2.0, 2, len(circle), lambda radius: iter(circle.split(7)))
    lands = Landed(plain, Landing(star, [2.0], [level], slope, steps=8))
    before, after = (model.draw(np.random.default_rng(5), 200) for model in (plain, lands))
    above = slope(before, 0)[1] > level
    assert 100 < above.sum() < 200 and torch.equal(before[~above], after[~above])
    far = before.norm(dim=1) > 0.2  # nearer to the centre the slope says nothing
    assert (slope(after, 0)[1][far] < 2 * level).all() and slope(before, 0)[1].mean() > 20 * level
    monkeypatch.setattr(landed, "PIECE", 14)
    torch.testing.assert_close(lands.draw(np.random.default_rng(5), 200), after)
    lands.landing.steps = 0
    torch.testing.assert_close(lands.draw(np.random.default_rng(5), 200), before)


def redone(run: Run, share: float | str = "auto") -> dict:
    """Settle again what draws, with this setting; the fits stay."""
    settings = run.config.deformation.model_copy(update={"gaussian_share": share})
    run = dataclasses.replace(run, config=run.config.model_copy(update={"deformation": settings}))
    run.storage.delete(SUMMARY)
    stage.deform(run, stage.train_in_process, LogProgress())
    return run.storage.read_json(SUMMARY)


def test_the_gaussian_draws_where_what_was_learned_predicts_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the driver was killed after the facts of the first start."""
    run = copy_of("classes", tmp_path)
    monkeypatch.setattr(stage, "next_radius", lambda *_: None)
    monkeypatch.setattr(Residual, "draw", lambda self, rng, n, radius=None: torch.zeros(n, self.dim))
    found = []
    for _ in range(2):
        found.append(redone(run))
        run.storage.replace_json(facts_path(1), run.storage.read_json(facts_path(1)) | {"gaussian_share": 0.0})
    assert found[0] == found[1] and found[0]["gaussian_share"] > 0.5
    assert found[0]["learned_validation_nll"] > found[0]["gaussian_validation_nll"] + 0.1
    assert found[0]["mixed_validation_nll"] < found[0]["learned_validation_nll"]


def of_the_gaussian(run: Run, theta: torch.Tensor, starts: np.ndarray, seed: int) -> np.ndarray:
    """Which draws are those of the Gaussian of their start, after the landing of what was learned there."""
    radius, store = float(run.storage.read_json("radius.json")["radius"]), SampleStore.open(run.storage)
    found = np.empty(len(starts), dtype=bool)
    for start in np.unique(starts).tolist():
        landing = cast(Residual, load_learned(run, start)).landing
        drawn = gaussian_of(store, start, radius).draw(stream(seed, "posterior-gaussian", start), len(starts))
        drawn = landing.land(drawn - landing.theta_star, radius) + landing.theta_star
        gaps = torch.cdist(theta[starts == start], drawn).min(1).values
        found[starts == start] = (gaps < 1e-3 * drawn.norm(dim=1).mean()).numpy()
    return found


def test_a_share_that_is_asked_for_is_drawn_and_the_rest_is_learned(tmp_path: Path) -> None:
    run = copy_of("classes", tmp_path)
    found = redone(run, 0.25)
    assert found["gaussian_share"] == 0.25 and "mixed_validation_nll" not in found
    assert found["potential_rise_learned"] < found["potential_rise"]
    posterior = Posterior(run)
    (batch,) = posterior.draw_batches(40, seed=3)
    gaussian = of_the_gaussian(run, batch.theta, batch.start, seed=3)
    assert (batch.learned == ~gaussian).all()
    assert [(batch.start == start).sum() for start in range(2)] == [20, 20]
    assert [gaussian[batch.start == start].sum() for start in range(2)] == [5, 5]
    torch.testing.assert_close(posterior.draw(13, seed=3), batch.theta[:13], rtol=1e-4, atol=1e-5)
    pieces = torch.cat([part.theta for part in posterior.draw_batches(40, seed=3, batch=7)])
    torch.testing.assert_close(pieces, batch.theta, rtol=1e-4, atol=1e-5)

    redone(run, 0)
    learned = Posterior(run).draw(30, seed=3)
    torch.testing.assert_close(batch.theta[torch.from_numpy(~gaussian)], learned, rtol=1e-4, atol=1e-5)
    redone(run, 1)
    (batch,) = Posterior(run).draw_batches(10)
    assert of_the_gaussian(run, batch.theta, batch.start, seed=0).all()


@pytest.mark.parametrize(("found", "share"), [(LEAST - 0.01, 0), (LEAST + 0.01, LEAST + 0.01), (0.96, 1), (0.3, 0.3)])
def test_small_shares_of_either_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: float, share: float
) -> None:
    """Learned draws stay at the radius that was chosen for them, those of the Gaussian at that of the walks."""
    run = copy_of("classes", tmp_path)
    radius, nearer = run.storage.read_json(SUMMARY)["radius"], 0.5 * run.storage.read_json(SUMMARY)["radius"]
    monkeypatch.setattr(gaussian_share, "posterior_mean_share", lambda *_: found)
    monkeypatch.setattr(stage, "choose_draw_radius", lambda *_: {"draw_radius": nearer, "draw_radius_curve": []})
    settled = redone(run)
    assert settled["gaussian_share"] == share and settled["draw_radius"] == (radius if share == 1 else nearer)
    sources = {source.name: source for source in load_sources(run, 0)}
    assert sources.keys() == {name for name, part in (("learned", 1 - share), ("gaussian", share)) if part}
    assert all(s.model.radius == (nearer if s.name == "learned" else radius) for s in sources.values())
    assert all(isinstance(s.model, Landed if s.name == "gaussian" else Residual) for s in sources.values())
    if share == 0.3:
        assert [(s.name, n) for s, n in dealt(load_sources(run, 0), 10)] == [("learned", 7), ("gaussian", 3)]


def test_the_first_draws_are_of_different_starts(tmp_path: Path) -> None:
    run = copy_of("classes", tmp_path)
    redone(run, 0.5)
    (batch,) = Posterior(run).draw_batches(6)
    assert sorted(batch.start[:2].tolist()) == [0, 1] and sorted(batch.start.tolist()) == [0, 0, 0, 1, 1, 1]


def test_a_regression_keeps_what_was_learned(tmp_path: Path) -> None:
    assert redone(copy_of("curve", tmp_path))["gaussian_share"] == 0


def test_a_share_without_walks_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where only the last start has none, and a settled one whose walks have gone since."""
    run = copy_of("classes", tmp_path)
    redone(run, 0.5)
    counted = SampleStore.undiverged
    monkeypatch.setattr(SampleStore, "undiverged", lambda self, start: 0 if start else counted(self, start))
    with pytest.raises(InputError, match="points of 0 walks around start 1, but 12"):
        load_sources(run, 1)
    with pytest.raises(RunError, match=r"deformation\.gaussian_share: 0\.5 asks .*start 1 has fewer\. Set it to 0"):
        redone(run, 0.5)


def test_facts_of_an_earlier_version_are_refused(tmp_path: Path) -> None:
    run = copy_of("classes", tmp_path)
    facts = run.storage.read_json(facts_path(0))
    run.storage.replace_json(facts_path(0), {k: v for k, v in facts.items() if k != "gaussian_share"})
    with pytest.raises(InputError, match="earlier version"):
        load_sources(run, 0)
    before = {k: v for k, v in facts.items() if k != "gaussian_lands"}
    run.storage.replace_json(facts_path(0), before | {"gaussian_share": 0.5})
    with pytest.raises(InputError, match="earlier version, whose Gaussian draws did not land. Remove"):
        load_sources(run, 0)


def test_a_radius_beyond_the_walks_is_refused_whoever_draws(tmp_path: Path) -> None:
    run = copy_of("classes", tmp_path)
    redone(run, 1)
    with pytest.raises(InputError, match="where walks end"):
        Posterior(run).draw(2, radius=1e4)


def test_draws_of_the_gaussian_reach_the_radius_that_is_asked_for(tmp_path: Path) -> None:
    """Between records, and nearer than the first, points are those of the nearest one, stretched."""
    run = copy_of("classes", tmp_path)
    store = SampleStore.open(run.storage)
    first, second = store.plan.radii()[:2].tolist()
    model = cast(Residual, load_learned(run, 0))
    model.landing.steps = 0
    star = model.chain.theta_star

    def spread(radius: float) -> torch.Tensor:
        gaussian = gaussian_beside(model, store, 0, first)
        return gaussian.draw(np.random.default_rng(0), 20, radius) - star

    torch.testing.assert_close(spread(first), gaussian_of(store, 0, first).draw(np.random.default_rng(0), 20) - star)
    torch.testing.assert_close(spread(0.01 * first), 0.01 * spread(first), rtol=1e-3, atol=1e-5)
    between = 0.3 * first + 0.7 * second
    torch.testing.assert_close(spread(between), between / second * spread(second), rtol=1e-3, atol=1e-5)


def test_another_driver_that_ends_the_same_fit_keeps_what_is_settled(tmp_path: Path) -> None:
    run = copy_of("classes", tmp_path)
    facts, found = run.storage.read_json(facts_path(1)), run.storage.read_json(SUMMARY)
    job = FitJob(1, found["learned_to"], found["trained_on"])
    fit(run, job, SerialTeam(run, job))
    assert run.storage.read_json(facts_path(1)) == facts
    run.storage.delete(job.weights)
    fit(run, job, SerialTeam(run, job))
    anew = run.storage.read_json(facts_path(1))
    assert "gaussian_share" not in anew and anew["weights_sha256"] == facts["weights_sha256"]
