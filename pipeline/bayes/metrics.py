"""Metrics of predictions, each with its standard error over test rows. Numpy in double precision, natural logarithms.

scikit-learn and torchmetrics hold the same metrics for one set of weights; here they are vectorised over bootstrap
weights, and the tests hold them to those libraries.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.bayes.bootstrap import Score, bootstrap, resampled, row_mean
from pipeline.bayes.mixture import component_nll, mixture_cdf, mixture_crps, mixture_nll, mixture_quantile

BINS = 15
HIGHER_IS_BETTER = frozenset({"accuracy", "auroc"})
NOT_RANKED = frozenset({"coverage", "width", "nll_per_draw", "accuracy_per_draw", "rmse_per_draw"})
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
    probabilities: np.ndarray,
    y: np.ndarray,
    nll_draws: np.ndarray | None,
    counts: np.ndarray,
    hit_draws: np.ndarray | None = None,
) -> dict[str, Score]:
    """All scores of class probabilities.

    Args:
        probabilities: Model average, shape (rows, classes).
        y: True class numbers, (rows,).
        nll_draws: Mean over single draws of each row's NLL, (rows,); None where there is one draw.
        counts: Bootstrap counts, (resamples, rows).
        hit_draws: Share of single draws that are right about each row, (rows,); None where there is one draw.
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
        "accuracy_per_draw": row_mean(hit if hit_draws is None else hit_draws),
    }


def regression_scores(mean: np.ndarray, variance: np.ndarray, y: np.ndarray, counts: np.ndarray) -> dict[str, Score]:
    """All scores of a mixture of Gaussians, in the unit of y.

    Args:
        mean: Component means, shape (draws, rows).
        variance: Component variances, (draws, rows).
        y: Targets, (rows,).
        counts: Bootstrap counts, (resamples, rows).
    """
    squares, draw_squares = (mean.mean(axis=0) - y) ** 2, ((mean - y) ** 2).mean(axis=0)
    position = mixture_cdf(mean, variance, y)
    low, high = mixture_quantile(mean, variance, 0.05), mixture_quantile(mean, variance, 0.95)
    return {
        "nll": row_mean(mixture_nll(mean, variance, y)),
        "rmse": root_mean(squares, counts),
        "crps": row_mean(mixture_crps(mean, variance, y)),
        "coverage": row_mean((position >= 0.05) & (position <= 0.95)),
        "width": row_mean(high - low),
        "nll_per_draw": row_mean(component_nll(mean, variance, y).mean(axis=0)),
        "rmse_per_draw": root_mean(draw_squares, counts),
    }


def root_mean(squares: np.ndarray, counts: np.ndarray) -> Score:
    """Root of the mean of squared errors (rows,)."""
    return bootstrap(lambda weights: np.sqrt(weights @ squares / weights.sum(axis=1)), counts)


def entropy(probabilities: np.ndarray) -> np.ndarray:
    """Entropy over the last axis, in nats."""
    return -(probabilities * np.log(np.maximum(probabilities, TINY))).sum(axis=-1)


def selective_curve(uncertainty: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean loss when only the most certain rows are answered: (share answered (n,), mean loss (n,)).

    Rows of equal uncertainty are answered together, so the curve does not depend on the order of the rows.
    """
    order = np.argsort(uncertainty, kind="stable")
    _, inverse, sizes = np.unique(uncertainty, return_inverse=True, return_counts=True)
    smoothed = (np.bincount(inverse, weights=loss) / sizes)[inverse]
    number = np.arange(1, len(loss) + 1)
    return number / len(loss), np.cumsum(smoothed[order]) / number


def selective_scores(
    uncertainty: np.ndarray, loss: np.ndarray, shares: Sequence[float], counts: np.ndarray, root: bool = False
) -> list[Score]:
    """Points of the selective-prediction curve with their bootstrap standard errors, one a share of answered rows.

    Args:
        uncertainty: Of each row, (rows,); the most certain ones are answered.
        loss: Of each row, (rows,): 0 or 1 for classes, a squared error for numbers.
        shares: Shares of the rows that are answered, above 0.
        counts: Bootstrap counts, (resamples, rows).
        root: Take the root of the mean loss.
    """
    order = np.argsort(uncertainty, kind="stable")
    first = np.unique(uncertainty[order], return_index=True)[1]
    ranked = loss[order]

    def points(weights: np.ndarray) -> np.ndarray:
        drawn = weights[:, order].astype(np.float64)
        sizes = np.add.reduceat(drawn, first, axis=1)
        losses = np.add.reduceat(drawn * ranked, first, axis=1)
        rows, total = np.cumsum(sizes, axis=1), np.cumsum(losses, axis=1)
        wanted = np.asarray(shares) * rows[:, -1:]
        # The group of equal uncertainty in which a share ends counts with the part that is needed of it.
        last = np.stack([np.searchsorted(line, ends - 1e-9) for line, ends in zip(rows, wanted, strict=True)])
        row, mean, size, inside = (np.take_along_axis(array, last, axis=1) for array in (rows, total, sizes, losses))
        mean = (mean - inside + (wanted - row + size) / size * inside) / wanted
        return np.sqrt(mean) if root else mean

    value = points(np.ones((1, len(loss))))[0]
    step = max(1, 1_000_000 // len(loss))
    drawn = np.concatenate([points(counts[i : i + step]) for i in range(0, len(counts), step)])
    return [resampled(float(v), r, len(loss)) for v, r in zip(value, drawn.T, strict=True)]


def detection_scores(
    inside: np.ndarray, outside: np.ndarray, rng: np.random.Generator, resamples: int = 1000
) -> dict[str, Score]:
    """How well an uncertainty separates rows from outside the distribution from test rows.

    ``auroc``: chance that an outside row is more uncertain than an inside one, ties counting half. ``fpr95``: share of
    outside rows that pass as inside at the smallest threshold that accepts 95 % of the inside rows (Liang et al. 2018).
    Both samples are resampled, so the standard error covers both. Rows of no known uncertainty (NaN) cannot be ranked:
    then both are NaN.

    Args:
        inside: Uncertainty of test rows, shape (n,).
        outside: Uncertainty of rows from elsewhere, (m,).
        rng: Stream of the resamples; the same stream for every method makes comparisons paired.
        resamples: Bootstrap resamples; above ten million drawn rows fewer, never fewer than 200.
    """
    resamples = min(resamples, max(200, 10_000_000 // (len(inside) + len(outside))))
    if np.isnan(inside).any() or np.isnan(outside).any():
        return {name: Score(np.nan, np.nan, replicates=np.full(resamples, np.nan)) for name in ("auroc", "fpr95")}
    scores, inverse = np.unique(np.concatenate([inside, outside]), return_inverse=True)
    places = (inverse[: len(inside)], inverse[len(inside) :])
    value = _detection(*(np.bincount(place, minlength=len(scores)) for place in places))
    drawn = np.empty((resamples, 2))
    for line in drawn:
        chosen = (place[rng.integers(0, len(place), size=len(place))] for place in places)
        line[:] = _detection(*(np.bincount(place, minlength=len(scores)) for place in chosen))
    fewest = min(len(inside), len(outside))
    return {name: resampled(value[k], drawn[:, k], fewest) for k, name in enumerate(("auroc", "fpr95"))}


def _detection(inside: np.ndarray, outside: np.ndarray) -> tuple[float, float]:
    """AUROC and FPR95 from the numbers of rows at each distinct score, in rising order."""
    below, passed = np.cumsum(inside), np.cumsum(outside)
    auroc = float(outside @ (below - 0.5 * inside)) / (float(below[-1]) * float(passed[-1]))
    threshold = int(np.searchsorted(below, 0.95 * below[-1] - 1e-9))
    return auroc, float(passed[threshold] / passed[-1])


def compare(better: Score, than: Score, metric: str) -> dict[str, float | str | None]:
    """Paired difference of two methods in JSON, with a verdict only beyond two standard errors.

    Where one of them broke down, or there is a single row, there is no difference: both numbers are None.
    """
    with np.errstate(invalid="ignore"):  # infinite minus infinite
        difference = better.minus(than)
    if not (np.isfinite(difference.value) and np.isfinite(difference.se)):
        return {"value": None, "se": None, "verdict": "undecided"}
    signed = difference.value if metric in HIGHER_IS_BETTER else -difference.value
    beyond = abs(difference.value) > 2 * difference.se and difference.value != 0
    verdict = "undecided" if not beyond or metric in NOT_RANKED else ("better" if signed > 0 else "worse")
    return {**difference.to_json(), "verdict": verdict}
