"""report.html: one page that needs nothing else, made from the stored objects alone."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

from pipeline.config import Config
from pipeline.documents import sealed_text
from pipeline.errors import InputError
from pipeline.run import Run, stored_config
from pipeline.stages import plots, plots_data
from pipeline.stages.figures import read_figures
from pipeline.stages.svg import Figure
from pipeline.stages.table import (
    ARROWS,
    OURS,
    against_best,
    draws,
    gap,
    mark,
    metric_titles,
    number,
    ordered,
    title,
    verdict,
)
from pipeline.storage import Storage

REPORT = "report.html"


def report(run: Run) -> str:
    """Write ``report.html`` if it is missing or older than what it shows; returns its address.

    Raises:
        InputError: The run has no evaluation yet.
    """
    return _write(run.config, run.storage)


def rebuild(run_uri: str) -> str:
    """The same for a stored run, wherever it lies: neither its data nor its code are needed, so that none is run."""
    return _write(stored_config(run_uri, trust_code=True), Storage.open(run_uri))


def _write(config: Config, storage: Storage) -> str:
    if not storage.exists("evaluation.json"):
        raise InputError(
            f"{storage.uri} has no evaluation.json yet. Finish it with 'fiberwalk run', then build the report."
        )
    page = sealed_text(render(collect(config, storage)) + b"\n", "<!-- {} -->")
    if not storage.exists(REPORT) or storage.read(REPORT) != page:
        storage.replace(REPORT, page)
    return f"{storage.uri}/{REPORT}"


def collect(config: Config, storage: Storage) -> dict[str, Any]:
    """Everything the page says, from the stored objects."""
    evaluation, arrays = in_order(storage.read_json("evaluation.json")), read_figures(storage)
    about = storage.read_json("run.json") if storage.exists("run.json") else {}
    plan = storage.read_json("plan.json") if storage.exists("plan.json") else {}
    starts = [storage.read_json(e.path) for e in storage.list("map", suffix="map.json")]
    data = about.get("data", {})
    classes = data.get("classes") or [str(k) for k in range(1000)]
    features = [column["name"] for column in data.get("features", [])]
    blocks = storage.list("walks", suffix=".parquet")
    return {
        "evaluation": evaluation,
        "config": config.to_yaml(),
        "uri": storage.uri,
        "about": about,
        "figures": figures_of(evaluation, arrays),
        "uncertain": plots_data.gallery(arrays, classes, features, "uncertain"),
        "wrong": plots_data.gallery(arrays, classes, features, "wrong"),
        "facts": cost(evaluation, plan, sum(entry.size for entry in blocks), len(blocks)),
        "settings": settings(plan, starts, evaluation),
    }


def in_order(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The evaluation with methods in the order of the table; JSON keeps them by name."""
    pairs = evaluation["difference"]
    order = [f"{a}-{b}" for a in OURS for b in ordered(evaluation["methods"])]
    return {
        **evaluation,
        "methods": ordered(evaluation["methods"]),
        "difference": {pair: pairs[pair] for pair in order if pair in pairs},
        "ood": {name: ordered(by) for name, by in evaluation["ood"].items()},
    }


def figures_of(evaluation: dict[str, Any], arrays: plots.Arrays) -> list[Figure]:
    """All figures that this run can have, in reading order."""
    made = [
        plots.score_figure(evaluation),
        plots.reliability_figure(evaluation, arrays),
        plots_data.band_figure(evaluation, arrays),
        plots_data.map_figure(evaluation, arrays),
        plots_data.coverage_figure(evaluation, arrays),
        plots.selective_figure(evaluation, arrays),
        plots.uncertainty_figure(evaluation, arrays),
        plots.radius_figure(evaluation),
        plots.walks_figure(evaluation, arrays),
        plots_data.plane_figure(evaluation, arrays),
        plots_data.learning_figure(evaluation.get("deformation", {})),
    ]
    return [figure for figure in made if figure is not None]


def cost(evaluation: dict[str, Any], plan: dict[str, Any], size: int, blocks: int) -> list[tuple[str, str]]:
    """What the run took, in numbers that do not depend on the machine."""
    walk = evaluation["walk"]
    facts = [
        ("walks", f"{walk['walks']:,} from {walk['starts']} start{'s' if walk['starts'] > 1 else ''}"),
        ("diverged, left out", f"{walk['diverged']}"),
        ("slowed down at least once", f"{walk['halved']}"),
        ("parameters walked", f"{walk['dim']:,}"),
        ("gradient evaluations", f"{walk['gradient_evaluations']:,}"),
        ("stored", f"{_bytes(size)} in {blocks:,} blocks"),
    ]
    if plan:
        pilot = plan.get("chosen", {}).get("pilot")
        if pilot:
            facts.insert(5, ("gradient evaluations of the pilot", f"{pilot['gradient_evaluations']:,}"))
        facts.insert(
            4, ("steps of a walk", f"{plan['steps']:,}, correction {plan['correction']}, length {plan['length']:.4g}")
        )
    deformation = evaluation.get("deformation", {})
    for key, words in (("heldout_error", "deformation, held-out error"), ("potential_rise", "deformation, rise of U")):
        if isinstance(deformation.get(key), int | float):
            facts.append((words, f"{deformation[key]:.4g}"))
    if deformation.get("gaussian_share") and deformation["kind"] != "gaussian":
        facts.append(("draws of a Gaussian of the walks' points", f"{deformation['gaussian_share']:.0%}"))
        if deformation["potential_rise_learned"] is not None:
            facts.append(("rise of U of the other, learned draws", f"{deformation['potential_rise_learned']:.4g}"))
    return facts


def settings(plan: dict[str, Any], starts: list[dict[str, Any]], evaluation: dict[str, Any]) -> list[tuple[str, str]]:
    """What was chosen automatically, and by which rule."""
    found = [("radius", f"{evaluation['radius']:.4g} ({evaluation['rule']})")]
    chosen = plan.get("chosen", {})
    if "pilot" in chosen:
        pilot = chosen["pilot"]
        found.append(
            ("walk, by its pilot", f"{pilot['correction']}, length {pilot['length']:.4g}, {pilot['steps']} steps")
        )
        found.append(("rule of the pilot", f"{pilot['rule']}; best radius {pilot['best_radius']:.4g}"))
    for info in starts[:1]:
        found.append(("prior precision", f"{_short(info['prior_precision'])} ({info['prior_how']})"))
        if info.get("noise_std"):
            found.append(("noise standard deviation", f"{info['noise_std']:.4g} (standardised target)"))
        found.append(("effective parameters γ", f"{info['gamma']:.1f} of {info['dim']:,}"))
        found.append(("largest curvature", f"{info['lambda_max']:.4g}"))
    for method, choices in ordered(evaluation["choices"]).items():
        for what, value in choices.items():
            words = "" if what == "temperature" else f": {what.replace('_', ' ')}"  # which the method's title says
            found.append((title(method) + words, _short(value)))
    return found


def render(page: dict[str, Any]) -> bytes:
    """The page as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pipeline.stages", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    evaluation = page["evaluation"]
    helpers = {"title": title, "number": number, "gap": gap, "mark": functools.partial(mark, evaluation)}
    words = {"verdict": verdict(evaluation), "against": against_best(evaluation), "draws": draws(evaluation)}
    columns = [(m, name, ARROWS.get(m, "↓")) for m, name in metric_titles(evaluation).items()]
    digest = hashlib.sha256(repr(sorted(evaluation["methods"].items())).encode()).hexdigest()[:12]
    template = environment.get_template("report.html.j2")
    ours = [name for name in OURS if name in evaluation["methods"]]
    return template.render(**page, **helpers, **words, columns=columns, ours=ours, digest=digest).encode()


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return f"{len(value)} values" if len(value) > 6 else ", ".join(_short(v) for v in value)
    if isinstance(value, dict):
        parts = [f"{k} {_short(v)}" for k, v in value.items() if not isinstance(v, list | dict)]
        return ", ".join(parts)
    return str(value)


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
