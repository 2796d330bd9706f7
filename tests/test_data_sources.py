"""All sources but CSV: Parquet, npz, idx, scikit-learn, Python functions and frames."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from tests.sources import csv, load, refused, table


class TestOtherSources:
    def test_parquet_equals_csv(self, tmp_path: Path) -> None:
        frame = table()
        frame.assign(kind=frame.kind.astype("category")).to_parquet(tmp_path / "t.parquet")
        first = load(source=f"parquet:{tmp_path}/t.parquet", target="y")
        second = load(source=csv(tmp_path / "t.csv", frame.to_csv(index=False)), target="y")
        assert first.digest == second.digest
        np.testing.assert_array_equal(first.train.x, second.train.x)

    def test_views_of_text_are_text(self, tmp_path: Path) -> None:
        """Also where only some rows are kept."""
        whole = pa.Table.from_pandas(table(), preserve_index=False)
        place = whole.schema.get_field_index("kind")
        views = whole.set_column(place, "kind", whole["kind"].cast(pa.string_view()))
        for name, content in (("plain", whole), ("views", views)):
            pq.write_table(content, tmp_path / f"{name}.parquet")
        assert pa.types.is_string_view(pq.read_schema(tmp_path / "views.parquet").field("kind").type)
        for settings in ({}, {"train_rows": 10}):
            plain, found = (
                load(source=f"parquet:{tmp_path / name}.parquet", target="y", **settings) for name in ("plain", "views")
            )
            assert found.digest == plain.digest

    def test_parquet_files_of_a_folder_are_one_after_the_other(self, tmp_path: Path) -> None:
        frame = table()
        frame.to_parquet(tmp_path / "whole.parquet")
        (tmp_path / "parts").mkdir()
        for first, name in ((0, "part-0"), (7, "part-1"), (20, "part-2")):
            piece = frame.iloc[first : {0: 7, 7: 20, 20: None}[first]]
            piece.assign(kind=piece.kind.astype("category")).to_parquet(tmp_path / "parts" / f"{name}.parquet")
        (tmp_path / "parts" / "_SUCCESS").touch()
        settings = {"target": "y", "validation": [3, 9], "test": [18, 25], "train_rows": 9}
        whole, parts = (load(source=f"parquet:{tmp_path / name}", **settings) for name in ("whole.parquet", "parts"))
        assert whole.digest == parts.digest
        np.testing.assert_array_equal(whole.test.x, parts.test.x)
        frame[["y"]].to_parquet(tmp_path / "parts" / "part-3.parquet")
        assert "part-3.parquet has the columns y, not" in refused(source=f"parquet:{tmp_path}/parts", target="y")
        assert "without .parquet files" in refused(source=f"parquet:{tmp_path.parent}", target="y")

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
        encoded = schema.encode(polars.from_pandas(frame))
        assert np.array_equal(encoded, expected)
        with pytest.raises(InputError, match="the column 'a' is missing"):
            schema.encode(frame.rename(columns={"a": "A"}))

    def test_npz_never_unpickles(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "t.npz", x=np.array([{}, {}], dtype=object), y=np.arange(2))
        assert "no npz file of plain arrays" in refused(source=f"npz:{tmp_path}/t.npz")

    def test_npz_without_one_finite_target_a_row_is_refused(self, tmp_path: Path) -> None:
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
            write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", images[part])
            write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", labels[part])
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
        write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", np.zeros((3, 2, 2), dtype=np.uint8), cut=1)
        write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.zeros(3, dtype=np.uint8))
        assert "cut short" in refused(source=f"idx:{tmp_path}/")
        absent = refused(source=f"idx:{tmp_path}/emnist-")
        assert "emnist-train-images-idx3-ubyte" in absent and "emnist-t10k-images-idx3-ubyte" in absent

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


def write_idx(path: Path, array: np.ndarray, cut: int = 0) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    data = header + array.tobytes()
    path.write_bytes(gzip.compress(data[: len(data) - cut]))
