"""Tilted walks on a softmax network, where no law is exact: their endpoints rise as posterior draws do."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.config import parse_config
from pipeline.run import Run
from pipeline.stages import pilot
from pipeline.store import SampleStore
from tests.blocks import make_plan
from tests.runs import walked

WALKS = 256


def tilted_run(folder: str, correction: str) -> Run:
    """Iris, 16 hidden units: D = 131."""
    values = {
        "name": "tilted",
        "storage": folder,
        "data": {"source": "sklearn:iris", "validation": 0.15, "test": 0.3},
        "model": {"hidden": [16]},
        "walk": {"tilt": "posterior", "correction": correction, "walks": WALKS, "record_every": 200},
        "deformation": {"kind": "none"},
    }
    return walked(parse_config(values))


def mean_rise(run: Run) -> float:
    """Of U over that of the MAP estimate at the ends of all walks, relative to D / 2."""
    store = SampleStore.open(run.storage)
    star = run.storage.read_json("map/start=0/map.json")["potential"]
    ends = np.concatenate([points.potential for points in store.points(store.plan.length, start=0)])
    assert len(ends) == WALKS
    return float(ends.mean() - star) / (store.plan.dim / 2)


def test_tilted_walks_with_nothing_set_rise_as_a_long_langevin_chain_does(tmp_path):
    """A chain has D / 2 on such networks, to 1 % (README). The rise of a draw varies by sqrt(D / 2): the mean of 256 by
    0.8 %. Of the 8 % allowed, 5 are for the curvature and 3 are 3.9 standard errors: a false alarm once in 20,000."""
    assert abs(mean_rise(tilted_run(str(tmp_path / "auto"), "auto")) - 1) < 0.08
    assert mean_rise(tilted_run(str(tmp_path / "momentum"), "momentum")) > 1.08, "a correction that is not calibrated"


@pytest.mark.parametrize(
    ("rises", "chosen"),
    [
        ((66, 70, 90, 64), "plain"),
        ((140, 64, 68, 90), "momentum"),
        ((math.inf, math.nan, 300, 400), "deflated"),
    ],
)
def test_the_correction_is_chosen_whose_rise_is_nearest_to_half_the_dimension(
    rises: tuple[float, ...], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_name = dict(zip(("plain", "momentum", "deflated", "deflated-momentum"), rises, strict=True))
    monkeypatch.setattr(pilot, "_endpoint_rise", lambda run, plan, problem: by_name[plan.correction])
    plan = dataclasses.replace(make_plan(), tilt="posterior", dim=131)
    run: Any = SimpleNamespace(config=parse_config({"name": "t", "data": {"source": "sklearn:iris"}}))
    problem: Any = SimpleNamespace(curvature=SimpleNamespace(values=[3.0, 2.0]))
    choice = pilot._choose_tilted(run, plan, problem)
    assert choice.correction == chosen
    assert len(choice.curve) == 4
    assert all(point["potential_rise"] is None or math.isfinite(point["potential_rise"]) for point in choice.curve)
