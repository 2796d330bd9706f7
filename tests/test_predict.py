"""Predictions for new rows: a line for every row, by the draws that the evaluation judged."""

from __future__ import annotations

import numpy as np
import pandas
import pytest

from pipeline.errors import InputError
from pipeline.stages.figures import raw_inputs
from pipeline.stages.predict import predict
from tests.runs import finished


@pytest.mark.parametrize(
    ("name", "suffix", "rows"), [("classes", "csv", 1797), ("classes", "parquet", 1797), ("curve", "csv", 200)]
)
def test_predict_writes_a_line_for_every_row_of_the_source(name, suffix, rows, tmp_path):
    run = finished(name)
    out = tmp_path / f"out.{suffix}"
    source = str(run.config.data.source)
    predict(run.uri, source, str(out), trust_code=True)
    table = pandas.read_csv(out) if suffix == "csv" else pandas.read_parquet(out)
    assert len(table) == rows
    assert table[["epistemic", "aleatoric"]].to_numpy().min() >= 0
    if name == "classes":
        p = table[[c for c in table.columns if c.startswith("probability_")]].to_numpy()
        assert np.allclose(p.sum(axis=1), 1, atol=1e-6)
        assert np.array_equal(table["predicted"].to_numpy().astype(int), p.argmax(axis=1))


def test_predict_takes_the_draws_that_the_table_judged(tmp_path):
    run = finished("curve")
    test = run.dataset.test
    np.savez(tmp_path / "test.npz", x=raw_inputs(run, np.asarray(test.x)))
    tables = {}
    for who in ("walk", "deformation"):
        predict(run.uri, f"npz:{tmp_path}/test.npz", str(tmp_path / "out.csv"), draws_from=who, trust_code=True)
        tables[who] = pandas.read_csv(tmp_path / "out.csv")
    y = test.y * run.dataset.schema.y_std + run.dataset.schema.y_mean
    scores = run.storage.read_json("evaluation.json")["methods"]
    for who, table in tables.items():
        rmse = float(np.sqrt(((table["mean"] - y) ** 2).mean()))
        assert rmse == pytest.approx(scores[who]["rmse"]["value"], rel=1e-5)


def test_predict_does_not_write_over_what_it_reads(tmp_path):
    (tmp_path / "rows.csv").write_text("a\n1\n")
    for prefix in ("", "file://"):
        with pytest.raises(InputError, match="is the file that --data reads"):
            predict(finished("curve").uri, f"csv:{tmp_path}/rows.csv", f"{prefix}{tmp_path}/rows.csv", trust_code=True)
    assert (tmp_path / "rows.csv").read_text() == "a\n1\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [("new.csv", "must be sklearn:NAME, csv:URI.*got 'new.csv'"), ("npz:{}/none.npz", "has no rows")],
)
def test_predict_refuses_what_is_no_input(source, message, tmp_path):
    np.savez(tmp_path / "none.npz", x=np.zeros((0, 1)))
    with pytest.raises(InputError, match=message):
        predict(finished("curve").uri, source.format(tmp_path), str(tmp_path / "out.csv"), trust_code=True)
