"""Metrics of predictions, each with its standard error over test rows. Numpy in double precision, natural logarithms.

scikit-learn and torchmetrics hold the same metrics for one set of weights; here they are vectorised over bootstrap
weights, and the tests hold them to those libraries.
"""

from __future__ import annotations

import numpy as np

from pipeline.bayes.bootstrap import Score, bootstrap, row_mean
from pipeline.bayes.mixture import component_nll, mixture_cdf, mixture_crps, mixture_nll, mixture_quantile

BINS = 15
HIGHER_IS_BETTER = frozenset({"accuracy", "auroc"})
NOT_RANKED = frozenset({"coverage", "width", "nll_per_draw"})
"""Metrics of which neither more nor less is better by itself."""
TINY = float(np.finfo(np.float64).tiny)


def class_nll(probabilities: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Negative log probability of the true class, shape (rows,), in nats. probabilities: (rows, classes)."""
    return -np.log(np.maximum(probabilities[np.arange(len(y)), y], TINY))


def brier_rows(probabilities: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Squared distance between the probabilities and the one-hot truth, summed over classes (0 to 2), shape (rows,)."""
    truth = np.zeros_like(probabilities)
    truth[np.arange(len(y)), y] = 1.0
    return ((probabilities - truth) ** 2).sum(axis=1)


def confidence_and_hit(probabilities: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Largest probability of each row, and whether its class is the true one (0 or 1)."""
    return probabilities.max(axis=1), (probabilities.argmax(axis=1) == y).astype(np.float64)


def equal_width_bins(confidence: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Bin number of each confidence for bins of equal width on [0, 1]."""
    return np.minimum((confidence * bins).astype(np.int64), bins - 1)


def equal_mass_bins(confidence: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Bin number of each confidence for bins that hold equally many rows (adaptive bins)."""
    order = np.argsort(confidence, kind="stable")
    numbers = np.empty(len(confidence), dtype=np.int64)
    for number, members in enumerate(np.array_split(order, bins)):
        numbers[members] = number
    return numbers


def calibration_error(probabilities: np.ndarray, y: np.ndarray, counts: np.ndarray, adaptive: bool = False) -> Score:
    r"""Expected calibration error, $\sum_b \frac{n_b}{n} |acc_b - conf_b|$ (Guo et al. 2017), with 15 bins.

    Args:
        probabilities: Shape (rows, classes).
        y: True class numbers, (rows,).
        counts: Bootstrap counts, (resamples, rows).
        adaptive: Bins of equal mass instead of equal width; their limits stay those of the full sample.
    """
    confidence, hit = confidence_and_hit(probabilities, y)
    numbers = equal_mass_bins(confidence) if adaptive else equal_width_bins(confidence)
    gaps = np.zeros((len(y), BINS))
    gaps[np.arange(len(y)), numbers] = hit - confidence
    return bootstrap(lambda weights: np.abs(weights @ gaps).sum(axis=1) / weights.sum(axis=1), counts)


def classification_scores(
    probabilities: np.ndarray, y: np.ndarray, nll_draws: np.ndarray | None, counts: np.ndarray
) -> dict[str, Score]:
    """All scores of class probabilities.

    Args:
        probabilities: Model average, shape (rows, classes).
        y: True class numbers, (rows,).
        nll_draws: Mean over single draws of each row's NLL, (rows,); None where there is one draw.
        counts: Bootstrap counts, (resamples, rows).
    """
    _, hit = confidence_and_hit(probabilities, y)
    rows = class_nll(probabilities, y)
    return {
        "nll": row_mean(rows),
        "accuracy": row_mean(hit),
        "ece": calibration_error(probabilities, y, counts),
        "ece_adaptive": calibration_error(probabilities, y, counts, adaptive=True),
        "brier": row_mean(brier_rows(probabilities, y)),
        "nll_per_draw": row_mean(rows if nll_draws is None else nll_draws),
    }


def regression_scores(mean: np.ndarray, variance: np.ndarray, y: np.ndarray, counts: np.ndarray) -> dict[str, Score]:
    """All scores of a mixture of Gaussians, in the unit of y.

    Args:
        mean: Component means, shape (draws, rows).
        variance: Component variances, (draws, rows).
        y: Targets, (rows,).
        counts: Bootstrap counts, (resamples, rows).
    """
    squares = (mean.mean(axis=0) - y) ** 2
    position = mixture_cdf(mean, variance, y)
    low, high = mixture_quantile(mean, variance, 0.05), mixture_quantile(mean, variance, 0.95)
    return {
        "nll": row_mean(mixture_nll(mean, variance, y)),
        "rmse": bootstrap(lambda weights: np.sqrt(weights @ squares / weights.sum(axis=1)), counts),
        "crps": row_mean(mixture_crps(mean, variance, y)),
        "coverage": row_mean((position >= 0.05) & (position <= 0.95)),
        "width": row_mean(high - low),
        "nll_per_draw": row_mean(component_nll(mean, variance, y).mean(axis=0)),
    }


def entropy(probabilities: np.ndarray) -> np.ndarray:
    """Entropy over the last axis, in nats."""
    return -(probabilities * np.log(np.maximum(probabilities, TINY))).sum(axis=-1)


def selective_curve(uncertainty: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean loss when only the most certain rows are answered: (share answered (n,), mean loss (n,)).

    Rows of equal uncertainty are answered together, so the curve does not depend on the order of the rows.
    """
    order = np.argsort(uncertainty, kind="stable")
    _, inverse, sizes = np.unique(uncertainty[order], return_inverse=True, return_counts=True)
    smoothed = (np.bincount(inverse, weights=loss[order]) / sizes)[inverse]
    number = np.arange(1, len(loss) + 1)
    return number / len(loss), np.cumsum(smoothed) / number


def _auroc(inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Chance that an outside score exceeds an inside one, ties half; weights by sorted distinct score, (b, scores)."""
    below = np.cumsum(inside, axis=1) - 0.5 * inside
    return (outside * below).sum(axis=1) / (inside.sum(axis=1) * outside.sum(axis=1))


def _fpr95(inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    share = np.cumsum(inside, axis=1) / inside.sum(axis=1, keepdims=True)
    threshold = (share < 0.95 - 1e-12).sum(axis=1)
    missed = np.cumsum(outside, axis=1) / outside.sum(axis=1, keepdims=True)
    return missed[np.arange(len(missed)), np.minimum(threshold, missed.shape[1] - 1)]


def detection_scores(inside: np.ndarray, outside: np.ndarray, rng: np.random.Generator) -> dict[str, Score]:
    """How well an uncertainty separates rows from outside the distribution from test rows.

    ``auroc``: chance that an outside row is more uncertain than an inside one, ties counting half. ``fpr95``: share of
    outside rows that pass as inside at the smallest threshold that accepts 95 % of the inside rows (Liang et al. 2018).
    Both samples are resampled, so the standard error covers both.

    Args:
        inside: Uncertainty of test rows, shape (n,).
        outside: Uncertainty of rows from elsewhere, (m,).
        rng: Stream of the resamples; the same stream for every method makes comparisons paired.
    """
    scores, inverse = np.unique(np.concatenate([inside, outside]), return_inverse=True)
    order_in, order_out = inverse[: len(inside)], inverse[len(inside) :]
    plain = [np.bincount(o, minlength=len(scores))[None].astype(np.float64) for o in (order_in, order_out)]
    resamples = min(1000, max(200, 10_000_000 // len(inverse)))
    replicates: dict[str, list[float]] = {"auroc": [], "fpr95": []}
    for _ in range(resamples):
        drawn = [
            np.bincount(o[rng.integers(0, len(o), size=len(o))], minlength=len(scores))[None].astype(np.float64)
            for o in (order_in, order_out)
        ]
        replicates["auroc"].append(float(_auroc(drawn[0], drawn[1])[0]))
        replicates["fpr95"].append(float(_fpr95(drawn[0], drawn[1])[0]))
    values = {"auroc": _auroc(plain[0], plain[1]), "fpr95": _fpr95(plain[0], plain[1])}
    return {
        name: Score(float(values[name][0]), float(np.std(drawn, ddof=1)), replicates=np.asarray(drawn))
        for name, drawn in replicates.items()
    }


def compare(better: Score, than: Score, metric: str) -> dict[str, float | bool | str]:
    """Paired difference of two methods in JSON, with a verdict only beyond two standard errors."""
    difference = better.minus(than)
    signed = difference.value if metric in HIGHER_IS_BETTER else -difference.value
    beyond = abs(difference.value) > 2 * difference.se and difference.value != 0
    verdict = "undecided" if not beyond or metric in NOT_RANKED else ("better" if signed > 0 else "worse")
    return {**difference.to_json(), "verdict": verdict}
