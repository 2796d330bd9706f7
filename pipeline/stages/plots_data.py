"""The figures of the report that depend on the data: bands, maps, images, the plane of the walks, the deformation."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np

from pipeline.stages.figures import looks_like_images
from pipeline.stages.plots import Arrays, methods_in
from pipeline.stages.svg import INK, METHOD_COLOURS, MUTED, SERIES, Figure, drawing
from pipeline.stages.table import minus, title


def band_figure(evaluation: dict[str, Any], arrays: Arrays) -> Figure | None:
    """Predictive mean and 90 % interval over one input."""
    names = [n for n in ("walk", "map", "deformation", "ensemble") if f"grid/{n}/mean" in arrays]
    if not names or "grid/x" not in arrays:
        return None
    line = arrays["grid/x"][:, 0]
    alt = "Predictive mean and central 90 % interval over the input, with training points, for " + ", ".join(
        map(title, names)
    )
    low = min(arrays["train/y"].min(), *(np.quantile(arrays[f"grid/{n}/low"], 0.02) for n in names))
    high = max(arrays["train/y"].max(), *(np.quantile(arrays[f"grid/{n}/high"], 0.98) for n in names))
    with drawing("band", alt, len(names), size=(4.7, 0.4 + 1.75 * len(names))) as canvas:
        for axes, name in zip(canvas.axes[:, 0], names, strict=True):
            colour = METHOD_COLOURS[name]
            mean, noise = arrays[f"grid/{name}/mean"], np.sqrt(arrays[f"grid/{name}/epistemic"])
            axes.fill_between(
                line, arrays[f"grid/{name}/low"], arrays[f"grid/{name}/high"], color=colour, alpha=0.18, lw=0
            )
            if noise.any():
                axes.fill_between(line, mean - 1.645 * noise, mean + 1.645 * noise, color=colour, alpha=0.3, lw=0)
            axes.plot(line, mean, color=colour)
            axes.scatter(arrays["train/x"][:, 0], arrays["train/y"], s=5, color=INK, alpha=0.6, linewidth=0)
            axes.scatter(
                arrays["test/x"][:, 0], arrays["test/y"], s=6, color=MUTED, alpha=0.6, marker="x", linewidth=0.7
            )
            axes.set_title(title(name), fontsize=8.5, loc="left")
            axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
        canvas.axes[-1, 0].set_xlabel("input")
        canvas.figure.supylabel("target", fontsize=9)
    caption = (
        "Light: central 90 % interval. Darker: what the draws disagree about (epistemic). Dots: training "
        "points; crosses: test points."
    )
    return Figure("band", "Predictive band", canvas.svg, caption)


def map_figure(evaluation: dict[str, Any], arrays: Arrays) -> Figure | None:
    """Entropy over two inputs, with training points."""
    wanted = ("walk", "map", "deformation", "ensemble_temperature", "ensemble", "temperature")
    names = [n for n in wanted if f"grid/{n}/probabilities" in arrays][:4]
    if not names or "grid/x" not in arrays:
        return None
    side = round(len(arrays["grid/x"]) ** 0.5)
    x, y = (arrays["grid/x"][:, k].reshape(side, side) for k in (0, 1))
    classes = arrays[f"grid/{names[0]}/probabilities"].shape[1]
    alt = "Map of the predictive entropy over the two inputs, dark where the prediction is unsure, for " + ", ".join(
        map(title, names)
    )
    columns = min(2, len(names))
    lines = -(-len(names) // columns)
    with drawing("map", alt, lines, columns, size=(4.7, 0.55 + 2.2 * lines)) as canvas:
        panels = canvas.axes.ravel()
        for axes, name in zip(panels, names, strict=False):
            total = (arrays[f"grid/{name}/aleatoric"] + arrays[f"grid/{name}/epistemic"]).reshape(side, side)
            shown = axes.pcolormesh(
                x, y, total, cmap="viridis_r", vmin=0, vmax=np.log(classes), rasterized=True, shading="gouraud"
            )
            axes.grid(visible=False)
            points, labels = arrays["train/x"], arrays["train/y"].astype(int)
            for label in range(min(classes, 8)):
                some = points[labels == label][:300]
                axes.scatter(
                    *some.T, s=6, color=SERIES[label], linewidth=0.3, edgecolor="white", rasterized=len(some) > 400
                )
            axes.set_title(title(name), fontsize=8.5, loc="left")
        for axes in panels[len(names) :]:
            axes.set_visible(False)
        canvas.figure.colorbar(
            shown, ax=list(panels[: len(names)]), location="bottom", label="entropy, nats", aspect=40, shrink=0.9
        )
    caption = (
        "Predictive entropy; dots are training rows. Far from the data a network that knows what it does not "
        "know turns dark."
    )
    return Figure("map", "Where it is unsure", canvas.svg, caption)


def coverage_figure(evaluation: dict[str, Any], arrays: Arrays) -> Figure | None:
    """Regression: error against predicted standard deviation, in groups of equally many rows."""
    names = methods_in(evaluation, arrays, "mean")
    if not names:
        return None
    alt = "Root mean squared error against predicted standard deviation in ten groups of rows, for each method."
    y = arrays["test/y"]
    groups = min(10, max(2, len(y) // 20), len(y))
    with drawing("coverage", alt, size=(4.7, 3.1 + 0.17 * -(-len(names) // 3))) as canvas:
        axes = canvas.axes[0, 0]
        largest = 0.0
        for name in names:
            variance = arrays[f"test/{name}/aleatoric"] + arrays[f"test/{name}/epistemic"]
            order = np.array_split(np.argsort(variance, kind="stable"), groups)
            square = (arrays[f"test/{name}/mean"] - y) ** 2
            said = np.sqrt([variance[g].mean() for g in order])
            made = np.sqrt([square[g].mean() for g in order])
            largest = max(largest, said.max(), made.max())
            axes.plot(
                said, made, "o-", markersize=3.5, linewidth=1, color=METHOD_COLOURS.get(name, MUTED), label=title(name)
            )
        axes.plot([0, largest], [0, largest], color=MUTED, linewidth=0.8)
        axes.set_xlabel("predicted standard deviation")
        axes.set_ylabel("root mean squared error")
        canvas.figure.legend(loc="outside lower center", ncols=3, columnspacing=1.0, handlelength=1.4)
    caption = (
        f"Test rows in {groups} groups by predicted standard deviation; on the diagonal the error is what was "
        "predicted."
    )
    return Figure("coverage", "Does the error bar hold?", canvas.svg, caption)


def plane_figure(evaluation: dict[str, Any], arrays: Arrays) -> Figure | None:
    """Walks and random directions in a plane of the parameter space."""
    if "plane/walks" not in arrays:
        return None
    walks, ends, free = arrays["plane/walks"], arrays["plane/ends"], arrays["plane/random"]
    alt = f"{len(walks)} walks and random directions in the main plane of the walks at the chosen radius."
    with drawing("plane", alt, size=(4.7, 3.7)) as canvas:
        axes = canvas.axes[0, 0]
        for line in walks:
            axes.plot(*line.T, color=SERIES[0], alpha=0.45, linewidth=0.9)
        axes.scatter(*ends.T, s=14, color=SERIES[0], label="walks at the radius", zorder=3, linewidth=0)
        axes.scatter(
            *free.T, s=14, color=SERIES[4], marker="x", label="random directions, same norm", zorder=3, linewidth=1
        )
        axes.scatter(0, 0, s=60, color=INK, marker="*", label="MAP estimate", zorder=4, linewidth=0)
        axes.set_xlabel("first direction")
        axes.set_ylabel("second direction")
        canvas.figure.legend(loc="outside upper center", ncols=2, columnspacing=0.9, handletextpad=0.3)
    caption = (
        "Projection on the two main directions of the walk points at the chosen radius. Random directions of "
        "the same norm stay near the middle of any plane; walks are carried where the fit allows."
    )
    return Figure("plane", "The walks in a plane", canvas.svg, caption)


def learning_figure(deformation: dict[str, Any]) -> Figure | None:
    """Learning curve of the deformation model and its held-out error over the radius."""
    curves = [(k, deformation.get(k)) for k in ("learning_curve", "history", "curve") if deformation.get(k)]
    by_radius = deformation.get("heldout_error_by_radius") or deformation.get("heldout_by_radius")
    steps = _series(curves[0][1], ("step",), ("heldout_error", "score", "loss")) if curves else None
    radii = _series(by_radius, ("radius",), ("heldout_error", "error")) if by_radius else None
    panels = [panel for panel in ((steps, "training step"), (radii, "radius")) if panel[0]]
    if not panels:
        return None
    error = deformation.get("heldout_error")
    alt = "Relative squared error on held-out walks" + (
        f", {error:.3f} in the end." if isinstance(error, float) else "."
    )
    with drawing("learning", alt, len(panels), size=(4.7, 0.3 + 2.1 * len(panels))) as canvas:
        for axes, (series, label) in zip(canvas.axes[:, 0], panels, strict=True):
            assert series is not None
            axes.plot(series[0], series[1], "o-" if len(series[0]) < 40 else "-", color=SERIES[2], markersize=3.5)
            axes.set_xlabel(label)
            axes.set_ylabel("held-out error" if label == "radius" else series[2])
    caption = (
        "Held-out error: squared error of the predicted residual on walks it never saw, relative to "
        "predicting none (1 = learnt nothing, 0 = exact)."
    )
    return Figure("learning", "What the deformation learnt", canvas.svg, caption)


def _series(points: Any, xs: tuple[str, ...], ys: tuple[str, ...]) -> tuple[list[float], list[float], str] | None:
    """The first quantity that changes along the points: its abscissae, its values, and its name."""
    if not isinstance(points, list) or not points or not isinstance(points[0], dict):
        return None
    x = next((k for k in xs if k in points[0]), None)
    for y in ys if x else ():
        known = [(p[x], p[y]) for p in points if p.get(y) is not None]
        if len(known) > 1 and len({value for _, value in known}) > 1:
            return [at for at, _ in known], [value for _, value in known], y.replace("_", " ").replace("held", "held-")
    return None


def picture(values: np.ndarray) -> str:
    """One row as a PNG in a data URI: its shortest axis at least 8 pixels, grey or colour, scaled to its own range."""
    from PIL import Image

    if values.ndim == 1:
        side = round(len(values) ** 0.5)
        values = values.reshape(side, side)
    if values.ndim == 3:
        values = values[0] if values.shape[0] == 1 else np.moveaxis(values, 0, -1)
    low, high = values.min(), values.max()
    scaled = ((values - low) / max(high - low, 1e-12) * 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(scaled).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def gallery(arrays: Arrays, classes: list[str], features: list[str], group: str) -> list[dict[str, Any]]:
    """Cards for rows of a group (uncertain, wrong): what was said, what is true, and a picture where there is one."""
    position = arrays.get(f"rows/{group}/position")
    if position is None:
        return []
    x, y, number = arrays.get(f"rows/{group}/x"), arrays["test/y"], arrays["test/index"]
    p, mean = arrays.get("test/walk/probabilities"), arrays.get("test/walk/mean")
    total = arrays["test/walk/aleatoric"] + arrays["test/walk/epistemic"]
    pictures = x is not None and looks_like_images(x) and not _named(features)
    cards: list[dict[str, Any]] = []
    for line, row in enumerate(position.tolist()):
        if row >= len(y):
            continue
        card: dict[str, Any] = {
            "row": int(number[row]),
            "cells": [],
            "picture": picture(x[line]) if x is not None and pictures else None,
        }
        if p is not None:
            best = int(p[row].argmax())
            true = int(y[row])
            card |= {
                "said": classes[best],
                "chance": f"{100 * p[row, best]:.0f} %",
                "true": classes[true],
                "right": best == true,
            }
        elif mean is not None:
            card |= {
                "said": minus(f"{mean[row]:.4g}"),
                "chance": f"± {total[row] ** 0.5:.2g}",
                "true": minus(f"{y[row]:.4g}"),
                "right": None,
            }
        if x is not None and not pictures and x.ndim == 2:
            card["cells"] = [
                (n if not n.isdigit() else f"feature {n}", minus(f"{v:.4g}"))
                for n, v in list(zip(features or map(str, range(x.shape[1])), x[line], strict=False))[:4]
            ]
        cards.append(card)
    return cards


def _named(features: list[str]) -> bool:
    """Whether columns have names of their own, and are then no pixels."""
    return bool(features) and not all(name.lower().startswith(("pixel", "px")) or name.isdigit() for name in features)
