"""The pilot widens the guard only where it held walks back and validation rows clearly want more."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.stages import pilot
from tests.blocks import make_plan

PLAN = dataclasses.replace(make_plan(), length=10.0, steps=100, guard_limit=1.0)


def trial(plan: Any, score: float, end: float) -> Any:
    """A trial of all steps whose drift came to `end`."""
    curve = [{"radius": end / 2, "validation_nll": score}, {"radius": end, "validation_nll": score + 0.01}]
    return pilot._Trial(plan, end / 2, score, False, curve, plan.steps)


@pytest.mark.parametrize(
    ("end", "score", "tried", "limit"),
    [(6.0, 0.40, True, 2.0), (6.0, 0.495, True, 1.0), (10.0, 0.40, False, 1.0)],
    ids=["held back, clearly better", "held back, hardly better", "never held back"],
)
def test_a_wider_guard_needs_walks_held_back_and_a_clearly_better_score(
    end: float, score: float, tried: bool, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def double(run: Any, plan: Any, problem: Any, length: float) -> Iterator[Any]:
        asked.append((plan.guard_limit, length))
        yield trial(plan, score, 9.0)

    monkeypatch.setattr(pilot, "_double", double)
    trials = [trial(PLAN, 0.5, end)]
    nobody: Any = None
    best = pilot._with_wider_guard(nobody, trials[0], trials, nobody)
    assert best.plan.guard_limit == limit
    assert asked == ([(2.0, 10.0)] if tried else [])
    assert len(trials) == (2 if tried else 1), "what was tried counts as spent"


def test_another_correction_that_was_held_back_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pilot, "_double", lambda *_: pytest.fail("tried"))
    other = trial(dataclasses.replace(PLAN, correction="plain"), 0.6, 3.0)
    best = trial(dataclasses.replace(PLAN, correction="momentum"), 0.5, 10.0)
    nobody: Any = None
    assert pilot._with_wider_guard(nobody, best, [other, best], nobody) is best


@pytest.mark.parametrize(("end", "radius", "past"), [(0.0, 0.0, True), (4.0, 4.0, True), (10.0, 10.0, False)])
def test_where_the_rise_decides_what_was_walked_counts(
    end: float, radius: float, past: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Walks that the guard lets not move never pass the limit of the rise, and are no reason for a longer walk."""
    monkeypatch.setattr(pilot, "uses_validation", lambda run: False)
    records = range(1, pilot.RECORDS + 1)
    curve = [{"radius": end * k / pilot.RECORDS, "nll_rise": 0.0, "validation_nll": None} for k in records]
    monkeypatch.setattr(pilot, "_curve", lambda *_: curve)
    nobody: Any = None
    found = pilot._try(nobody, PLAN, SimpleNamespace(info={"gamma": 4.0}))  # type: ignore[arg-type]
    assert (found.radius, found.score, found.past) == (radius, -radius, past)
