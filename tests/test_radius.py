"""The rule of the radius, on curves made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.stages.select import HELD_BACK, NEAREST, RISE, VALIDATION, choose_radius, left_of_plateau, paired_scores

CURVE = [(1.0, 0.5, 1.0), (2.0, 0.4, 3.0), (3.0, 0.45, 4.9), (4.0, 0.6, 9.0), (5.0, 0.7, 2.0)]


@pytest.mark.parametrize(
    ("task", "validation", "gamma", "radius", "rule"),
    [
        ("classification", True, 10.0, 2.0, VALIDATION),
        ("classification", False, 10.0, 3.0, RISE),
        ("regression", True, 10.0, 3.0, RISE),
        ("regression", True, 0.1, 1.0, NEAREST),
        ("regression", True, 100.0, 5.0, RISE),
    ],
)
def test_rule_of_the_radius(task, validation, gamma, radius, rule):
    curve = [{"radius": r, "validation_nll": v if validation else None, "nll_rise": n} for r, v, n in CURVE]
    choice = choose_radius(curve, gamma, task)
    assert (choice["radius"], choice["rule"]) == (radius, rule)


@pytest.mark.parametrize(("error", "radius", "rule"), [(0.06, 3.0, RISE), (0.04, 2.0, HELD_BACK)])
def test_a_regression_is_held_back_only_where_validation_rows_see_the_harm(error, radius, rule):
    curve = [{"radius": r, "validation_nll": v, "validation_se": error, "nll_rise": n} for r, v, n in CURVE]
    choice = choose_radius(curve, 10.0, "regression")
    assert (choice["radius"], choice["rule"]) == (radius, rule)


def test_a_row_without_any_chance_leaves_a_radius_without_score_and_the_others_with_theirs():
    rows = np.array([[0.1, 0.3, 0.2], [0.2, 0.1, 0.1], [0.1, np.inf, 0.1]])
    first, best, broken = paired_scores(rows, unit=1.0)
    assert broken == {"validation_nll": None, "validation_se": None}
    assert best == {"validation_nll": pytest.approx(1 + rows[1].mean()), "validation_se": 0.0}
    difference = rows[0] - rows[1]
    assert first["validation_se"] == pytest.approx(difference.std(ddof=1) / np.sqrt(3))
    assert [point["validation_se"] for point in paired_scores(rows[:2, :1])] == [None, None], "a single row"


def test_the_radius_is_the_left_end_of_the_plateau_around_the_best():
    scores = np.array([0.30, 0.2508, 0.2503, 0.2502, 0.25, 0.2505])
    assert left_of_plateau(scores, np.full(6, 1e-4)) == 1, "an excess without practical meaning is none"
    assert left_of_plateau(scores, np.full(6, 0.1)) == 4, "what cannot be told is not taken on trust"
    assert left_of_plateau(np.array([0.2502, 0.28, 0.2502, 0.25]), np.full(4, 1e-4)) == 2, "no leap over worse radii"
    assert left_of_plateau(np.array([np.nan, 0.25, np.nan, 0.25]), np.full(4, 1e-4)) == 1
