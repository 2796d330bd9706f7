"""Sources, splits and scaling: what a user's file becomes, and what is said when it cannot be used."""

from __future__ import annotations

import gzip
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from pipeline.config import parse_config
from pipeline.data import DataSchema, Dataset, load_dataset, load_inputs, tables
from pipeline.data.arrays import map_arrays
from pipeline.errors import InputError


def load(seed: int = 0, **data: Any) -> Dataset:
    return load_dataset(parse_config({"name": "t", "data": data}).data, seed)


def refused(**data: Any) -> str:
    with pytest.raises(InputError) as error:
        load(**data)
    assert "\n" not in str(error.value)
    return str(error.value)


def csv(path: Path, text: str) -> str:
    path.write_text(text)
    return f"csv:{path}"


def table(rows: int = 30, seed: int = 1) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"a": rng.normal(3, 2, rows).round(4), "b": rng.integers(0, 9, rows), "kind": "x", "y": "no"})
    frame["kind"] = np.array(["red", "blue", "green"])[np.arange(rows) % 3]
    frame["y"] = np.where(np.arange(rows) % 2, "yes", "no")
    return frame


class TestCsv:
    @pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", " ", ", "])
    def test_the_delimiter_is_found(self, delimiter: str, tmp_path: Path) -> None:
        lines = table().to_csv(index=False).splitlines()
        text = "\n".join(delimiter.join(line.split(",")) for line in lines) + "\n"
        data = load(source=csv(tmp_path / "t.csv", text), target="y")
        assert data.schema.input_shape == (5,)
        assert data.schema.classes == ("no", "yes")
        assert data.digest == load(source=csv(tmp_path / "u.csv", "\n".join(lines)), target="y").digest

    @pytest.mark.parametrize("target", [-1, 2, "2"])
    def test_a_file_without_header_is_read_by_position(self, target: int | str, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        rows = rng.normal(size=(40, 3))
        text = "\n".join(" \t".join(f"{value:.6f}" for value in row) + " " for row in rows)
        data = load(source=csv(tmp_path / "t.txt", text), target=target, task="regression", standardize=False)
        np.testing.assert_allclose(np.asarray(data.train.x), rows[data.train.index, :2], atol=1e-6)
        np.testing.assert_allclose(data.train.y, rows[data.train.index, 2], atol=1e-6)

    def test_numbers_as_column_names_are_a_header(self, tmp_path: Path) -> None:
        frame = table()[["a", "b", "y"]].set_axis(["1", "2", "class"], axis=1)
        assert load(source=csv(tmp_path / "t.csv", frame.to_csv(index=False)), target="class").schema.input_shape == (
            2,
        )
        frame = frame.set_axis(["0", "1", "2"], axis=1)
        data = load(source=csv(tmp_path / "u.csv", frame.to_csv(index=False)), target=-1)
        assert len(data.train) + len(data.validation) + len(data.test) == 30

    def test_decimal_commas(self, tmp_path: Path) -> None:
        text = "a;y\n" + "".join(f"{k},5;{k % 2}\n" for k in range(20))
        data = load(source=csv(tmp_path / "t.csv", text), target="y", standardize=False)
        np.testing.assert_array_equal(np.asarray(data.train.x)[:, 0], data.train.index + 0.5)

    def test_quotes_blank_lines_and_byte_order_mark(self, tmp_path: Path) -> None:
        body = "".join(f'"{"x, y" if k % 2 else "z"}",{k}.5,{k % 2}\n' for k in range(20))
        (tmp_path / "t.csv").write_bytes("\ufeff\nname,a,y\n\n".encode() + body.encode() + b"\n\n")
        data = load(source=f"csv:{tmp_path / 't.csv'}", target="y")
        assert [column.levels for column in data.schema.features] == [("x, y", "z"), ()]

    def test_text_is_one_hot_with_sorted_levels(self, tmp_path: Path) -> None:
        data = load(source=csv(tmp_path / "t.csv", table().to_csv(index=False)), target="y", standardize=False)
        assert data.schema.features[2].levels == ("blue", "green", "red")
        one_hot = np.asarray(data.train.x)[:, 2:]
        expected = np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]])[data.train.index % 3]
        np.testing.assert_array_equal(one_hot, expected)

    def test_gzip_is_unpacked(self, tmp_path: Path) -> None:
        with gzip.open(tmp_path / "t.csv.gz", "wt") as file:
            file.write(table().to_csv(index=False))
        assert len(load(source=f"csv:{tmp_path}/t.csv.gz", target="y").train) == 22

    @pytest.mark.parametrize("hole", ["", "NA", "nan", "?"])
    def test_missing_values_are_counted(self, hole: str, tmp_path: Path) -> None:
        frame = table().astype(object)
        frame.loc[[4, 7], "b"] = hole
        frame.loc[5, "a"] = hole
        message = refused(source=csv(tmp_path / "t.csv", frame.to_csv(index=False)), target="y")
        for word in ["3 missing values in 2 of 3 columns", "first in row 4", "column 'b'"]:
            assert word in message

    def test_a_question_mark_among_words_is_a_level(self, tmp_path: Path) -> None:
        frame = table()
        frame.loc[4, "kind"] = "?"
        data = load(source=csv(tmp_path / "t.csv", frame.to_csv(index=False)), target="y")
        assert data.schema.features[2].levels[0] == "?"

    def test_missing_targets_are_counted(self, tmp_path: Path) -> None:
        frame = table()
        frame.loc[[3, 4], "y"] = ""
        message = refused(source=csv(tmp_path / "t.csv", frame.to_csv(index=False)), target="y")
        assert "2 missing values in column 'y', the first in row 3" in message

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda f: f.assign(a=[*f.a[:-1], "abc"]), ["column 'a'", "text 'abc'", "row 29"]),
            (lambda f: f.assign(id=[f"row {k}" for k in range(30)]), ["column 'id'", "30 different values"]),
            (lambda f: f.assign(day=pd.date_range("2020-01-01", periods=30)), ["column 'day'", "dates"]),
            (lambda f: f.assign(none=np.nan), ["30 missing values", "column 'none'"]),
            (lambda f: f.assign(y="same"), ["one class only", "'same'"]),
            (lambda f: f.assign(y=f.a), ["no class", "data.task: regression"]),
            (lambda f: f.assign(y=range(30)), ["30 different values", "data.task: regression"]),
            (lambda f: f[["y"]], ["no column is left", "delimiter"]),
            (lambda f: f.assign(a=[*f.a[:-1], np.inf]), ["1 infinite", "column 'a'", "row 29"]),
            (lambda f: f[:2], ["data.test", "2 rows"]),
            (lambda f: f[:0], ["no rows"]),
        ],
    )
    def test_unfit_tables_are_refused(self, change: Any, words: list[str], tmp_path: Path) -> None:
        message = refused(source=csv(tmp_path / "t.csv", change(table()).to_csv(index=False)), target="y")
        for word in words:
            assert word in message

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("a,b,y\n1,2,0\n1,2\n3,4,1\n", ["no table", "Expected 3 columns, got 2"]),
            ("a,a,y\n1,2,0\n3,4,1\n", ["column 'a' is there 2 times"]),
            (",a,y\n0,2,0\n1,4,1\n", ["column 0 has no name"]),
            ("", ["holds no rows"]),
            ("a,b,z\n1,2,0\n3,4,1\n", ["no column 'y'", "a, b, z"]),
            ("a,b,Y\n1,2,0\n3,4,1\n", ["did you mean 'Y'"]),
        ],
    )
    def test_files_that_are_no_table_are_refused(self, text: str, words: list[str], tmp_path: Path) -> None:
        message = refused(source=csv(tmp_path / "t.csv", text), target="y")
        for word in words:
            assert word in message

    def test_places_that_cannot_be_read(self, tmp_path: Path) -> None:
        assert "no such file" in refused(source=f"csv:{tmp_path}/absent.csv", target="y")
        assert "folder" in refused(source=f"csv:{tmp_path}", target="y")
        (tmp_path / "latin.csv").write_bytes("grün,y\n1,0\n".encode("latin-1"))
        assert "UTF-8" in refused(source=f"csv:{tmp_path}/latin.csv", target="y")
        assert "cannot be read" in refused(source="csv:nosuch://bucket/x.csv", target="y")

    def test_text_target_of_a_regression(self, tmp_path: Path) -> None:
        message = refused(source=csv(tmp_path / "t.csv", table().to_csv(index=False)), target="y", task="regression")
        assert "the target is text (such as 'no')" in message and "data.task: classification" in message


class TestOtherSources:
    def test_parquet_equals_csv(self, tmp_path: Path) -> None:
        frame = table()
        frame.assign(kind=frame.kind.astype("category")).to_parquet(tmp_path / "t.parquet")
        first = load(source=f"parquet:{tmp_path}/t.parquet", target="y")
        second = load(source=csv(tmp_path / "t.csv", frame.to_csv(index=False)), target="y")
        assert first.digest == second.digest
        np.testing.assert_array_equal(first.train.x, second.train.x)

    def test_parquet_that_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "t.parquet").write_text("no")
        assert "no Parquet file" in refused(source=f"parquet:{tmp_path}/t.parquet", target="y")
        pd.DataFrame({"a": [[1, 2], [3, 4]] * 10, "y": [0, 1] * 10}).to_parquet(tmp_path / "u.parquet")
        assert "column 'a' has the type list" in refused(source=f"parquet:{tmp_path}/u.parquet", target="y")

    def test_npz(self, tmp_path: Path) -> None:
        x, y = np.random.default_rng(0).normal(size=(50, 2, 6, 6)).astype(np.float32), np.arange(50) % 2
        np.savez(tmp_path / "t.npz", x=x, y=y)
        data = load(source=f"npz:{tmp_path}/t.npz")
        assert data.schema.input_shape == (2, 6, 6)
        channel = np.asarray(data.train.x)
        np.testing.assert_allclose(channel.mean(axis=(0, 2, 3)), 0, atol=1e-6)
        np.testing.assert_allclose(channel.std(axis=(0, 2, 3)), 1, atol=1e-6)

    def test_npz_of_named_inputs_keeps_token_numbers(self, tmp_path: Path) -> None:
        ids, length = np.arange(40).reshape(20, 2) % 7, np.linspace(-1, 5, 20)[:, None]
        np.savez(tmp_path / "t.npz", **{"x.ids": ids, "x.length": length, "y": np.arange(20) % 2})
        data = load(source=f"npz:{tmp_path}/t.npz", validation=0.2, test=0.2)
        assert data.schema.input_shape == {"ids": (2,), "length": (1,)}
        x: Any = data.train.x
        assert np.array_equal(x["ids"], ids[data.train.index]) and abs(x["length"].mean()) < 1e-6
        np.savez(tmp_path / "both.npz", **{"x.ids": ids, "x": ids, "y": np.arange(20)})
        assert "one array x (rows, ...), or named inputs x.NAME" in refused(source=f"npz:{tmp_path}/both.npz")

    def test_frames_of_pandas_and_polars_are_tables(self, tmp_path: Path) -> None:
        frame = table()
        schema = load(source=csv(tmp_path / "t.csv", frame.to_csv(index=False)), target="y").schema
        expected: Any = schema.encode(pa.Table.from_pandas(frame.drop(columns="y")))
        part = frame[frame.a > frame.a.median()]  # its index has gaps
        encoded: Any = schema.encode(frame)
        assert np.array_equal(encoded, expected)
        encoded = schema.encode(part)
        assert np.array_equal(encoded, expected[part.index])
        polars = pytest.importorskip("polars")
        encoded = schema.encode(polars.from_pandas(frame))
        assert np.array_equal(encoded, expected)
        with pytest.raises(InputError, match="the column 'a' is missing"):
            schema.encode(frame.rename(columns={"a": "A"}))

    def test_npz_never_unpickles(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "t.npz", x=np.array([{}, {}], dtype=object), y=np.arange(2))
        assert "no npz file of plain arrays" in refused(source=f"npz:{tmp_path}/t.npz")
        np.savez(tmp_path / "u.npz", inputs=np.zeros(3))
        assert "must hold one array x" in refused(source=f"npz:{tmp_path}/u.npz")
        np.savez(tmp_path / "v.npz", x=np.zeros((5, 2)), y=np.zeros(4))
        assert "5 rows of inputs and targets of shape (4,)" in refused(source=f"npz:{tmp_path}/v.npz")
        x = np.zeros((50, 2))
        x[7, 1] = np.nan
        np.savez(tmp_path / "w.npz", x=x, y=np.arange(50) % 2)
        assert "1 missing values, the first in row 7, column 1" in refused(source=f"npz:{tmp_path}/w.npz")

    def test_idx_joins_training_and_test_part(self, tmp_path: Path) -> None:
        images = np.random.default_rng(0).integers(0, 256, (30, 4, 4), dtype=np.uint8)
        labels = (np.arange(30) % 3).astype(np.uint8)
        for name, part in [("train", slice(0, 20)), ("t10k", slice(20, 30))]:
            _write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", images[part])
            _write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", labels[part])
        data = load(
            source=f"idx:{tmp_path}", validation=[15, 20], test=[20, 30], standardize=False, ood=[f"idx:{tmp_path}/"]
        )
        assert data.schema.input_shape == (1, 4, 4)
        np.testing.assert_allclose(np.asarray(data.test.x)[:, 0], images[20:].astype(np.float32) / 255, rtol=1e-6)
        np.testing.assert_array_equal(data.test.y, labels[20:])
        assert np.asarray(data.train.x).dtype == np.float32
        (outside,) = data.ood.values()
        np.testing.assert_array_equal(outside, data.test.x)  # the held-out part only

    def test_idx_that_is_cut_short(self, tmp_path: Path) -> None:
        _write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", np.zeros((3, 2, 2), dtype=np.uint8), cut=1)
        _write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.zeros(3, dtype=np.uint8))
        assert "cut short" in refused(source=f"idx:{tmp_path}/")
        assert "no " in refused(source=f"idx:{tmp_path}/emnist-")

    @pytest.mark.parametrize("name", ["digits", "breast_cancer", "iris", "wine"])
    def test_sklearn(self, name: str) -> None:
        data = load(source=f"sklearn:{name}")
        assert set(np.unique(data.train.y)) == set(range(len(data.schema.classes)))
        assert "not known" in refused(source=f"sklearn:{name}x")

    def test_a_mask_beside_token_numbers_stays_a_mask(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Scaled to numbers, `~mask` and masked attention would silently mean something else."""
        (tmp_path / "own_masked.py").write_text(
            "import numpy as np\n\n\ndef get():\n    ids = np.arange(60).reshape(20, 3)\n"
            "    return {'ids': ids, 'mask': ids % 5 > 0}, np.arange(20) % 2\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        data = load(source="python:own_masked:get")
        assert isinstance(data.train.x, dict) and data.train.x["mask"].dtype == bool
        assert isinstance(data.schema.parts, dict) and data.schema.parts["mask"].dtype == "bool"
        np.testing.assert_array_equal(data.train.x["mask"], data.train.x["ids"] % 5 > 0)
        with pytest.raises(InputError, match="must hold a mask"):
            data.schema.encode({"ids": np.ones((2, 3), int), "mask": np.ones((2, 3), int)})

    def test_python(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "mine_data.py").write_text(
            "import numpy as np\n"
            "def tokens():\n"
            "    return {'ids': np.arange(80).reshape(40, 2), 'mask': np.ones((40, 2))}, np.arange(40) % 2\n"
            "def pair():\n    return (np.zeros((40, 2)), np.arange(40)), np.arange(40) / 7\n"
            "def short():\n    return np.zeros((40, 2))\n"
            "def breaks():\n    raise RuntimeError('no\\nluck')\n"
            "value = 3\n"
        )
        monkeypatch.chdir(tmp_path)
        data = load(source="python:mine_data:tokens")
        assert isinstance(data.train.x, dict)
        np.testing.assert_array_equal(data.train.x["ids"][:, 0], 2 * data.train.index)
        assert data.train.x["ids"].dtype == np.int64
        pair = load(source="python:mine_data:pair", task="regression")
        assert isinstance(pair.train.x, tuple) and pair.train.x[1].dtype == np.int64
        for name, word in [
            ("short", "must return (x, y)"),
            ("breaks", "RuntimeError: no luck"),
            ("value", "not a function"),
        ]:
            assert word in refused(source=f"python:mine_data:{name}")
        assert "has no absent" in refused(source="python:mine_data:absent")
        assert "does not import" in refused(source="python:no_such_module:f")


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


class TestSplits:
    def test_fractions_partition_the_rows_and_training_keeps_the_order(self) -> None:
        data = load(source="sklearn:wine", validation=0.2, test=0.3)
        parts = [data.train.index, data.validation.index, data.test.index]
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(178))
        assert [len(part) for part in parts[1:]] == [36, 53]
        assert all((np.diff(part) > 0).all() for part in parts)

    def test_the_seed_chooses_and_nothing_else(self) -> None:
        first, again, other = (
            load(0, source="sklearn:wine"),
            load(0, source="sklearn:wine"),
            load(1, source="sklearn:wine"),
        )
        assert first.digest == again.digest != other.digest
        assert not np.array_equal(first.test.index, other.test.index)

    def test_named_rows(self, tmp_path: Path) -> None:
        chosen = np.array([5, 3, 100])
        np.savetxt(tmp_path / "rows.txt", chosen)
        np.save(tmp_path / "rows.npy", chosen)
        (tmp_path / "rows.csv").write_text("row\n5\n3\n100\n")
        for suffix in ("txt", "npy", "csv"):
            data = load(source="sklearn:wine", validation=[10, 20], test=f"{tmp_path}/rows.{suffix}", train_rows=150)
            np.testing.assert_array_equal(data.test.index, chosen)
            np.testing.assert_array_equal(data.validation.index, np.arange(10, 20))
            assert len(data.train) == 150 and not set(data.train.index) & {5, 3, 100, *range(10, 20)}

    def test_no_validation_rows(self) -> None:
        data = load(source="sklearn:wine", validation=0)
        assert len(data.validation) == 0 and np.asarray(data.validation.x).shape == (0, 13)

    @pytest.mark.parametrize(
        ("text", "word"),
        [
            ("999\n", "rows 0 to 177"),
            ("-1\n", "row -1"),
            ("1\n1\n", "more than once"),
            ("1.5\n", "whole"),
            ("a\nb\n", "'b'"),
            ("", "no rows"),
        ],
    )
    def test_files_of_rows_that_cannot_be(self, text: str, word: str, tmp_path: Path) -> None:
        (tmp_path / "rows.txt").write_text(text)
        assert word in refused(source="sklearn:wine", test=f"{tmp_path}/rows.txt")

    def test_splits_that_do_not_fit(self, tmp_path: Path) -> None:
        (tmp_path / "rows.txt").write_text("5\n12\n")
        assert "share 1 rows, the first is row 12" in refused(
            source="sklearn:wine", validation=f"{tmp_path}/rows.txt", test=[10, 20]
        )
        assert "needs 200 rows, the source has 178" in refused(source="sklearn:wine", test=[100, 200])
        assert "for training" in refused(source="sklearn:wine", test=[0, 178], validation=0)
        assert "data.train_rows must be at most 124" in refused(source="sklearn:wine", train_rows=500)
        assert "no training row has the class" in refused(source="sklearn:iris", train_rows=40)
        assert "no such file" in refused(source="sklearn:wine", test=f"{tmp_path}/absent.txt")


class TestScaling:
    def test_by_training_rows_alone(self) -> None:
        data = load(source="sklearn:wine")
        x = np.asarray(data.train.x)
        np.testing.assert_allclose(x.mean(axis=0), 0, atol=1e-12)
        np.testing.assert_allclose(x.std(axis=0), 1, atol=1e-12)
        assert abs(np.asarray(data.test.x).mean(axis=0)).max() > 0.01

    def test_a_constant_column_stays_finite(self, tmp_path: Path) -> None:
        frame = table().assign(same=0.1)
        data = load(source=csv(tmp_path / "t.csv", frame.to_csv(index=False)), target="y")
        np.testing.assert_allclose(np.asarray(data.train.x)[:, -1], 0, atol=1e-9)

    def test_targets_of_a_regression_keep_their_unit_in_the_schema(self) -> None:
        data = load(source="sklearn:diabetes", task="regression")
        raw = load(source="sklearn:diabetes", task="regression", standardize=False)
        assert (raw.schema.y_mean, raw.schema.y_std) == (0.0, 1.0)
        np.testing.assert_allclose(data.test.y * data.schema.y_std + data.schema.y_mean, raw.test.y)
        assert abs(data.train.y.mean()) < 1e-12 and abs(data.train.y.std() - 1) < 1e-12

    def test_constant_regression_target(self, tmp_path: Path) -> None:
        source = csv(tmp_path / "t.csv", table().assign(y=3).to_csv(index=False))
        assert "nothing to learn" in refused(source=source, target="y", task="regression")


class TestDigest:
    def test_one_changed_value_changes_it(self, tmp_path: Path) -> None:
        frame = table()
        first = load(source=csv(tmp_path / "t.csv", frame.to_csv(index=False)), target="y")
        frame.loc[11, "a"] += 0.001
        second = load(source=csv(tmp_path / "u.csv", frame.to_csv(index=False)), target="y")
        assert first.digest != second.digest

    def test_rows_outside_the_run_do_not(self, tmp_path: Path) -> None:
        frame = table(60)
        split = {"target": "y", "validation": [0, 5], "test": [5, 10], "train_rows": 20}
        first = load(source=csv(tmp_path / "t.csv", frame.to_csv(index=False)), **split)
        frame.loc[55, "a"] += 1
        assert load(source=csv(tmp_path / "u.csv", frame.to_csv(index=False)), **split).digest == first.digest


class TestNewRows:
    def test_the_schema_survives_json(self, tmp_path: Path) -> None:
        data = load(source=csv(tmp_path / "t.csv", table().to_csv(index=False)), target="y")
        again = DataSchema.from_json(json.loads(json.dumps(data.schema.to_json())))
        assert again.to_json() == data.schema.to_json()
        new = load_inputs(f"csv:{tmp_path}/t.csv", again, "y")
        np.testing.assert_array_equal(np.asarray(new)[data.test.index], data.test.x)

    def test_columns_are_found_by_name(self, tmp_path: Path) -> None:
        frame = table()
        schema = load(source=csv(tmp_path / "t.csv", frame.to_csv(index=False)), target="y").schema
        expected = load_inputs(f"csv:{tmp_path}/t.csv", schema)
        shuffled = frame[["kind", "b", "a"]].assign(extra="whatever")
        np.testing.assert_array_equal(
            load_inputs(csv(tmp_path / "n.csv", shuffled.to_csv(index=False)), schema), expected
        )

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda f: f.drop(columns="b"), ["column 'b' is missing"]),
            (lambda f: f.assign(kind="violet"), ["column 'kind' holds 'violet' in row 0", "blue, green, red"]),
            (lambda f: f.assign(a=np.nan), ["column 'a'", "missing"]),
            (lambda f: f.assign(a="many"), ["column 'a' must be numbers", "'many'"]),
        ],
    )
    def test_rows_that_do_not_fit_are_named(self, change: Any, words: list[str], tmp_path: Path) -> None:
        schema = load(source=csv(tmp_path / "t.csv", table().to_csv(index=False)), target="y").schema
        with pytest.raises(InputError) as error:
            load_inputs(csv(tmp_path / "n.csv", change(table()).to_csv(index=False)), schema, "y")
        for word in words:
            assert word in str(error.value)

    def test_without_header_a_missing_target_is_understood(self, tmp_path: Path) -> None:
        frame = table()[["y", "a", "b"]].replace({"yes": 1, "no": 0})
        data = load(source=csv(tmp_path / "t.csv", frame.to_csv(index=False, header=False)), target=0)
        expected = load_inputs(f"csv:{tmp_path}/t.csv", data.schema, 0)
        short = csv(tmp_path / "n.csv", frame.drop(columns="y").to_csv(index=False, header=False))
        np.testing.assert_array_equal(load_inputs(short, data.schema, 0), expected)
        np.testing.assert_array_equal(np.asarray(expected)[data.test.index], data.test.x)

    def test_arrays_of_another_shape_are_refused(self) -> None:
        schema = load(source="sklearn:digits").schema
        with pytest.raises(InputError, match=r"rows of shape \(1, 8, 8\)"):
            schema.encode(np.zeros((3, 64)))
        with pytest.raises(InputError, match="one array"):
            schema.encode({"x": np.zeros((3, 1, 8, 8))})

    def test_ood_rows_are_scaled_like_the_training_rows(self, tmp_path: Path) -> None:
        source = csv(tmp_path / "t.csv", table().to_csv(index=False))
        other = csv(tmp_path / "far away.csv", table(seed=2).drop(columns="y").to_csv(index=False))
        data = load(source=source, target="y", ood=[other, source, source])
        assert list(data.ood) == ["far_away", "t", "t_2"]
        np.testing.assert_array_equal(np.asarray(data.ood["t"])[data.train.index], data.train.x)


def test_structures_are_kept() -> None:
    tree = {"a": np.ones(2), "b": np.zeros(2)}
    assert set(map_arrays(lambda array: array.sum(), tree)) == {"a", "b"}
    assert map_arrays(lambda first, second: first + second, (1, 2), (3, 4)) == (4, 6)


def _write_idx(path: Path, array: np.ndarray, cut: int = 0) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    data = header + array.tobytes()
    path.write_bytes(gzip.compress(data[: len(data) - cut]))
