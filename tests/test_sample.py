"""The estimate stage and the automatic settings of the walk, on small real runs in one process."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats

from pipeline.build import load_problem
from pipeline.config import parse_config
from pipeline.errors import InputError, RunError
from pipeline.executor import SerialExecutor
from pipeline.plan import Shard, stream
from pipeline.progress import LogProgress
from pipeline.run import Run, claim, prepare
from pipeline.shard import run_shard
from pipeline.stages.check_weights import check_weights
from pipeline.stages.estimate import estimate
from pipeline.stages.pilot import run_pilot
from pipeline.stages.sample import sample, settle_plan
from pipeline.stages.scale import NOISES
from pipeline.store import SampleStore

SMALL = {
    "name": "small",
    "data": {"source": "sklearn:iris", "validation": 0.2, "test": 0.2},
    "model": {"hidden": [6]},
    "map": {"steps": 200},
    "walk": {"walks": 12, "walks_per_shard": 5, "length": 3.0, "steps": 20, "record_every": 5, "rank": 4},
}


def opened(tmp_path, **changes) -> Run:
    """A claimed run of the small configuration with sections changed."""
    settings = {k: ({**v, **changes.get(k, {})} if isinstance(v, dict) else v) for k, v in SMALL.items()}
    settings.update({k: v for k, v in changes.items() if k not in SMALL})
    run = prepare(parse_config({**settings, "storage": str(tmp_path / "runs")}))
    claim(run)
    return run


def positions(run: Run) -> np.ndarray:
    """All stored points in the order (walk, step)."""
    table = SampleStore.open(run.uri).dataset().to_table(columns=["walk", "step", "theta"])
    order = np.lexsort((table["step"].to_numpy(), table["walk"].to_numpy()))
    return np.stack([np.asarray(t) for t in table["theta"].to_pylist()])[order]


def test_a_shard_that_lost_its_end_is_continued_to_the_same_bits(tmp_path):
    run = opened(tmp_path, walk={"correction": "deflated-momentum"})
    estimate(run, SerialExecutor(), LogProgress())
    sample(run, SerialExecutor(), LogProgress())
    before = positions(run)
    store = SampleStore.open(run.uri)
    for shard, block in [(0, 1), (0, 2), (1, 3), (2, 0)]:
        run.storage.delete(f"walks/shard={shard:05d}/block={block:05d}.parquet")
    redone = [report.block for report in run_shard(run, Shard(0, 0, 0, 5))]
    assert redone == [1, 2], "blocks behind the hole are left alone"
    sample(run, SerialExecutor(), LogProgress())
    assert np.array_equal(positions(run), before)
    assert len(before) == store.plan.rows


def test_walks_do_not_depend_on_how_many_there_are(tmp_path):
    # Same shard shape, so that rounding is the same too.
    few = opened(tmp_path / "a", walk={"walks": 5, "correction": "plain"})
    many = opened(tmp_path / "b", walk={"walks": 15, "correction": "plain"})
    for run in (few, many):
        estimate(run, SerialExecutor(), LogProgress())
        sample(run, SerialExecutor(), LogProgress())
    assert np.array_equal(positions(few), positions(many)[: 5 * 4])


def test_the_pilot_settles_everything_once_and_the_plan_is_kept(tmp_path):
    run = opened(tmp_path, walk={"length": "auto", "correction": "auto", "steps": 20})
    estimate(run, SerialExecutor(), LogProgress())
    plan = settle_plan(run, SerialExecutor(), LogProgress())
    assert plan.chosen["pilot"]["correction"] == plan.correction
    assert 2.0 <= plan.length <= 512 and len(plan.chosen["pilot"]["curve"]) == 20
    assert settle_plan(run, SerialExecutor(), LogProgress()) == plan


def test_a_regression_takes_the_walk_that_gets_furthest_below_half_of_gamma(tmp_path):
    data = {"source": "python:pipeline.data.synthetic:snelson_like", "task": "regression"}
    run = opened(tmp_path, data=data, walk={"length": "auto", "correction": "plain", "steps": 100, "record_every": 10})
    estimate(run, SerialExecutor(), LogProgress())
    plan = settle_plan(run, SerialExecutor(), LogProgress())
    limit, pilot = load_problem(run, 0).info["gamma"] / 2, plan.chosen["pilot"]
    assert all(point["nll_rise"] <= limit for point in pilot["curve"] if point["radius"] < pilot["best_radius"])
    assert 0 < pilot["best_radius"] <= plan.length
    faster = next(run_pilot(run, dataclasses.replace(plan, length=4 * plan.length, steps=25)))
    assert faster.best_radius <= pilot["best_radius"], "more drift a step does not get further"


def test_the_noise_of_an_interpolating_network_does_not_collapse(tmp_path):
    # 30 training rows and 100 parameters or more: residuals can be made as small as one likes.
    data = {"source": "sklearn:diabetes", "task": "regression", "train_rows": 30}
    run = opened(tmp_path, data=data, model={"hidden": [20]})
    estimate(run, SerialExecutor(), LogProgress())
    assert 0.2 < load_problem(run, 0).info["noise_std"] <= 1.0


def test_the_noise_of_a_regression_is_near_its_true_one_without_a_setting(tmp_path):
    # The curve has noise 0.15 and a standard deviation near 0.7, so that the noise is 0.2 of it. A noise of 0.45 leaves
    # half of the curve unexplained; one of 0.1 costs more than a nat a validation row.
    data = {"source": "python:pipeline.data.synthetic:snelson_like", "task": "regression", "standardize": False}
    run = opened(tmp_path, data=data, model={"hidden": [8]}, prior={"precision": 0.1})
    estimate(run, SerialExecutor(), LogProgress())
    info = load_problem(run, 0).info
    assert info["prior_how"] == "noise by validation NLL"
    assert 0.1 < info["noise_std"] < 0.3


def test_a_network_that_gives_its_noise_does_not_claim_any_precision(tmp_path):
    # 30 training rows and 106 parameters: with a floor of 0.1 the network meets the targets, and says so.
    data = {"source": "sklearn:diabetes", "task": "regression", "train_rows": 30}
    scores, least = {}, {}
    for given in (None, 0.1):
        likelihood = {"kind": "heteroscedastic", "noise_std": given}
        run = opened(tmp_path / str(given), data=data, model={"hidden": [8]}, likelihood=likelihood)
        estimate(run, SerialExecutor(), LogProgress())
        problem, rows = load_problem(run, 0), run.dataset.validation
        x, y = (torch.as_tensor(np.array(v), dtype=problem.network.dtype) for v in (rows.x, rows.y))
        said = problem.likelihood.predict(problem.network.outputs(problem.theta_star, x)).variance
        assert said is not None
        least[given] = float(said.min().sqrt())
        scores[given] = float(problem.likelihood.nll(problem.network.outputs(problem.theta_star, x), y).mean())
        assert problem.info["prior_how"] == ("as configured" if given else "smallest noise by validation NLL")
        assert least[given] >= problem.info["noise_std"]
    assert least[0.1] < 0.15 < 0.3 < least[None]
    assert scores[None] < scores[0.1] - 1.0


def test_the_noise_of_a_linear_model_is_that_of_its_exact_evidence(tmp_path):
    rng = stream(0, "test-evidence")
    x = rng.normal(size=(40, 12))
    np.savez(tmp_path / "line.npz", x=x, y=x @ rng.normal(size=12) + 0.8 * rng.normal(size=40))
    data = {"source": f"npz:{tmp_path}/line.npz", "task": "regression"}  # too few validation rows to choose by
    run = opened(tmp_path, data=data, model={"hidden": []}, prior={"precision": 2.0})
    estimate(run, SerialExecutor(), LogProgress())
    info, train = load_problem(run, 0).info, run.dataset.train
    design = np.column_stack([np.asarray(train.x), np.ones(len(train.y))])
    y, unit = np.asarray(train.y, dtype=float), float(np.std(train.y))
    spread = [design @ design.T / 2.0 + (unit * share) ** 2 * np.eye(len(y)) for share in NOISES]
    evidence = [stats.multivariate_normal(cov=c).logpdf(y) for c in spread]  # pyright: ignore[reportArgumentType]
    best = int(np.argmax(evidence))
    assert evidence[best] > max(evidence[:best] + evidence[best + 1 :]) + 0.01, "no tie"
    occam = [np.linalg.slogdet(np.eye(13) + design.T @ design / (2 * (unit * s) ** 2))[1] / 2 for s in NOISES]
    assert best != int(np.argmax(np.add(evidence, occam))), "the fit alone would choose another"
    assert info["noise_std"] == pytest.approx(unit * NOISES[best])
    assert info["prior_how"] == "noise by Laplace marginal likelihood"


def test_weights_off_the_minimum_are_refused_with_the_distance_and_can_be_polished(tmp_path):
    run = opened(tmp_path)
    estimate(run, SerialExecutor(), LogProgress())
    trained = load_file(f"{run.uri}/map/start=0/theta.safetensors")
    good, off = str(tmp_path / "good.safetensors"), str(tmp_path / "off.safetensors")
    save_file({k: v.float() for k, v in trained.items()}, good)
    save_file({k: v.float() + 0.3 for k, v in trained.items()}, off)
    check_weights(opened(tmp_path / "a", model={"weights": good}))
    with pytest.raises(InputError, match=r"gradient norm .* nats .*map\.polish: true"):
        check_weights(opened(tmp_path / "b", model={"weights": off}))
    polished = opened(tmp_path / "c", model={"weights": off}, map={"polish": True})
    estimate(polished, SerialExecutor(), LogProgress())
    info = load_problem(polished, 0).info
    assert info["grad_norm"] < 1e-3 or info["decrement"] < 1e-3


def test_a_map_that_is_not_at_a_minimum_says_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.stages.estimate.QUASI_NEWTON_DIM", 0)
    run = opened(tmp_path, map={"steps": 3})
    with pytest.raises(RunError, match=r"not at a minimum: gradient norm .* nats .*map\.steps"):
        estimate(run, SerialExecutor(), LogProgress())
    assert not run.storage.exists("map/start=0/map.json")


def test_several_starts_share_noise_and_prior_and_divide_the_walks(tmp_path):
    run = opened(tmp_path, map={"starts": 3, "steps": 200}, prior={"precision": "auto"})
    estimate(run, SerialExecutor(), LogProgress())
    sample(run, SerialExecutor(), LogProgress())
    infos = [load_problem(run, k).info for k in range(3)]
    assert len({info["prior_precision"] for info in infos}) == 1
    assert len({info["potential"] for info in infos}) == 3
    table = SampleStore.open(run.uri).dataset().to_table(columns=["walk", "start"]).to_pandas()
    assert table.groupby("start")["walk"].nunique().tolist() == [4, 4, 4]


def test_minibatch_walks_follow_full_batch_walks_near_the_start(tmp_path):
    # The control variate is exact at theta*, so that the first steps agree far better than plain minibatches would.
    full = opened(tmp_path / "a", walk={"correction": "plain", "length": 0.1, "guard": False})
    part = opened(tmp_path / "b", walk={"correction": "plain", "length": 0.1, "guard": False, "batch_size": 30})
    for run in (full, part):
        estimate(run, SerialExecutor(), LogProgress())
        sample(run, SerialExecutor(), LogProgress())
    a, b = positions(full), positions(part)
    star = load_problem(full, 0).theta_star.numpy()
    assert not np.array_equal(a, b)
    assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(a - star)


def test_the_stored_drift_of_a_prior_scaled_walk_has_its_length_and_its_scale(tmp_path):
    from pipeline.build import drift_of

    run = opened(tmp_path, prior={"precision": {"bias": 100.0, ".*": 1.0}}, walk={"drift": "prior"})
    estimate(run, SerialExecutor(), LogProgress())
    plan, problem = settle_plan(run, SerialExecutor(), LogProgress()), load_problem(run, 0)
    drifts = np.stack([drift_of(run, plan, problem.precision, walk) for walk in range(200)])
    assert np.allclose(np.linalg.norm(drifts, axis=1), plan.length)
    stiff = problem.precision.numpy() == 100.0
    ratio = drifts[:, ~stiff].std() / drifts[:, stiff].std()
    assert ratio == pytest.approx(10, rel=0.1)  # 200 x 9 normals or more a group: two per cent of error


def test_a_record_is_finite_even_where_nothing_guards_a_walk_that_explodes(tmp_path):
    # The step is ten times the inverse curvature, so that parameters grow ninefold a step and their squares overflow.
    walk = {"guard": False, "correction": "plain", "step_size": 10.0, "steps": 60}
    run = opened(tmp_path, walk=walk)
    estimate(run, SerialExecutor(), LogProgress())
    sample(run, SerialExecutor(), LogProgress())
    columns = ["potential", "nll", "grad_norm", "distance", "status"]
    table = SampleStore.open(run.uri).dataset().to_table(columns=columns).to_pandas()
    assert (table["distance"] > 1e9).any(), "no walk exploded"
    assert np.isfinite(table[columns[:-1]].to_numpy(dtype=float)).all()
    assert (table["status"] == "halved").any()


def test_float64_walks_are_stored_in_float64(tmp_path):
    run = opened(tmp_path, walk={"dtype": "float64", "correction": "plain"})
    estimate(run, SerialExecutor(), LogProgress())
    sample(run, SerialExecutor(), LogProgress())
    block = next(iter(SampleStore.open(run.uri).points(3.0)))
    assert block.theta.dtype == np.float64 and np.isfinite(block.theta).all()
