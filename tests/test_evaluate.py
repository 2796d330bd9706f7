"""The evaluation: choices never see test targets, numbers equal a plain recomputation, and the JSON is the contract."""

from __future__ import annotations

import dataclasses
import io
import sys

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from pipeline.bayes.likelihood import Gaussian
from pipeline.bayes.metrics import HIGHER_IS_BETTER, NOT_RANKED
from pipeline.bayes.predictive import Averaged
from pipeline.bayes.trees import to_tensors
from pipeline.build import load_problem
from pipeline.config import parse_config
from pipeline.errors import RunError
from pipeline.progress import LogProgress
from pipeline.run import Run, claim, prepare
from pipeline.stages.comparison import Comparison
from pipeline.stages.cost import estimate_cost
from pipeline.stages.evaluate import evaluate, evaluation_table, sound
from pipeline.stages.figures import FIGURES
from pipeline.stages.methods import Method, Unavailable, random_draws, second_opinion
from pipeline.stages.paths import read_paths
from pipeline.stages.report import report
from pipeline.stages.table import gap
from pipeline.storage import Storage
from pipeline.store import SampleStore
from pipeline.streams import stream
from tests.runs import CONFIGS, copy_of, finished, stages

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
    assert set(result["selective"]) == ALL
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


def test_a_method_that_breaks_down_is_left_out_and_a_walk_that_does_ends_the_evaluation():
    broken = Averaged(2, np.zeros(3), np.array([0.0, np.nan, 0.0]))
    with pytest.raises(Unavailable, match="not finite"):
        sound("swag", Method({"test": broken}))
    with pytest.raises(RunError, match="finite outputs for every test row at the points of the fiber walk"):
        sound("walk", Method({"test": broken}))
    whole = Method({"test": Averaged(2, np.zeros(3), np.zeros(3)), "ood/far": broken})
    assert sound("walk", whole) is whole


def test_one_validation_row_and_one_test_row_make_an_evaluation_without_errors_or_verdicts(tmp_path):
    data = {"source": "sklearn:diabetes", "task": "regression", "train_rows": 30}
    config = CONFIGS["curve"] | {"map": {"steps": 100}, "deformation": {"kind": "none"}, "storage": str(tmp_path)}
    run = prepare(parse_config({**config, "data": data | {"validation": [100, 101], "test": [200, 201]}}))
    claim(run)
    stages(run)
    result = run.storage.read_json("evaluation.json")
    for scores in result["methods"].values():
        assert {score["se"] for score in scores.values()} == {None}
        assert all(np.isfinite(score["value"]) for score in scores.values())
    assert {d["verdict"] for pair in result["difference"].values() for d in pair.values()} == {"undecided"}
    assert report(run).endswith("report.html")


def test_draws_are_dealt_to_starts_in_equal_parts():
    run = finished("classes")
    paths = read_paths(SampleStore.open(run.uri))
    chosen = paths.choose(7)
    assert np.bincount(paths.start[chosen]).tolist() == [4, 3]


def test_random_directions_have_the_radius_as_their_norm():
    run = finished("classes")
    comparison = Comparison.open(run, SampleStore.open(run.uri).plan, {})
    draws = list(random_draws(comparison, 3.5))
    assert sum(len(theta) for _, theta in draws) == run.config.evaluation.draws
    for start, theta in draws:
        distance = torch.linalg.vector_norm(theta - comparison.problems[start].theta_star, dim=1)
        assert torch.allclose(distance, torch.tensor(3.5), rtol=1e-4)


def test_where_laplace_torch_is_missing_the_table_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "laplace", None)
    run = finished("curve")
    comparison = Comparison.open(run, SampleStore.open(run.uri).plan, {})
    with pytest.raises(Unavailable, match="needs laplace-torch .* pip install --no-deps laplace-torch"):
        second_opinion(comparison)


@pytest.mark.parametrize("name", ["classes", "curve"])
def test_paired_differences_have_verdicts_beyond_two_errors_and_the_leaders_follow_from_them(name):
    result = finished(name).storage.read_json("evaluation.json")
    judged = 0
    for pair, metrics in result["difference"].items():
        ours, other = pair.split("-")
        for metric, difference in metrics.items():
            values = [result["methods"][m][metric]["value"] for m in (ours, other)]
            assert difference["value"] == pytest.approx(values[0] - values[1], abs=1e-9)
            rising = 1 if metric in HIGHER_IS_BETTER else -1
            if metric in NOT_RANKED or abs(difference["value"]) <= 2 * difference["se"]:
                assert difference["verdict"] == "undecided"
            elif metric in result["leaders"]:
                assert difference["verdict"] == ("better" if rising * difference["value"] > 0 else "worse")
            leaders = result["leaders"].get(metric, [None])
            if leaders[0] in (ours, other):
                last, beaten = (other, "better") if leaders[0] == ours else (ours, "worse")
                assert (last in leaders) == (difference["verdict"] != beaten)
                judged += 1
    assert judged >= 3


@pytest.mark.parametrize(
    ("value", "se", "shown"),
    [
        (0.0251, 0.0123, "+0.025 ± 0.012"),
        (-0.00042, 0.00015, "−0.00042 ± 0.00015"),
        (-0.0001, 0.02, "0.000 ± 0.020"),
        (1234.56, 20.0, "+1234.6 ± 20.0"),
        (-3e21, 1e20, "−3e+21 ± 1e+20"),
        (0.0, 0.0, "0.000 ± 0.000"),
    ],
)
def test_a_difference_is_shown_with_two_digits_of_its_error_at_least(value, se, shown):
    assert gap({"value": value, "se": se, "verdict": "undecided"}) == shown


def test_the_table_shows_methods_with_their_errors_and_changes_no_number():
    from rich.console import Console

    result = finished("curve").storage.read_json("evaluation.json")
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(evaluation_table(result))
    text = console.export_text()
    assert "fiber walk" in text and "RMSE" in text and "±" in text
    best = min(result["methods"], key=lambda m: result["methods"][m]["nll"]["value"])
    assert result["leaders"]["nll"][0] == best
    assert result == finished("curve").storage.read_json("evaluation.json")


@pytest.mark.parametrize("name", ["classes", "curve"])
def test_the_plan_tells_the_bytes_that_are_stored(name):
    """With room for momentum, which not every correction has."""
    run = finished(name)
    stored = sum(entry.size for entry in run.storage.list("walks"))
    assert 0.9 * stored <= estimate_cost(run).storage_bytes <= 1.5 * stored
