"""The evaluation: choices never see test targets, numbers equal a plain recomputation, and the JSON is the contract."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from pipeline.bayes.baselines.laplace import Laplace
from pipeline.bayes.baselines.second_opinion import INSTALL, SecondOpinion
from pipeline.bayes.likelihood import Gaussian
from pipeline.bayes.params import Network
from pipeline.bayes.target import Potential
from pipeline.bayes.trees import to_tensors
from pipeline.build import load_problem
from pipeline.errors import InputError
from pipeline.progress import LogProgress
from pipeline.run import Run, claim
from pipeline.stages.comparison import Comparison
from pipeline.stages.evaluate import evaluate, evaluation_table
from pipeline.stages.figures import FIGURES, raw_inputs
from pipeline.stages.methods import Unavailable, random_draws, second_opinion
from pipeline.stages.paths import read_paths
from pipeline.stages.predict import predict
from pipeline.stages.select import HELD_BACK, RISE, VALIDATION, choose_radius, left_of_plateau
from pipeline.storage import Storage
from pipeline.store import SampleStore
from pipeline.streams import stream
from tests.checks import assert_covariance
from tests.runs import copy_of, finished, stages

ALL = {"map", "walk", "deformation", "temperature", "random", "gaussian", "laplace", "laplace_linearised", "swag"}
ALL |= {"ensemble", "ensemble_temperature", "walk_temperature"}
TUNED = {"temperature", "random", "laplace", "laplace_linearised", "swag", "ensemble_temperature", "walk_temperature"}
DONE = ("evaluation.json", FIGURES)


@pytest.mark.parametrize(
    ("name", "metrics"),
    [("classes", {"nll", "accuracy", "ece", "brier"}), ("curve", {"nll", "rmse", "crps", "coverage"})],
)
def test_evaluation_has_what_the_contract_names(name, metrics):
    result = finished(name).storage.read_json("evaluation.json")
    assert set(result["methods"]) == ALL
    for scores in result["methods"].values():
        assert metrics | {"nll_per_draw"} <= set(scores)
        assert all(set(score) == {"value", "se"} for score in scores.values())
    assert {"radius", "validation_nll", "potential_rise"} <= set(result["radius_curve"][0])
    assert result["walk"]["walks"] == 24 and result["walk"]["diverged"] == 0
    assert result["walk"]["gradient_evaluations"] == 24 * 40
    assert {"kind", "heldout_error", "potential_rise", "walk_potential_rise"} <= set(result["deformation"])


@pytest.mark.parametrize(("name", "whole"), [("classes", "accuracy"), ("curve", "rmse")])
def test_answering_every_row_is_the_whole_error(name, whole):
    result = finished(name).storage.read_json("evaluation.json")
    for method, curve in result["selective"].items():
        value = result["methods"][method][whole]["value"]
        assert curve[-1]["answered"] == 1.0
        assert curve[-1]["value"] == pytest.approx(1 - value if whole == "accuracy" else value, abs=1e-9)


@pytest.mark.parametrize("name", ["classes", "curve"])
def test_walk_with_temperature_is_held_against_the_tempered_ensemble(name):
    result = finished(name).storage.read_json("evaluation.json")
    pair = result["difference"]["walk_temperature-ensemble_temperature"]["nll"]
    assert set(pair) == {"value", "se", "verdict"}
    assert result["choices"]["walk_temperature"]["temperature"] > 0


def test_detection_is_given_for_every_method_and_every_set():
    result = finished("classes").storage.read_json("evaluation.json")
    (by_method,) = result["ood"].values()
    assert set(by_method) == ALL
    # The set holds the training rows too, on which the network is surer than on test rows: below one half, not above.
    assert by_method["walk"]["auroc"]["value"] < 0.5


@pytest.mark.parametrize("name", ["plane", "curve"])
def test_no_stage_looks_at_test_targets(name, tmp_path):
    """Prior, noise, pilot, walks, radius, deformation and every baseline's choice are the same whatever the targets."""
    before = finished(name)
    assert before.config.prior.precision == "auto" or before.config.likelihood.noise_std is None
    test = before.dataset.test
    shuffled = dataclasses.replace(test, y=stream(0, "test-shuffle").permutation(test.y))
    storage = Storage.open(str(tmp_path)).child(before.config.run_id)
    run = Run(before.config, storage, dataclasses.replace(before.dataset, test=shuffled))
    claim(run)
    stages(run)
    judged = {"evaluation.json", FIGURES, "run.json", "config.yaml"}
    made = [entry.path for entry in run.storage.list() if entry.path not in judged]
    for part in ("map/", "plan.json", "walks/", "radius.json", "deformation/"):
        assert any(path.startswith(part) for path in made)
    different = [path for path in made if run.storage.read(path) != before.storage.read(path)]
    assert different == []
    old, new = (r.storage.read_json("evaluation.json") for r in (before, run))
    noisy = {"walk", "deformation", "gaussian"} if name == "curve" else set[str]()  # their noise was fitted
    assert set(new["choices"]) == TUNED | noisy and new["choices"] == old["choices"]
    assert new["methods"]["walk"]["nll"] != old["methods"]["walk"]["nll"]


@pytest.mark.parametrize("name", ["classes", "curve"])
def test_evaluation_is_a_function_of_the_stored_objects(name, tmp_path):
    run = copy_of(name, tmp_path, *DONE)
    evaluate(run, LogProgress())
    for path in DONE:
        assert run.storage.read(path) == finished(name).storage.read(path)


def walk_points(run: Run, radius: float, draws: int) -> list[tuple[int, torch.Tensor]]:
    """Draws of the walk read through the public store, draws // starts from each start."""
    store = SampleStore.open(run.uri)
    starts = range(store.plan.starts)
    shares = [draws // len(starts)] * len(starts)
    found = [(s, p) for s in starts for p in store.points(radius, start=s, limit=shares[s])]
    return [(start, torch.as_tensor(points.theta)) for start, points in found]


def plain_nll(run: Run, radius: float, rows, noise: float = 1.0) -> np.ndarray:
    """NLL of the model average of the walk, in the own unit, with nothing but the network and numpy."""
    nll = []
    for start, theta in walk_points(run, radius, run.config.evaluation.draws):
        problem = load_problem(run, start)
        for one in theta:
            outputs = problem.network.outputs(one, to_tensors(rows.x, problem.network.dtype)).double()
            y = torch.as_tensor(rows.y)
            likelihood = problem.likelihood
            if isinstance(likelihood, Gaussian):
                likelihood = Gaussian(likelihood.noise_std * noise)
            nll.append(likelihood.nll(outputs, y).numpy())
    assert len(nll) == run.config.evaluation.draws
    unit = np.log(run.dataset.schema.y_std)
    return np.log(len(nll)) - logsumexp(-np.array(nll), axis=0) + unit


@pytest.mark.parametrize("name", ["classes", "curve"])
def test_walk_equals_a_plain_recomputation_from_the_store(name):
    run = finished(name)
    result = run.storage.read_json("evaluation.json")
    rows = plain_nll(run, result["radius"], run.dataset.test, run.storage.read_json("radius.json")["noise_factor"])
    score = result["methods"]["walk"]["nll"]
    assert score["value"] == pytest.approx(rows.mean(), abs=1e-6)
    assert score["se"] == pytest.approx(rows.std(ddof=1) / np.sqrt(len(rows)), abs=1e-6)


def test_the_noise_of_a_regression_is_the_one_that_suits_the_average_on_validation_rows():
    run = finished("curve")
    choice = run.storage.read_json("radius.json")
    chosen = choice["noise_factor"]
    assert run.storage.read_json("evaluation.json")["choices"]["walk"] == {"noise_factor": chosen}
    rows = run.dataset.validation

    def score(factor: float) -> float:
        return plain_nll(run, choice["radius"], rows, factor).sum() + np.log(factor) ** 2 / 2

    assert chosen != 1 and score(chosen) < min(score(chosen * 0.98), score(chosen / 0.98))
    assert finished("classes").storage.read_json("radius.json")["noise_factor"] == 1


@pytest.mark.parametrize("name", ["classes", "curve"])
def test_validation_curve_equals_a_plain_recomputation_from_the_store(name):
    run = finished(name)
    for point in run.storage.read_json("radius.json")["curve"][::3]:
        expected = plain_nll(run, point["radius"], run.dataset.validation).mean()
        assert point["validation_nll"] == pytest.approx(expected, abs=1e-6)


def test_paired_difference_equals_the_difference_of_the_values():
    result = finished("curve").storage.read_json("evaluation.json")
    for pair, metrics in result["difference"].items():
        ours, other = pair.split("-")
        for metric, difference in metrics.items():
            values = [result["methods"][m][metric]["value"] for m in (ours, other)]
            assert difference["value"] == pytest.approx(values[0] - values[1], abs=1e-9)
            beyond = abs(difference["value"]) > 2 * difference["se"]
            assert beyond or difference["verdict"] == "undecided"


CURVE = [(1.0, 0.5, 1.0), (2.0, 0.4, 3.0), (3.0, 0.45, 4.9), (4.0, 0.6, 9.0), (5.0, 0.7, 2.0)]


@pytest.mark.parametrize(
    ("task", "validation", "gamma", "radius", "rule"),
    [
        ("classification", True, 10.0, 2.0, VALIDATION),
        ("classification", False, 10.0, 3.0, RISE),
        ("regression", True, 10.0, 3.0, RISE),
        ("regression", True, 0.1, 1.0, RISE),
        ("regression", True, 100.0, 5.0, RISE),
    ],
)
def test_rule_of_the_radius(task, validation, gamma, radius, rule):
    curve = [{"radius": r, "validation_nll": v if validation else None, "nll_rise": n} for r, v, n in CURVE]
    choice = choose_radius(curve, gamma, task)
    assert (choice["radius"], choice["rule"]) == (radius, rule)


@pytest.mark.parametrize(("error", "radius", "rule"), [(0.06, 3.0, RISE), (0.04, 2.0, HELD_BACK)])
def test_a_regression_is_held_back_only_where_validation_rows_see_the_harm(error, radius, rule):
    curve = [{"radius": r, "validation_nll": v, "validation_se": error, "nll_rise": n} for r, v, n in CURVE]
    choice = choose_radius(curve, 10.0, "regression")
    assert (choice["radius"], choice["rule"]) == (radius, rule)


def test_the_radius_is_the_left_end_of_the_plateau_around_the_best():
    scores = np.array([0.30, 0.2508, 0.2503, 0.2502, 0.25, 0.2505])
    assert left_of_plateau(scores, np.full(6, 1e-4)) == 1, "an excess without practical meaning is none"
    assert left_of_plateau(scores, np.full(6, 0.1)) == 4, "what cannot be told is not taken on trust"
    assert left_of_plateau(np.array([0.2502, 0.28, 0.2502, 0.25]), np.full(4, 1e-4)) == 2, "no leap over worse radii"
    assert left_of_plateau(np.array([np.nan, 0.25, np.nan, 0.25]), np.full(4, 1e-4)) == 1


def test_draws_are_dealt_to_starts_in_equal_parts():
    run = finished("classes")
    paths = read_paths(SampleStore.open(run.uri))
    chosen = paths.choose(7)
    assert np.bincount(paths.start[chosen]).tolist() == [4, 3]


def test_random_directions_have_the_radius_as_their_norm():
    run = finished("classes")
    comparison = Comparison.open(run, SampleStore.open(run.uri).plan, {})
    for start, theta in random_draws(comparison, 3.5):
        distance = torch.linalg.vector_norm(theta - comparison.problems[start].theta_star, dim=1)
        assert torch.allclose(distance, torch.tensor(3.5), rtol=1e-4)


def linear_gaussian(rows: int = 40) -> tuple[Potential, np.ndarray]:
    """A linear model with Gaussian noise, and its exact posterior covariance."""
    rng = stream(0, "test-laplace")
    x = rng.normal(size=(rows, 3))
    module = torch.nn.Linear(3, 1, dtype=torch.float64)
    network = Network(module, dtype=torch.float64)
    precision = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    y = torch.as_tensor(rng.normal(size=rows))
    design = np.column_stack([x, np.ones(rows)])
    covariance = np.linalg.inv(design.T @ design / 0.25 + np.diag(precision.numpy()))
    return Potential(network, Gaussian(0.5), precision, torch.as_tensor(x), y), covariance


def test_laplace_is_the_exact_posterior_of_a_linear_gaussian_model():
    potential, covariance = linear_gaussian()
    model = Laplace.fit(potential, potential.network.theta())
    offsets = model.offsets(stream(1, "test-laplace"), 4000, 1.0)
    assert_covariance(offsets.numpy(), covariance)


def test_laplace_torch_is_of_the_same_opinion_about_a_linear_gaussian_model():
    pytest.importorskip("laplace", reason="laplace-torch cannot be an extra; " + INSTALL)
    potential, covariance = linear_gaussian()
    model = SecondOpinion(potential, potential.network.theta())
    outputs = model.outputs(potential.x, 4000, 1.0, stream(1, "test-laplace"))[..., 0].numpy()
    design = np.column_stack([potential.x.numpy(), np.ones(potential.rows)])
    expected = np.einsum("ni,ij,nj->n", design, covariance, design)
    # The relative standard error of a variance from 4000 draws is sqrt(2 / 4000) = .022: six of them.
    assert np.allclose(outputs.var(axis=0) / expected, 1, atol=0.134)


def test_where_laplace_torch_is_missing_the_table_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "laplace", None)
    run = finished("curve")
    comparison = Comparison.open(run, SampleStore.open(run.uri).plan, {})
    with pytest.raises(Unavailable, match="needs laplace-torch .* pip install --no-deps laplace-torch"):
        second_opinion(comparison)


def test_linearised_laplace_equals_the_network_where_the_network_is_linear():
    potential, _ = linear_gaussian()
    model = Laplace.fit(potential, potential.network.theta())
    offsets = model.offsets(stream(1, "test-laplace"), 3, 1.0)
    for offset, outputs in zip(offsets, model.linearised(offsets, potential.x), strict=True):
        assert torch.allclose(outputs, potential.network.outputs(model.theta_star + offset, potential.x))


@pytest.mark.parametrize(("name", "suffix"), [("classes", "csv"), ("classes", "parquet"), ("curve", "csv")])
def test_predict_writes_a_line_for_every_row(name, suffix, tmp_path):
    import pandas

    run = finished(name)
    out = tmp_path / f"out.{suffix}"
    source = str(run.config.data.source)
    predict(run.uri, source, str(out), trust_code=True)
    table = pandas.read_csv(out) if suffix == "csv" else pandas.read_parquet(out)
    assert (
        len(table) == sum(len(r.y) for r in (run.dataset.train, run.dataset.validation, run.dataset.test))
        or name == "classes"
    )
    assert table[["epistemic", "aleatoric"]].to_numpy().min() >= 0
    if name == "classes":
        p = table[[c for c in table.columns if c.startswith("probability_")]].to_numpy()
        assert np.allclose(p.sum(axis=1), 1, atol=1e-6)
        assert np.array_equal(table["predicted"].to_numpy().astype(int), p.argmax(axis=1))


def test_predict_takes_the_draws_that_the_table_judged(tmp_path):
    import pandas

    run = finished("curve")
    test = run.dataset.test
    np.savez(tmp_path / "test.npz", x=raw_inputs(run, np.asarray(test.x)))
    tables = {}
    for who in ("walk", "deformation"):
        predict(run.uri, f"npz:{tmp_path}/test.npz", str(tmp_path / "out.csv"), draws_from=who, trust_code=True)
        tables[who] = pandas.read_csv(tmp_path / "out.csv")
    y = test.y * run.dataset.schema.y_std + run.dataset.schema.y_mean
    scores = run.storage.read_json("evaluation.json")["methods"]
    for who, table in tables.items():
        rmse = float(np.sqrt(((table["mean"] - y) ** 2).mean()))
        assert rmse == pytest.approx(scores[who]["rmse"]["value"], rel=1e-5)


@pytest.mark.parametrize(
    ("source", "message"),
    [("new.csv", "must be sklearn:NAME, csv:URI.*got 'new.csv'"), ("npz:{}/none.npz", "has no rows")],
)
def test_predict_refuses_what_is_no_input(source, message, tmp_path):
    np.savez(tmp_path / "none.npz", x=np.zeros((0, 1)))
    with pytest.raises(InputError, match=message):
        predict(finished("curve").uri, source.format(tmp_path), str(tmp_path / "out.csv"), trust_code=True)


def test_table_marks_a_winner_only_beyond_two_errors():
    from rich.console import Console

    result = finished("curve").storage.read_json("evaluation.json")
    console = Console(width=200, record=True, file=open("/dev/null", "w", encoding="utf-8"))
    console.print(evaluation_table(result))
    text = console.export_text()
    assert "fiber walk" in text and "RMSE" in text and "±" in text
    leaders = result["leaders"]["nll"]
    best = min(result["methods"], key=lambda m: result["methods"][m]["nll"]["value"])
    assert leaders[0] == best
    assert json.dumps(result) == json.dumps(finished("curve").storage.read_json("evaluation.json"))
