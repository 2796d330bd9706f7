"""What a fit reads of the store: of each walk the records nearest to the marks, and nothing that is not needed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import parse_config
from pipeline.errors import RunError
from pipeline.fitting import stored
from pipeline.fitting.stored import COLUMNS, keys_of, marks_of, read_marks, stored_rows
from pipeline.plan import BlockKey
from pipeline.stages import sample
from pipeline.store import SampleStore
from tests.runs import damage, walked
from tests.small_run import TRAINED


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SampleStore:
    """Walks of which a guard has held some back, in blocks of less than a path."""
    walk = TRAINED["walk"] | {"length": 60.0, "record_every": 2}
    settings = TRAINED | {"walk": walk, "storage": str(tmp_path_factory.mktemp("walks"))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "records_per_block", lambda *_: 3)
        return SampleStore.open(walked(parse_config(settings)).storage)


def joined(parts: Any) -> dict[str, np.ndarray]:
    parts = list(parts)
    return {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}


def test_the_nearest_record_of_each_walk_to_each_mark_is_read(
    store: SampleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, marks = keys_of(store, 0, 0, 1), marks_of(store.plan, 18.0)[0]
    whole = joined(stored_rows(store, keys, None))
    assert not {*whole["radius"].tolist()} <= {*store.plan.radii().tolist()}, "no walk was held back"
    wanted = set()
    for walk in np.unique(whole["walk"]):
        rows = np.flatnonzero(whole["walk"] == walk)
        wanted |= {rows[np.abs(whole["radius"][rows].astype(np.float64) - mark).argmin()] for mark in marks}
    expected = sorted(wanted)
    assert 0 < len(expected) < len(whole["walk"])
    monkeypatch.setattr(stored, "batch_rows", lambda dim: 7)
    batches = list(stored_rows(store, keys, marks))
    assert [len(batch["walk"]) for batch in batches[:-1]] == [7] * (len(batches) - 1)
    assert 0 < len(batches[-1]["walk"]) <= 7
    found = joined(batches)
    for name in COLUMNS:
        assert np.array_equal(found[name], whole[name][expected]), name


def test_the_metric_kind_reads_whole_paths(store: SampleStore) -> None:
    assert read_marks("metric", store.plan, 18.0) is None
    assert read_marks("residual", store.plan, 18.0) == marks_of(store.plan, 18.0)[0]


def test_a_broken_block_is_named_with_the_way_out(store: SampleStore, tmp_path: Path) -> None:
    shutil.copytree(store.storage.uri, tmp_path / "run")
    copy = SampleStore.open(str(tmp_path / "run"))
    damage(copy.storage.uri, BlockKey(1, 0))
    with pytest.raises(RunError, match=r"shard=00001/block=00000.*fiberwalk verify"):
        list(stored_rows(copy, keys_of(copy, 0, 0, 1), None))
