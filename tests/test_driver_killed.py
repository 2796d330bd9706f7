"""A driver that dies while Ray Train fits deformations: the next one goes on, and the results are the same bytes."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from pathlib import Path

import pytest
import yaml

from pipeline.config import parse_config
from pipeline.storage import Storage
from tests.drivers import Driver, Drivers
from tests.small_run import TRAINED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SETTINGS = {
    **TRAINED,
    "name": "killed",
    "map": TRAINED["map"] | {"starts": 2},
    "walk": TRAINED["walk"] | {"walks": 80},
    "deformation": TRAINED["deformation"] | {"steps": 400},
    "evaluation": {"draws": 16, "baselines": ["map"]},
    "cluster": {"actors": 1, "max_restarts": 0},
}
KILLS = (0, 0, 1, 1)
"""Starts in whose fit the driver dies, one time after the other."""


def checkpoints(storage: Storage) -> set[str]:
    return {entry.path for entry in storage.list("deformation") if entry.path.endswith("facts.json")}


def wait_for_checkpoint(driver: Driver, storage: Storage, known: set[str], start: int) -> tuple[int, int]:
    """Return how far fits are once there is a new checkpoint of a start: it, and marks and steps that are done."""
    limit = time.monotonic() + 240
    while driver.status is None and time.monotonic() < limit:
        with contextlib.suppress(ValueError, FileNotFoundError):  # it may be half-written, or replaced by another
            for path in sorted(checkpoints(storage) - known):
                facts = json.loads(storage.read(path))
                if facts["start"] == start:
                    return start, len(facts["squares"]) + facts["step"]
        time.sleep(0.05)
    raise AssertionError(f"no new checkpoint before the end: {driver.output()[-2000:]}")


def result(storage: Storage) -> dict[str, bytes]:
    """Bytes of all that is not about times and machines."""
    kept = (".safetensors", ".parquet", "evaluation.json", "radius.json", "plan.json")
    return {entry.path: storage.read(entry.path) for entry in storage.list() if entry.path.endswith(kept)}


def test_a_driver_killed_in_ray_train_changes_nothing(root: str, tmp_path: Path) -> None:
    results = {}
    with Drivers(tmp_path) as drivers:
        for name, kills in (("calm", ()), ("disturbed", KILLS)):
            settings = {**SETTINGS, "storage": f"{root}/{name}"}
            path = tmp_path / f"{name}.yaml"
            path.write_text(yaml.safe_dump(settings), encoding="utf-8")
            storage = Storage.open(f"{root}/{name}/{parse_config(settings).run_id}")
            known: set[str] = set()
            done = [(0, 0)]
            for start in kills:
                driver = drivers.start(["run", str(path)])
                done.append(wait_for_checkpoint(driver, storage, known, start))
                driver.send(signal.SIGKILL)
                assert driver.wait() == -signal.SIGKILL
                time.sleep(3)  # its cluster ends by itself
                assert not storage.exists("deformation/deformation.json")
                known |= checkpoints(storage)
            driver = drivers.run(["run", str(path)], 300)
            assert driver.status == 0, driver.output()[-2000:]
            # Ray Train writes down a checkpoint a moment after it lies there: a kill between repeats the first mark.
            assert done == sorted(done) and len(set(done)) >= len(done) - 1, f"a fit began from scratch: {done}"
            results[name] = result(storage)
    assert results["calm"].keys() == results["disturbed"].keys()
    assert {n for n, data in results["calm"].items() if data != results["disturbed"][n]} == set()
