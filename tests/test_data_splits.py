"""Splits, scaling and the digest: which rows a run takes, in which unit, and how it knows them again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.sources import csv, load, refused, table


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
