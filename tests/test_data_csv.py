"""CSV files: what a table becomes, and what is said when it cannot be used."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.sources import csv, load, refused, table


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

    def test_what_only_python_takes_for_a_number_is_a_level(self, tmp_path: Path) -> None:
        bins = ["0_10", "10_20", "20_30"]
        text = "age,a,y\n" + "".join(f"{bins[k % 3]},{k},{k % 2}\n" for k in range(30))
        data = load(source=csv(tmp_path / "t.csv", text), target="y")
        assert [column.levels for column in data.schema.features] == [tuple(bins), ()]

    @pytest.mark.parametrize("cell", ["3,5", "1,125"])
    def test_a_comma_in_a_quoted_number_is_refused(self, cell: str, tmp_path: Path) -> None:
        text = "a,y\n" + "".join(f"{f'{chr(34)}{cell}{chr(34)}' if k == 7 else k},{k % 2}\n" for k in range(30))
        message = refused(source=csv(tmp_path / "t.csv", text), target="y")
        assert f"column 'a' must be numbers, row 7 holds '{cell}'; write numbers with a decimal point" in message

    def test_a_header_that_was_taken_for_data_is_told_of(self, tmp_path: Path) -> None:
        text = "2019,2020,2021\n" + "".join(f"{k}.5,{-k},{k % 2}\n" for k in range(30))
        message = refused(source=csv(tmp_path / "t.csv", text), target="label")
        assert "no column 'label'; there are 0, 1, 2; its first line was taken for data" in message

    def test_columns_in_small_units_count_and_constant_ones_do_not(self, tmp_path: Path) -> None:
        """Charges in coulomb, also beside a large offset; a constant with the rounding of its text stays one."""
        rng = np.random.default_rng(0)
        small, y = 1e-19 * rng.normal(size=60), np.arange(60) % 2
        rows = [
            f"{a!r},{5e-7 + b!r},0.1,{k}" for a, b, k in zip(small.tolist(), (small * 1e9).tolist(), y, strict=True)
        ]
        data = load(source=csv(tmp_path / "t.csv", "charge,mass,same,y\n" + "\n".join(rows)), target="y")
        assert np.asarray(data.train.x).std(0) == pytest.approx([1, 1, 0], abs=1e-6)

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
