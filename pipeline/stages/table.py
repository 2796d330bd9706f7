"""The evaluation in words and as a table. A win is called a win only beyond two standard errors of the difference."""

from __future__ import annotations

import math
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

TITLES = {
    "map": "MAP",
    "walk": "fiber walk",
    "walk_temperature": "walk, temperature",
    "deformation": "deformation",
    "temperature": "MAP, temperature",
    "random": "random directions",
    "gaussian": "gaussian control",
    "ensemble": "ensemble of MAPs",
    "ensemble_temperature": "ensemble, temperature",
    "laplace": "Laplace, sampled",
    "laplace_linearised": "Laplace, linearised",
    "laplace_torch": "laplace-torch",
    "swag": "SWAG",
}
OURS = ("walk", "walk_temperature", "deformation")
"""Methods that are compared with every other one."""
METRICS = {
    "classification": {
        "nll": "NLL",
        "accuracy": "accuracy",
        "ece": "ECE",
        "ece_adaptive": "ECE, adaptive",
        "brier": "Brier",
        "nll_per_draw": "NLL of a draw",
        "accuracy_per_draw": "accuracy of a draw",
    },
    "regression": {
        "nll": "NLL",
        "rmse": "RMSE",
        "crps": "CRPS",
        "coverage": "coverage of 90 %",
        "width": "width of 90 %",
        "nll_per_draw": "NLL of a draw",
        "rmse_per_draw": "RMSE of a draw",
    },
}
PAGE_ONLY = ("ece_adaptive", "width", "nll_per_draw", "accuracy_per_draw", "rmse_per_draw")
"""Metrics that the report shows and the terminal, 80 columns wide, does not."""
ARROWS = {
    "accuracy": "↑",
    "coverage": "",
    "width": "",
    "nll_per_draw": "",
    "accuracy_per_draw": "",
    "rmse_per_draw": "",
}


def title(method: str) -> str:
    """Name of a method for people."""
    return TITLES.get(method, method.replace("_", " "))


def number(score: dict[str, Any] | None, digits: int = 3, sign: str = "") -> str:
    """Value ± standard error; large values with fewer decimals."""
    if not score or score["value"] is None:
        return "–"
    value, error = score["value"], score["se"]
    form = ".4g" if abs(value) >= 10_000 else f".{digits if abs(value) < 100 else 1}f"
    shown = f"{value:{sign}{form}}"
    shown = shown.lstrip("+-") if float(shown) == 0 else shown
    return minus(shown if error is None else f"{shown} ± {error:{form}}")


def gap(difference: dict[str, Any], sign: str = "+") -> str:
    """A difference ± its standard error, with two digits of the error where three decimals do not show them."""
    error = difference["se"] or 1.0
    return number(difference, digits=min(max(3, 1 - math.floor(math.log10(error))), 6), sign=sign)


def minus(text: str) -> str:
    """Numbers with the sign that print has for them."""
    return text.replace("-", "−")


def metric_titles(evaluation: dict[str, Any]) -> dict[str, str]:
    """Metrics of this task with their titles, in the order of the table."""
    return METRICS[evaluation["task"]]


def mark(evaluation: dict[str, Any], metric: str, method: str) -> str:
    """How a method stands in a metric.

    best: beats every other beyond two standard errors, or is one of ours and only ours are not told apart from it;
    tied: not told apart from the best; nothing where all are tied.
    """
    leaders, methods = evaluation["leaders"].get(metric, []), evaluation["methods"]
    if method not in leaders or len(leaders) == len(methods):
        return ""
    return "best" if len(leaders) == 1 or set(leaders) <= set(OURS) else "tied"


def ordered(by_method: dict[str, Any]) -> dict[str, Any]:
    """Entries by method in the order of the table, whatever order they are stored in."""
    names = [*(name for name in TITLES if name in by_method), *(n for n in sorted(by_method) if n not in TITLES)]
    return {name: by_method[name] for name in names}


def draws(evaluation: dict[str, Any]) -> str:
    """How many draws a method averages: those that were asked for, and those of the walk where it had fewer."""
    asked = evaluation["draws"]
    had = evaluation["walk"].get("draws", asked)
    return f"{asked} draws" if had == asked else f"{asked} draws ({had} of the walk, one of each)"


def evaluation_table(evaluation: dict[str, Any]) -> Group:
    """The table for a terminal, with the verdict below it."""
    rows = evaluation["rows"]
    caption = (
        f"{rows['test']} test rows, {draws(evaluation)}, radius {evaluation['radius']:.4g}; ± standard error. "
        "Green and bold: better than every other, our own aside, beyond two standard errors; underlined: not told "
        "apart from the best."
    )
    table = Table(title=evaluation["run_id"], caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.caption_justify = table.title_justify = "left"
    table.add_column("method", no_wrap=True)
    shown = {metric: name for metric, name in metric_titles(evaluation).items() if metric not in PAGE_ONLY}
    for metric, name in shown.items():
        table.add_column(f"{name} {ARROWS.get(metric, '↓')}".strip(), justify="right", no_wrap=True)
    styles = {"best": "bold green", "tied": "underline", "": ""}
    for method, scores in ordered(evaluation["methods"]).items():
        cells = [Text(number(scores.get(m)), style=styles[mark(evaluation, m, method)]) for m in shown]
        table.add_row(title(method), *cells)
    return Group(table, Text(verdict(evaluation)), Text(against_best(evaluation)))


def verdict(evaluation: dict[str, Any]) -> str:
    """One sentence: is the walk better than the network that was there before?"""
    difference = evaluation["difference"].get("walk-map", {}).get("nll")
    if not difference or difference["value"] is None:
        return "The walk could not be compared with the MAP estimate."
    size = f"{gap(difference | {'value': abs(difference['value'])}, '')} nats a row"
    values = {name: number(evaluation["methods"][name]["nll"]).split(" ±")[0] for name in ("walk", "map")}
    both = f"test NLL {values['walk']} against {values['map']}"
    if difference["verdict"] == "better":
        return f"The fiber walk predicts better than the MAP estimate: {both}, lower by {size}."
    if difference["verdict"] == "worse":
        return f"The fiber walk predicts worse than the MAP estimate: {both}, higher by {size}."
    return f"The fiber walk and the MAP estimate cannot be told apart: {both}, a difference of {size}."


def against_best(evaluation: dict[str, Any]) -> str:
    """One sentence: how does the walk stand against the best of the other methods, deformation left aside?"""
    scores = {n: m["nll"]["value"] for n, m in evaluation["methods"].items() if n not in (*OURS, "map")}
    known = {name: value for name, value in scores.items() if value is not None}
    if not known:
        return "No other method was asked for."
    best = min(known, key=lambda name: known[name])
    difference = evaluation["difference"][f"walk-{best}"]["nll"]
    if difference["value"] is None:
        return f"It could not be compared with the best control, {title(best)} ({minus(f'{known[best]:.3f}')})."
    words = {
        "better": "is better than",
        "worse": "is worse than",
        "undecided": "cannot be told apart from",
    }[difference["verdict"]]
    return f"It {words} the best control, {title(best)} ({minus(f'{known[best]:.3f}')}; difference {gap(difference)})."
