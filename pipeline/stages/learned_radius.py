"""Up to which radius a deformation learns: the selected one, or a nearer one where that gives better draws."""

from __future__ import annotations

import math
from typing import Any

from pipeline.fitting.job import FOLDER
from pipeline.plan import WalkPlan
from pipeline.run import Run
from pipeline.stages.draw_radius import walks_at_radius

NEARER = f"{FOLDER}/nearer.json"
NEAR = 0.5
"""Where draws reach a smaller share of the selected radius, the model learns again, up to the geometric mean of both:
what it learned further out was of no use, and its remainder helps only near the radius up to which it learned."""
WORSE = 0.02
"""Where the draws' validation NLL exceeds that of the walks by more, relative to 0.5 + theirs in nats a row, the model
learns again up to half of its radius: the walk is less chaotic there, and the looks lie closer."""
TRIES = 3
"""Different radii, at most."""


def learned_radius(run: Run, digest: str, selected: float) -> float:
    """Radius up to which to learn now from the blocks with this digest."""
    return float(_state(run, digest, selected)["radius"])


def next_radius(run: Run, plan: WalkPlan, digest: str, choice: dict[str, Any], tuned: dict[str, Any]) -> float | None:
    """Judge the model that is fitted, and say up to where to learn next; None when it stays.

    What was tried is written down before the next fit begins, so that a killed one goes on where it was. Where
    validation rows judge, the best of all tries stays: it is brought back if it was not the last.

    Args:
        run: The run.
        plan: Its walks.
        digest: Of the blocks.
        choice: `radius.json`.
        tuned: From `choose_draw_radius`, of the present model.
    """
    selected = float(choice["radius"])
    state = _state(run, digest, selected)
    if state["settled"]:
        return None
    present = {"radius": state["radius"], "draw_radius": tuned["draw_radius"], "validation_nll": _score(tuned)}
    tried = [*state["tried"], present]
    further = _further(tried, choice, float(plan.radii()[0]))
    settled = further is None
    if further is None:
        judged = [t for t in tried if t["validation_nll"] is not None]
        best = min(judged, key=lambda t: t["validation_nll"]) if judged else present
        if best["radius"] == present["radius"]:
            return None
        further = float(best["radius"])
    state = {"trained_on": digest, "selected": selected, "radius": further, "tried": tried, "settled": settled}
    run.storage.replace_json(NEARER, state)
    return further


def _state(run: Run, digest: str, selected: float) -> dict[str, Any]:
    state = {"radius": selected, "tried": [], "settled": False}
    if run.storage.exists(NEARER):
        found = run.storage.read_json(NEARER)
        if found["trained_on"] == digest and found["selected"] == selected:
            return state | found
    return state


def _score(tuned: dict[str, Any]) -> float | None:
    """Validation NLL of draws at the radius that was chosen for them, where it decided."""
    curve = tuned["draw_radius_curve"]
    return next((p.get("validation_nll") for p in curve if p["radius"] == tuned["draw_radius"]), None)


def _further(tried: list[dict[str, Any]], choice: dict[str, Any], shortest: float) -> float | None:
    """Another radius that is worth a try, None if there is none."""
    present, selected = tried[-1], float(choice["radius"])
    if len(tried) == 1 and present["draw_radius"] < NEAR * selected:
        return math.sqrt(selected * present["draw_radius"])
    score, half = present["validation_nll"], present["radius"] / 2
    if score is None or len(tried) == TRIES or half < shortest:
        return None
    if len(tried) > 1 and tried[-2]["validation_nll"] is not None and score >= tried[-2]["validation_nll"]:
        return None
    walks = walks_at_radius(choice).get("validation_nll")
    return half if walks is not None and score > walks + WORSE * (0.5 + abs(walks)) else None
