"""Rows that a trained network meets later are encoded as its training rows were, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data import DataSchema, load_inputs
from pipeline.data.arrays import map_arrays
from pipeline.errors import InputError
from tests.sources import csv, load, table


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
            (lambda f: f.assign(a=-1e300), ["holds 1e+300", "at most 1e+18"]),
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

    def test_ood_rows_that_overflow_are_refused(self, tmp_path: Path) -> None:
        source = csv(tmp_path / "t.csv", table().to_csv(index=False))
        other = csv(tmp_path / "far.csv", table().assign(a=1e200).drop(columns="y").to_csv(index=False))
        with pytest.raises(InputError, match=r"data\.ood: .*far\.csv.* holds 1e\+200; numbers must be at most"):
            load(source=source, target="y", ood=[other])

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
