"""Throughput as Ray metrics, which Ray offers to Prometheus on every node (port ``--metrics-export-port``).

Names there begin with ``ray_``: fiberwalk_blocks_total, fiberwalk_steps_total, fiberwalk_points_total,
fiberwalk_diverged and fiberwalk_steps_per_second, each with the label ``run``.
"""

from __future__ import annotations

from typing import Any

from ray.util.metrics import Counter, Gauge

from pipeline.shard import BlockReport

_LABELS = ("run",)


class WalkMetrics:
    """Counts what one walker commits. Made inside the actor."""

    def __init__(self, run_id: str):
        self._tags = {"run": run_id}
        self._blocks = Counter("fiberwalk_blocks_total", "Committed blocks.", _LABELS)
        self._steps = Counter("fiberwalk_steps_total", "Steps of single walks.", _LABELS)
        self._points = Counter("fiberwalk_points_total", "Recorded points.", _LABELS)
        self._diverged = Gauge("fiberwalk_diverged", "Diverged walks in the block committed last.", _LABELS)
        self._rate = Gauge("fiberwalk_steps_per_second", "Steps of single walks a second in the last block.", _LABELS)

    def observe(self, event: Any) -> None:
        """Count a committed block; other events pass."""
        if not isinstance(event, BlockReport):
            return
        steps = event.walks * event.steps
        self._blocks.inc(1, self._tags)
        if steps:
            self._steps.inc(steps, self._tags)
            self._points.inc(event.rows, self._tags)
        self._diverged.set(event.diverged, self._tags)
        self._rate.set(steps / max(event.seconds, 1e-9), self._tags)
