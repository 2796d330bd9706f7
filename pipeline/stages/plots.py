"""The figures of the report that every run has: radius, walks, calibration, uncertainty, deformation."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.bayes.metrics import BINS, confidence_and_hit, equal_width_bins, selective_curve
from pipeline.stages.svg import INK, METHOD_COLOURS, MUTED, SERIES, Figure, drawing
from pipeline.stages.table import OURS, number, title

Arrays = dict[str, np.ndarray]


def methods_in(evaluation: dict[str, Any], arrays: Arrays, kind: str) -> list[str]:
    """Methods whose test predictions of a kind are stored, in the order of the table."""
    return [name for name in evaluation["methods"] if f"test/{name}/{kind}" in arrays]


def score_figure(evaluation: dict[str, Any]) -> Figure:
    """NLL of every method with two standard errors."""
    known = [(n, m["nll"]) for n, m in evaluation["methods"].items() if m["nll"]["value"] is not None]
    known.sort(key=lambda pair: pair[1]["value"])
    alt = "Test NLL of each method, best first: " + ", ".join(f"{title(n)} {s['value']:.3f}" for n, s in known)
    with drawing("scores", alt, size=(4.7, 0.9 + 0.27 * len(known))) as canvas:
        axes = canvas.axes[0, 0]
        lowest, middle = (known[k][1]["value"] for k in (0, len(known) // 2))
        widest = max(4 * (middle - lowest), 8 * (known[0][1]["se"] or 0.0))
        for row, (name, score) in enumerate(known):
            colour = METHOD_COLOURS.get(name, MUTED)
            if score["value"] > lowest + widest:
                axes.plot(lowest + widest, row, ">", color=colour, markersize=6, clip_on=False)
                text = {"xytext": (-7, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
                axes.annotate(f"{score['value']:.3g}", (lowest + widest, row), color=colour, **text)
                continue
            error = 2 * (score["se"] or 0.0)
            axes.errorbar(score["value"], row, xerr=error, fmt="o", color=colour, capsize=2.5, markersize=5)
        if known[-1][1]["value"] > lowest + widest:
            axes.set_xlim(right=lowest + widest)
        axes.set_yticks(range(len(known)), [title(name) for name, _ in known])
        axes.set_ylim(len(known) - 0.5, -0.5)
        axes.set_xlabel("test NLL, nats a row (lower is better)")
        axes.grid(axis="y", visible=False)
    caption = (
        "Bars are two standard errors of each value; methods share the rows, so the paired differences below "
        "are sharper."
    )
    return Figure("scores", "All methods on the same test rows", canvas.svg, caption)


def radius_figure(evaluation: dict[str, Any]) -> Figure:
    """Validation NLL and rise of the fit over the radius."""
    curve = evaluation["radius_curve"]
    radius = np.array([p["radius"] for p in curve])
    scores = np.array([np.nan if p["validation_nll"] is None else p["validation_nll"] for p in curve], dtype=float)
    rises = np.array([np.nan if p.get("nll_rise") is None else p["nll_rise"] for p in curve], dtype=float)
    both = not np.isnan(scores).all()
    alt = f"Curves over the radius up to {radius[-1]:.3g}; the chosen radius is {evaluation['radius']:.3g}."
    with drawing("radius", alt, 2 if both else 1, size=(4.7, 4.3 if both else 2.8)) as canvas:
        panels = [(scores, "validation NLL")] if both else []
        panels.append((rises, "rise of training NLL"))
        for axes, (values, label) in zip(canvas.axes[:, 0], panels, strict=True):
            axes.plot(radius, values, "o-", color=SERIES[0], markersize=3.5)
            axes.axvline(evaluation["radius"], color=INK, linewidth=1, linestyle=(0, (4, 3)))
            axes.set_ylabel(label)
        low = canvas.axes[-1, 0]
        low.axhline(evaluation["gamma"] / 2, color=SERIES[1], linewidth=1)
        beside = {"xycoords": ("axes fraction", "data"), "xytext": (4, 0), "textcoords": "offset points"}
        low.annotate("γ / 2", (1, evaluation["gamma"] / 2), color=SERIES[1], va="center", **beside)
        if np.nanmax(rises, initial=0) > 50 * max(evaluation["gamma"], 1e-9):
            low.set_yscale("symlog", linthresh=max(evaluation["gamma"] / 2, 1e-3))
        low.set_xlabel("radius (units of the parameters)")
    caption = (
        f"Dashed: the chosen radius, by the rule “{evaluation['rule']}”. The rise is of the summed training "
        "NLL over the MAP estimate, mean over walks, in nats."
    )
    return Figure("radius", "Choice of the radius", canvas.svg, caption)


def walks_figure(evaluation: dict[str, Any], arrays: Arrays) -> Figure | None:
    """Rise of the fit along single walks and the range of all."""
    if "paths/rise" not in arrays:
        return None
    rise, radius, bands = arrays["paths/rise"], arrays["paths/radius"], arrays["paths/quantiles"]
    middle = arrays.get("paths/at", np.array([p["radius"] for p in evaluation["radius_curve"]]))
    alt = (
        f"Rise of the training NLL along {len(rise)} walks; at the end the median over all is {bands[1, -1]:.3g} nats."
    )
    with drawing("walks", alt) as canvas:
        axes = canvas.axes[0, 0]
        for line, at in zip(rise, radius, strict=True):
            axes.plot(at, line, color=SERIES[0], alpha=0.3, linewidth=0.8)
        axes.fill_between(middle, bands[0], bands[2], color=SERIES[0], alpha=0.18, linewidth=0)
        axes.plot(middle, bands[1], color=SERIES[0], label="median of all walks")
        axes.axvline(evaluation["radius"], color=INK, linewidth=1, linestyle=(0, (4, 3)))
        top, shown = _top(rise, bands), float(np.nanmax(rise))
        if shown > top:
            axes.set_ylim(min(float(np.nanmin(rise)), 0.0) - 0.03 * top, top)
        axes.set_xlabel("radius")
        axes.set_ylabel("rise of training NLL, nats")
        canvas.figure.legend(loc="outside upper left")
    caption = (
        "Thin lines: single walks. Band: from the tenth to the ninetieth percentile after equally many steps, at the "
        "median radius. A walk on the fiber stays low while it moves away."
        + (f" Peaks up to {shown:.3g} nats are cut off." if shown > top else "")
    )
    return Figure("walks", "Along the walks", canvas.svg, caption)


def _top(rise: np.ndarray, bands: np.ndarray) -> float:
    """Upper end of an axis on which the bulk of the walks can be read, whatever a few of them do."""
    return max(1.6 * float(np.nanquantile(bands[2], 0.8)), 1.2 * float(np.nanquantile(rise, 0.9)), 1e-3)


def reliability_figure(evaluation: dict[str, Any], arrays: Arrays) -> Figure | None:
    """Reliability diagrams, one panel a method."""
    names = methods_in(evaluation, arrays, "probabilities")
    if not names:
        return None
    y = arrays["test/y"].astype(int)
    columns = 3
    lines = -(-len(names) // columns)
    errors = ", ".join(f"{title(n)} {evaluation['methods'][n]['ece']['value']:.3f}" for n in names)
    alt = f"Reliability diagrams: share right against confidence in {BINS} bins. ECE: {errors}."
    with drawing("reliability", alt, lines, columns, size=(4.7, 0.25 + 1.72 * lines)) as canvas:
        panels = canvas.axes.ravel()
        for axes, name in zip(panels, names, strict=False):
            confidence, hit = confidence_and_hit(arrays[f"test/{name}/probabilities"], y)
            bins = equal_width_bins(confidence)
            size = np.bincount(bins, minlength=BINS)
            filled = size > 0
            right = np.bincount(bins, weights=hit, minlength=BINS)[filled] / size[filled]
            said = np.bincount(bins, weights=confidence, minlength=BINS)[filled] / size[filled]
            axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8)
            colour = METHOD_COLOURS.get(name, MUTED)
            axes.plot(said, right, color=colour, linewidth=1)
            axes.scatter(said, right, s=4 + 55 * size[filled] / size.sum(), color=colour, zorder=3, linewidth=0)
            axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
            axes.set_title(title(name).replace(", ", ",\n"), fontsize=8.5)
            axes.set_aspect("equal")
        for axes in panels[len(names) :]:
            axes.set_visible(False)
        canvas.figure.supxlabel("confidence", fontsize=9)
        canvas.figure.supylabel("share right", fontsize=9)
    caption = (
        "On the diagonal, rows predicted with 80 % are right 80 % of the time; below it the method is "
        f"overconfident. {BINS} bins; area of a point: share of rows."
    )
    return Figure("reliability", "Does the confidence hold?", canvas.svg, caption)


def selective_figure(evaluation: dict[str, Any], arrays: Arrays) -> Figure | None:
    """Error when only the most certain rows are answered."""
    names = methods_in(evaluation, arrays, "probabilities")
    if not names:
        return None
    y = arrays["test/y"].astype(int)
    alt = "Error rate over the share of rows answered, most certain first, for each method."
    with drawing("selective", alt, size=(4.7, 3.1 + 0.17 * -(-len(names) // 3))) as canvas:
        axes = canvas.axes[0, 0]
        for name in names:
            p = arrays[f"test/{name}/probabilities"]
            wrong = (p.argmax(axis=1) != y).astype(float)
            total = arrays[f"test/{name}/aleatoric"] + arrays[f"test/{name}/epistemic"]
            share, error = selective_curve(total, wrong)
            keep = share >= 0.05
            colour = METHOD_COLOURS.get(name, MUTED)
            thick = {"linewidth": 1.8, "zorder": 3} if name in OURS else {"linewidth": 0.9, "alpha": 0.85}
            axes.plot(share[keep], error[keep], color=colour, label=title(name), **thick)
        axes.set_xlabel("share of rows answered, most certain first")
        axes.set_ylabel("error rate")
        axes.set_ylim(bottom=0)
        canvas.figure.legend(loc="outside lower center", ncols=3, columnspacing=1.0, handlelength=1.4)
    caption = "A useful uncertainty makes the curve low on the left: the rows it is sure of are right."
    return Figure("selective", "If it may say “I do not know”", canvas.svg, caption)


def uncertainty_figure(evaluation: dict[str, Any], arrays: Arrays) -> Figure | None:
    """Histograms of the total uncertainty on test rows and on sets from elsewhere, walk and MAP."""
    sets = ["test", *(f"ood/{name}" for name in evaluation["ood"])]
    names = [n for n in ("walk", "map", "ensemble") if f"test/{n}/aleatoric" in arrays]
    if not names:
        return None
    words = [f"{k}: AUROC {number(v['walk']['auroc'])}" for k, v in evaluation["ood"].items() if "walk" in v]
    alt = "Histograms of predictive uncertainty on test rows and out-of-distribution rows. " + "; ".join(words)
    unit = "entropy, nats" if "test/walk/probabilities" in arrays else "predictive standard deviation"
    with drawing("uncertainty", alt, len(names), size=(4.7, 0.5 + 1.35 * len(names))) as canvas:
        spreads = {name: {s: _spread(arrays, s, name) for s in sets} for name in names}
        # One axis for all, so that panels can be compared.
        pooled = np.concatenate([value for by in spreads.values() for value in by.values()])
        bottom, top = np.quantile(pooled, [0.0, 0.995])
        bottom, top = (0.0, max(top, 1e-9)) if top > 2 * bottom else (0.9 * bottom, 1.1 * top)
        for axes, name in zip(canvas.axes[:, 0], names, strict=True):
            values = spreads[name]
            for position, (place, value) in enumerate(values.items()):
                colour = SERIES[0] if place == "test" else SERIES[1 + position % 6]
                label = "test rows" if place == "test" else place.removeprefix("ood/")
                shade: dict[str, Any] = {"color": colour, "alpha": 0.35, "edgecolor": colour, "histtype": "stepfilled"}
                axes.hist(np.minimum(value, top), bins=np.linspace(bottom, top, 36), density=True, label=label, **shade)
            axes.set_title(title(name), fontsize=8.5, loc="left")
            axes.set_yticks([])
        canvas.axes[0, 0].legend()
        canvas.axes[-1, 0].set_xlabel(unit)
    note = (
        "Rows from elsewhere should lie to the right of the test rows."
        if len(sets) > 1
        else "No out-of-distribution set was given (data.ood)."
    )
    return Figure("uncertainty", "How unsure it is", canvas.svg, f"Total predictive uncertainty of each row. {note}")


def _spread(arrays: Arrays, place: str, name: str) -> np.ndarray:
    total = arrays[f"{place}/{name}/aleatoric"] + arrays[f"{place}/{name}/epistemic"]
    total = total[np.isfinite(total)]  # rows from far away may have none
    return total if f"{place}/{name}/probabilities" in arrays else np.sqrt(total)
