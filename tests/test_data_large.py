"""Tables that are large for the machine: only the rows of the run are held, and what cannot fit is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from pipeline.data import tables
from tests.sources import csv, load, refused, table

CHILD = """
import json, resource, sys
from pipeline.config import parse_config
from pipeline.data import load_dataset
settings = json.loads(sys.argv[1])
config = parse_config({"name": "t", "data": settings}).data
def peak_kib():  # of this program; the maximum that getrusage gives is at least that of the parent
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
if len(sys.argv) > 3:  # a quarter of the file first: what is left is what grows with it
    load_dataset(parse_config({"name": "t", "data": json.loads(sys.argv[3])}).data, 0)
before = peak_kib()
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
data = load_dataset(config, 0)
peak = peak_kib() - before
print(json.dumps({"digest": data.digest, "peak": peak << 10, "index": data.test.index.tolist()}))
"""


ROWS, COLUMNS = 400_000, 40


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """122 MiB of numbers."""
    folder = tmp_path_factory.mktemp("large")
    path, quarter = folder / "large.parquet", folder / "quarter.parquet"
    rng = np.random.default_rng(0)
    names = [f"c{k}" for k in range(COLUMNS)]
    schema = pa.schema([*((name, pa.float64()) for name in names), ("y", pa.int64())])
    with parquet.ParquetWriter(path, schema) as writer:
        for _ in range(4):
            arrays = list(rng.normal(size=(COLUMNS, ROWS // 4)))
            part = pa.table([*arrays, rng.integers(0, 2, ROWS // 4)], schema=schema)
            writer.write_table(part)
    parquet.write_table(part, quarter)
    return path


class TestLargeParquet:
    """Of a Parquet file only the rows of the run are held, and what would not fit is refused with the arithmetic."""

    USED = {"train_rows": 500, "validation": [100, 200], "test": [399_900, 400_000]}

    def test_only_the_rows_of_the_run_are_held(self, large: Path) -> None:
        settings = {"source": f"parquet:{large}", "target": "y", **self.USED}
        quarter = settings | {"source": f"parquet:{large.parent}/quarter.parquet", "test": [99_900, 100_000]}
        command = [sys.executable, "-c", CHILD, json.dumps(settings), str(8 << 30), json.dumps(quarter)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        answer = json.loads(done.stdout)
        assert answer["peak"] < 40 << 20 and answer["index"] == list(range(399_900, 400_000))
        whole = pd.read_parquet(large)
        data = load(source=f"parquet:{large}", target="y", standardize=False, **self.USED)
        np.testing.assert_array_equal(np.asarray(data.test.x), whole.drop(columns="y").to_numpy()[399_900:])
        np.testing.assert_array_equal(data.train.index[:200], [*range(100), *range(200, 300)])
        np.testing.assert_array_equal(data.train.y, whole["y"].to_numpy()[data.train.index])
        assert data.digest == answer["digest"]

    def test_what_does_not_fit_is_refused_before_it_is_read(self, large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tables, "machine_memory", lambda: 200 << 20)
        told = refused(source=f"parquet:{large}", target="y")
        for words in ("400,000 of 400,000 rows x 41 columns x 8 bytes = 125.1 MiB", "x 4 copies", "= 500.5 MiB",
                      "has 200.0 MiB", "data.train_rows"):  # fmt: skip
            assert words in told
        load(source=f"parquet:{large}", target="y", **self.USED)

    def test_a_text_file_that_does_not_fit_is_refused_by_its_size(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tables, "machine_memory", lambda: 100)
        assert "bytes in the file" in refused(source=csv(tmp_path / "t.csv", table().to_csv(index=False)), target="y")
