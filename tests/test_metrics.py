"""Metrics agree with independent implementations, and their standard errors have the coverage they claim."""

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from sklearn import metrics as reference
from sklearn.calibration import calibration_curve

from pipeline.bayes import metrics
from pipeline.bayes.bootstrap import bootstrap, resample_counts, row_mean
from pipeline.bayes.mixture import mixture_cdf, mixture_crps, mixture_nll, mixture_quantile
from pipeline.plan import stream


def random_classes(seed: int, rows: int = 400, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = stream(seed, "test-metrics")
    logits = rng.normal(size=(rows, classes)) * 2
    probabilities = np.exp(logits)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return probabilities, rng.integers(0, classes, size=rows)


def random_mixture(seed: int, draws: int = 7, rows: int = 50) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = stream(seed, "test-mixture")
    return rng.normal(size=(draws, rows)), rng.uniform(0.05, 2.0, size=(draws, rows)), rng.normal(size=rows) * 2


@pytest.mark.parametrize("seed", range(5))
def test_classification_metrics_agree_with_scikit_learn(seed):
    p, y = random_classes(seed)
    scores = metrics.classification_scores(p, y, None, resample_counts(stream(seed, "b"), len(y), 20))
    truth = np.eye(p.shape[1])[y]
    assert scores["nll"].value == pytest.approx(reference.log_loss(y, p), abs=1e-9)
    assert scores["accuracy"].value == pytest.approx(reference.accuracy_score(y, p.argmax(1)), abs=1e-12)
    by_class = [reference.brier_score_loss(truth[:, k], p[:, k]) for k in range(p.shape[1])]
    assert scores["brier"].value == pytest.approx(sum(by_class), abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_calibration_error_agrees_with_torchmetrics(seed):
    from torchmetrics.functional import classification

    p, y = random_classes(seed)
    ours = metrics.calibration_error(p, y, resample_counts(stream(seed, "b"), len(y), 20)).value
    theirs = classification.multiclass_calibration_error(
        torch.as_tensor(p), torch.as_tensor(y), num_classes=p.shape[1], n_bins=15, norm="l1"
    )
    assert ours == pytest.approx(float(theirs), abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_calibration_error_agrees_with_netcal(seed):
    netcal = pytest.importorskip("netcal.metrics", reason="netcal is an optional second opinion")
    p, y = random_classes(seed)
    ours = metrics.calibration_error(p, y, resample_counts(stream(seed, "b"), len(y), 20)).value
    assert ours == pytest.approx(float(netcal.ECE(15).measure(p, y)), abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_adaptive_calibration_error_agrees_with_scikit_learn(seed):
    p, y = random_classes(seed, rows=30 * metrics.BINS)  # so that its quantile bins hold equally many rows, as ours do
    ours = metrics.calibration_error(p, y, resample_counts(stream(seed, "b"), len(y), 20), adaptive=True).value
    right, said = calibration_curve(p.argmax(1) == y, p.max(1), n_bins=metrics.BINS, strategy="quantile")
    assert len(right) == metrics.BINS
    assert ours == pytest.approx(np.abs(right - said).mean(), abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_adaptive_calibration_error_agrees_with_netcal(seed):
    netcal = pytest.importorskip("netcal.metrics", reason="netcal is an optional second opinion")
    p, y = random_classes(seed, rows=30 * metrics.BINS)
    ours = metrics.calibration_error(p, y, resample_counts(stream(seed, "b"), len(y), 20), adaptive=True).value
    assert ours == pytest.approx(float(netcal.ECE(metrics.BINS, equal_intervals=False).measure(p, y)), abs=1e-6)


@pytest.mark.parametrize("ties", [False, True])
def test_detection_agrees_with_scikit_learn(ties):
    rng = stream(3, "test-ood")
    inside, outside = rng.normal(size=300), rng.normal(1.0, 1.5, size=200)
    if ties:
        inside, outside = inside.round(1), outside.round(1)
    scores = metrics.detection_scores(inside, outside, stream(0, "b"))
    label = np.r_[np.ones(300), np.zeros(200)]
    certainty = -np.r_[inside, outside]
    assert scores["auroc"].value == pytest.approx(reference.roc_auc_score(label, certainty), abs=1e-9)
    fpr, tpr, _ = reference.roc_curve(label, certainty, drop_intermediate=False)
    assert scores["fpr95"].value == pytest.approx(fpr[np.argmax(tpr >= 0.95)], abs=1e-9)


def test_rows_without_a_known_uncertainty_are_not_ranked():
    inside = np.linspace(0, 1, 20)
    whole, broken = (
        metrics.detection_scores(inside, np.array([0.5, last]), stream(0, "b"))["auroc"] for last in (0.9, np.nan)
    )
    assert whole.value > 0.5 and broken.to_json() == {"value": None, "se": None}
    assert metrics.compare(whole, broken, "auroc") == {"value": None, "se": None, "verdict": "undecided"}


@pytest.mark.parametrize("seed", range(3))
def test_mixture_density_and_quantiles_agree_with_scipy(seed):
    mean, variance, y = random_mixture(seed)
    density = stats.norm.pdf(y, mean, np.sqrt(variance)).mean(axis=0)
    assert np.allclose(mixture_nll(mean, variance, y), -np.log(density), rtol=1e-10)
    for level in (0.05, 0.5, 0.95):
        assert np.allclose(mixture_cdf(mean, variance, mixture_quantile(mean, variance, level)), level, atol=1e-12)


def test_crps_equals_its_integral():
    mean, variance, y = random_mixture(0, rows=5)
    ours = mixture_crps(mean, variance, y)
    for row in range(5):
        m, v = mean[:, row], variance[:, row]

        def gap(t, m=m, v=v, target=y[row]):
            return (stats.norm.cdf(t, m, np.sqrt(v)).mean() - (t >= target)) ** 2

        low, _ = integrate.quad(gap, -40, y[row], limit=400)
        high, _ = integrate.quad(gap, y[row], 40, limit=400)
        assert ours[row] == pytest.approx(low + high, abs=1e-6)


def test_regression_scores_in_the_unit_of_the_target():
    mean, variance, y = random_mixture(1)
    counts = resample_counts(stream(0, "b"), len(y), 50)
    plain = metrics.regression_scores(mean, variance, y, counts)
    scaled = metrics.regression_scores(10 * mean + 3, 100 * variance, 10 * y + 3, counts)
    assert scaled["nll"].value == pytest.approx(plain["nll"].value + np.log(10), abs=1e-9)
    assert scaled["coverage"].value == plain["coverage"].value
    for name in ("rmse", "crps", "width"):
        assert scaled[name].value == pytest.approx(10 * plain[name].value, rel=1e-9)
        assert scaled[name].se == pytest.approx(10 * plain[name].se, rel=1e-9)


def covered(estimate, truth: float, sets: int) -> int:
    """How many of `sets` simulated test sets have the truth within 1.96 standard errors."""
    hits = 0
    for number in range(sets):
        score = estimate(number)
        hits += abs(score.value - truth) < 1.96 * score.se
    return hits


def rmse_of(number: int, rows: int = 300):
    errors = stream(11, "test-coverage", number).normal(size=rows) ** 2
    counts = resample_counts(stream(12, "test-coverage", number), rows, 200)
    return bootstrap(lambda weights: np.sqrt(weights @ errors / weights.sum(axis=1)), counts)


def auroc_of(number: int, rows: int = 150):
    rng = stream(13, "test-coverage", number)
    inside, outside = rng.normal(size=rows), rng.normal(1.0, size=rows)
    return metrics.detection_scores(inside, outside, stream(14, "test-coverage", number), 200)["auroc"]


def mean_of(number: int, rows: int = 300):
    return row_mean(stream(15, "test-coverage", number).exponential(size=rows))


def paired_of(number: int, rows: int = 300):
    rng = stream(16, "test-coverage", number)
    common, own = rng.exponential(size=rows), rng.normal(0.1, 0.3, size=rows)
    return row_mean(common + own).minus(row_mean(common))


# Nominal coverage 95 %. Limits: false alarm 1e-6 for the binomial law at 95 % give or take one point of bootstrap bias:
# 351 and 399 of 400. A standard error too small by 30 % covers 2 Phi(1.96 x .7) - 1 = 83.0 %, and is caught with a
# chance of .995; one that is twice too large covers 99.99 %, caught with a chance of .965.
SETS = 400
LOWEST = int(stats.binom.ppf(1e-6, SETS, 0.94))
HIGHEST = int(stats.binom.isf(1e-6, SETS, 0.96))


@pytest.mark.parametrize(
    ("estimate", "truth"),
    [(rmse_of, 1.0), (mean_of, 1.0), (paired_of, 0.1), (auroc_of, stats.norm.cdf(1 / np.sqrt(2)))],
)
def test_standard_errors_cover_at_their_nominal_rate(estimate, truth):
    assert LOWEST <= covered(estimate, truth, SETS) <= HIGHEST


def test_the_coverage_check_has_the_stated_power():
    def chance(size: float) -> float:
        coverage = 2 * stats.norm.cdf(1.96 * size) - 1
        return float(stats.binom.cdf(LOWEST - 1, SETS, coverage) + stats.binom.sf(HIGHEST, SETS, coverage))

    assert chance(0.7) > 0.99 and chance(2.0) > 0.96
    assert chance(1.0) < 1e-6
    assert covered(lambda n: shrunk(rmse_of(n)), 1.0, SETS) < LOWEST


def shrunk(score):
    return type(score)(score.value, 0.7 * score.se, score.rows, score.replicates)


def test_paired_difference_is_sharper_than_independent_errors():
    rng = stream(5, "test-pair")
    common, small = rng.normal(size=500), rng.normal(size=500) * 0.05
    a, b = row_mean(common + small + 0.02), row_mean(common)
    difference = a.minus(b)
    assert difference.se < 0.1 * np.hypot(a.se, b.se)
    assert metrics.compare(b, a, "nll")["verdict"] == "better"
    assert metrics.compare(a, a, "nll")["verdict"] == "undecided"


def test_of_a_single_row_no_error_is_known_and_no_verdict_given():
    counts = resample_counts(stream(0, "b"), 1, 50)
    p, y = np.array([[0.7, 0.3]]), np.array([0])
    scores = [metrics.classification_scores(p, y, None, counts), metrics.classification_scores(1 - p, y, None, counts)]
    scores += [metrics.regression_scores(p[:, :1], p[:, :1], y - shift, counts) for shift in (0.0, 1.0)]
    for first, second in (scores[:2], scores[2:]):
        for name, score in first.items():
            assert np.isfinite(score.value) and score.to_json()["se"] is None
            assert metrics.compare(score, second[name], name) == {"value": None, "se": None, "verdict": "undecided"}
    assert metrics.selective_scores(p[0, :1], p[0, :1], (0.5, 1.0), counts)[0].to_json()["se"] is None
    assert metrics.detection_scores(p[0, :1], p[0], stream(0, "b"), 50)["auroc"].to_json()["se"] is None


def test_selective_scores_are_points_of_the_curve_and_cover():
    rng = stream(7, "test-selective")
    uncertainty, loss = rng.integers(0, 40, size=200).astype(float), rng.uniform(size=200)
    share, curve = metrics.selective_curve(uncertainty, loss)
    counts = resample_counts(stream(7, "b"), 200, 300)
    shares = (0.25, 0.5, 1.0)
    points = metrics.selective_scores(uncertainty, loss, shares, counts)
    expected = [curve[np.searchsorted(share, s - 1e-9)] for s in shares]
    assert [p.value for p in points] == pytest.approx(expected, abs=1e-12)
    # Answering all is the plain mean, whose bootstrap error is its plain one within five errors of 300 resamples: a
    # spread of n normal values has the relative error sqrt(1 / 2 n), and five of them are exceeded once in 1.7e6 times.
    assert points[-1].se == pytest.approx(loss.std() / np.sqrt(200), rel=5 / np.sqrt(600))
    root = metrics.selective_scores(uncertainty, loss, shares, counts, root=True)
    assert [p.value for p in root] == pytest.approx(np.sqrt(expected), abs=1e-12)


def test_selective_curve_ends_at_the_mean_and_ignores_row_order():
    rng = stream(6, "test-selective")
    uncertainty, loss = rng.integers(0, 5, size=100).astype(float), rng.normal(size=100)
    share, curve = metrics.selective_curve(uncertainty, loss)
    order = rng.permutation(100)
    again = metrics.selective_curve(uncertainty[order], loss[order])[1]
    assert share[-1] == 1 and curve[-1] == pytest.approx(loss.mean())
    assert np.allclose(curve, again)
