"""Predictions for new rows: the model average, and how much of its uncertainty is noise and how much is ignorance."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from pipeline import config_values as values
from pipeline.bayes.predictive import Averaged, PredictiveAverage
from pipeline.bayes.trees import row_count, slice_rows, to_tensors
from pipeline.data import DataSchema, load_inputs
from pipeline.errors import InputError, RunError
from pipeline.own_network import check_rows
from pipeline.run import Run, load_run
from pipeline.stages.comparison import Comparison, Draws
from pipeline.stages.evaluate import deformation_draws
from pipeline.stages.methods import walk_draws
from pipeline.stages.output import refuse_inside
from pipeline.stages.paths import read_paths
from pipeline.storage import Storage
from pipeline.store import SampleStore

_BLOCK = 65_536


FROM = ("walk", "deformation")


def predict(run_uri: str, source: str, out_uri: str, *, draws_from: str = "walk", trust_code: bool = False) -> None:
    """Write one line a row of `source`: the prediction and its uncertainties, as CSV or Parquet by the suffix.

    Classification: class, the probability of every class, and aleatoric and epistemic entropy in nats. Regression, in
    the unit of the target: mean, and aleatoric and epistemic standard deviation (their squares add up). The draws are
    the points of the walks that the evaluation judged, or draws of the deformation model if that is asked for.

    Raises:
        InputError: No finished run there, the rows do not fit the network, or the suffix is neither.
    """
    try:
        values.source(source)
    except ValueError as error:
        raise InputError(f"--data {error}, got '{source}'.") from None
    if draws_from not in FROM:
        raise InputError(f"--draws-from must be {' or '.join(FROM)}, got '{draws_from}'.")
    folder, _, name = out_uri.rpartition("/")
    suffix = name.rpartition(".")[2].lower()
    if suffix not in ("csv", "parquet"):
        raise InputError(f"--out must end in .csv or .parquet, got '{out_uri}'.")
    if out_uri.removeprefix("file://") == source.partition(":")[2].removeprefix("file://"):
        raise InputError(f"--out {out_uri} is the file that --data reads; give another name.")
    if refuse_inside(out_uri, run_uri).protocol != "file":
        Storage.open(folder).check_writable()  # found out before the work, not after it
    run = load_run(run_uri, trust_code=trust_code)
    if not run.storage.exists("radius.json"):
        raise InputError(f"{run_uri} is not finished: radius.json is missing. Finish it with 'fiberwalk run'.")
    if draws_from == "deformation" and not run.storage.exists("deformation/deformation.json"):
        raise InputError(f"{run_uri} has no deformation model (deformation.kind: {run.config.deformation.kind}).")
    x = load_inputs(source, run.dataset.schema, run.config.data.target)
    if not row_count(x):
        raise InputError(f"--data {source} has no rows.")
    table = predict_table(run, x, draws_from)
    buffer = io.BytesIO()
    (pyarrow.csv.write_csv if suffix == "csv" else pyarrow.parquet.write_table)(table, buffer)
    try:
        Storage.open(folder or ".").replace(name, buffer.getvalue())
    except (RunError, FileNotFoundError) as error:  # the latter where a place takes no new files
        raise InputError(f"--out {out_uri} cannot be written: {error}") from error


def predict_table(run: Run, x: Any, draws_from: str = "walk") -> pa.Table:
    """Predictions of encoded inputs, 65 536 rows at a time, so that memory is that of the answer."""
    store = SampleStore.open(run.storage)
    paths = read_paths(store) if draws_from == "walk" else None
    choice = run.storage.read_json("radius.json")
    radius = float(choice["radius"])
    comparison = Comparison.open(run, store.plan, {})
    check_rows(comparison.problems[0].network, run.config.model.architecture, x, "--data")
    parts = []
    for first in range(0, row_count(x), _BLOCK):
        draws: Draws = walk_draws(comparison, store, paths, radius) if paths else deformation_draws(comparison)
        averaged = _average(comparison, draws, slice_rows(x, first, first + _BLOCK), choice["noise_factor"])
        parts.append(_columns(averaged, run.dataset.schema))
    return pa.concat_tables(parts)


def _average(c: Comparison, draws: Draws, x: Any, noise: float) -> Averaged:
    shift, scale = c.unit
    average = PredictiveAverage(c.problems[0].likelihood, shift=shift, scale=scale, noise=noise, components=False)
    network = c.problems[0].network
    tensors = to_tensors(x, network.dtype, network.device)
    for start, theta in draws:
        average.add(c.problems[start].network, theta, tensors, c.problems[start].likelihood)
    return average.result()


def _columns(averaged: Averaged, schema: DataSchema) -> pa.Table:
    """The answer with readable column names."""
    p = averaged.probabilities
    if p is not None:
        columns = {"predicted": np.asarray(schema.classes)[p.argmax(axis=1)]}
        columns |= {f"probability_{name}": p[:, k] for k, name in enumerate(schema.classes)}
        return pa.table({**columns, "aleatoric": averaged.aleatoric, "epistemic": averaged.epistemic})
    assert averaged.mean is not None
    spreads = {name: np.sqrt(getattr(averaged, name)) for name in ("aleatoric", "epistemic")}
    return pa.table({"mean": averaged.mean[0], **spreads})
