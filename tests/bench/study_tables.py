"""The tables of the study: one summary, and one table a data set, in Markdown."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.stages.table import ARROWS, METRICS, TITLES, title
from tests.bench.study_cases import Case

SHOWN = {
    "classification": ("nll", "accuracy", "ece", "brier"),
    "regression": ("nll", "rmse", "crps", "coverage", "nll_per_draw"),
}
SCALED = {"rmse": 1.0, "crps": 1.0, "width": 1.0}
OURS = ("walk", "walk_temperature", "deformation")

Row = dict[str, Any]


def of(rows: list[Row], method: str, metric: str, standard: bool = False) -> tuple[float, float] | None:
    """Mean over seeds and its standard error: over seeds where there are three or more, else over test rows."""
    scores = [r["evaluation"]["methods"].get(method, {}).get(metric) for r in rows]
    if not scores or any(s is None or s["value"] is None for s in scores):
        return None
    values, errors = (np.array([s[key] for s in scores], dtype=float) for key in ("value", "se"))
    if standard:
        scale = np.array([r["y_std"] for r in rows])
        if metric in SCALED:
            values, errors = values / scale, errors / scale
        elif metric.startswith("nll"):
            values = values - np.log(scale)
    return float(values.mean()), over_rows(errors) if len(rows) < 3 else float(values.std(ddof=1) / len(rows) ** 0.5)


def over_rows(errors: np.ndarray) -> float:
    """Standard error of a mean over seeds whose values have these standard errors over test rows."""
    return float(np.sqrt((errors**2).sum()) / len(errors))


def against(rows: list[Row], ours: str, other: str) -> tuple[float, float] | None:
    """NLL of ours minus another's, paired on test rows: mean over seeds, and its standard error over test rows."""
    pairs = [r["evaluation"]["difference"].get(f"{ours}-{other}", {}).get("nll") for r in rows]
    if any(p is None or p["value"] is None for p in pairs):
        return None
    return float(np.mean([p["value"] for p in pairs])), over_rows(np.array([p["se"] for p in pairs]))


def methods_of(rows: list[Row]) -> list[str]:
    """Methods that every seed has, in the order of the table."""
    return [m for m in TITLES if all(m in r["evaluation"]["methods"] for r in rows)]


def best_of(rows: list[Row], names: list[str]) -> str:
    """The method of the lowest mean NLL."""
    found = {name: of(rows, name, "nll") for name in names}
    return min((n for n, score in found.items() if score), key=lambda n: found[n][0])  # type: ignore[index]


def standing(rows: list[Row]) -> tuple[str, tuple[float, float] | None, str]:
    """The best method that is not ours, the walk's paired difference to it, and in words how the walk stands.

    Temperature on top of the walk and the deformation are made of its points: shown, and not counted as other methods.
    """
    other = best_of(rows, [m for m in methods_of(rows) if m not in OURS])
    gap = against(rows, "walk", other)
    if gap is None:
        return other, None, "no"
    worse, error = gap
    return other, gap, "best" if worse <= 0 else "within one" if worse <= error else "no"


def summary(results: list[tuple[Case, list[Row]]], failed: list[str], missing: list[str]) -> list[str]:
    """One line a data set, the count, and what is not there."""
    heads = ["data set", "seeds", "MAP", "fiber walk", "walk, temperature", "deformation", "ensemble, temperature"]
    heads += ["best other method", "walk − that, paired", "walk is best, or within one error"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    counts = {"best": 0, "within one": 0, "no": 0}
    for case, rows in results:
        best, gap, words = standing(rows)
        counts[words] += 1
        names = ("map", "walk", "walk_temperature", "deformation", "ensemble_temperature")
        values = [plain(of(rows, name, "nll", case.standard)) for name in names]
        line = [case.title, str(len(rows)), *values]
        line += [f"{title(best)} {plain(of(rows, best, 'nll', case.standard))}", cell(gap, signed=True), words]
        lines.append(f"| {' | '.join(line)} |")
    good = counts["best"] + counts["within one"]
    lines += [
        "",
        f"The walk is the best method, or within one standard error of the best, on **{good} of {len(results)}** data "
        f"sets (best on {counts['best']}). Test NLL in nats a row, lower is better; mean over seeds. The error is that "
        "of the paired difference over test rows. Temperature on top of the walk and the deformation are made of its "
        "points: they are shown, and not counted as other methods.",
    ]
    if missing:
        lines += ["", f"Not run for this table: {'; '.join(missing)}. A dash: not run, or not possible there."]
    if failed:
        lines += ["", "Failed: " + "; ".join(failed) + "."]
    return [*lines, ""]


def table(case: Case, rows: list[Row]) -> list[str]:
    """Markdown of one data set."""
    first = rows[0]["evaluation"]
    metrics = SHOWN[first["task"]]
    sets = list(first["ood"])
    lines = [f"**{case.title}.** {described(rows)}", ""]
    heads = [f"{METRICS[first['task']][m]} {ARROWS.get(m, '↓')}".strip() for m in metrics]
    heads += [f"AUROC, {s} ↑" for s in sets] + ["walk − it, NLL"]
    lines += [f"| | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for name in methods_of(rows):
        cells = [cell(of(rows, name, metric, case.standard)) for metric in metrics]
        cells += [cell(_detection(rows, s, name)) for s in sets]
        lines.append(f"| {title(name)} | {' | '.join([*cells, cell(against(rows, 'walk', name), signed=True)])} |")
    if case.standard:
        lines += ["", "NLL, RMSE and CRPS in units of the standardised target, as the published numbers are."]
    if case.note:
        lines += ["", case.note]
    lines += [f"\nPublished by others, under their own protocol: {line}." for line in case.published]
    return [*lines, ""]


def described(rows: list[Row]) -> str:
    """Network, sizes, walks and what was chosen, in one line."""
    first, plan = rows[0]["evaluation"], rows[0]["plan"]
    size, config = first["rows"], rows[0]["config"]
    model = config.get("model", {})
    hidden = "-".join(map(str, model.get("hidden", [50])))
    network = (
        f"{model.get('architecture', 'mlp')} {hidden} {model.get('activation', 'tanh')}, D = {first['walk']['dim']:,}"
    )
    chosen = {r["plan"]["correction"] for r in rows}
    radii = ", ".join(format(r["evaluation"]["radius"], ".3g") for r in rows)
    starts = first["walk"]["starts"]
    return (
        f"{size['train']} training, {size['validation']} validation, {size['test']} test rows; {network}; "
        f"prior precision {config.get('prior', {}).get('precision', 1.0)}; {starts} start{'s' if starts > 1 else ''}, "
        f"{first['walk']['walks']} walks of {plan['steps']} steps ({', '.join(sorted(chosen))}), "
        f"{first['draws']} draws; "
        f"seeds {', '.join(str(r['seed']) for r in rows)}; radius {radii}."
    )


def _detection(rows: list[Row], name: str, method: str) -> tuple[float, float] | None:
    scores = [r["evaluation"]["ood"].get(name, {}).get(method, {}).get("auroc") for r in rows]
    if any(s is None for s in scores):
        return None
    return float(np.mean([s["value"] for s in scores])), over_rows(np.array([s["se"] for s in scores]))


def cell(score: tuple[float, float] | None, signed: bool = False) -> str:
    """Value ± standard error."""
    if score is None:
        return "–"
    digits = 3 if abs(score[0]) < 100 else 1
    return f"{score[0]:{'+' if signed else ''}.{digits}f} ± {score[1]:.{digits}f}".replace("-", "−")


def plain(score: tuple[float, float] | None) -> str:
    """The value alone."""
    return "–" if score is None else f"{score[0]:.3f}".replace("-", "−")
