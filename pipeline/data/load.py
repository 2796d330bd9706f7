"""From a configuration to arrays: read, split, encode, standardise, digest."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config import DataConfig
from pipeline.data.arrays import Digest, Inputs, Rows, count_rows, map_arrays, select_rows
from pipeline.data.columns import encode_columns, learn_columns
from pipeline.data.schema import DataSchema, Part, Parts, check_arrays, refuse_huge
from pipeline.data.sources import Raw, read_source
from pipeline.data.splits import Splits, split_rows
from pipeline.data.tables import parquet_shape, refuse_what_does_not_fit
from pipeline.data.targets import class_targets, number_targets
from pipeline.errors import InputError

CONSTANT = 1e-12
"""Spread relative to their size below which targets differ by rounding only."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """All rows that enter a run."""

    train: Rows
    validation: Rows
    test: Rows
    ood: dict[str, Inputs]
    """Inputs from outside the distribution, by a short name of their source."""
    schema: DataSchema
    digest: str
    """sha256 over all arrays before scaling (names, shapes, bytes): equal data, equal digest on every machine."""


def load_dataset(config: DataConfig, seed: int) -> Dataset:
    """Read and prepare all rows of a run. Raises InputError if the data are not fit for it."""
    raw, splits, kept = _read(config, seed)
    where = f"data.source: {config.source}"
    x, schema_columns = _inputs(raw, where)
    refuse_huge(x, where)
    at = splits if kept is None else splits.within(kept)
    y, classes = _targets(_present(raw.y), raw, config, at)
    parts = _learn_parts(select_rows(x, at.train), raw.tokens, config.standardize)
    y_mean, y_std = _target_scale(y[at.train], config)
    schema = DataSchema(
        task=config.task,
        parts=parts,
        features=schema_columns,
        headerless=isinstance(raw.x, pa.Table) and b"headerless" in (raw.x.schema.metadata or {}),
        classes=classes,
        y_mean=y_mean,
        y_std=y_std,
    )
    return _assemble(config, x, y, splits, at, schema)


def _read(config: DataConfig, seed: int) -> tuple[Raw, Splits, np.ndarray | None]:
    """The source, its splits, and the numbers of the rows that were kept; None if all were."""
    kind, _, uri = config.source.partition(":")
    if kind == "parquet":
        rows, columns = parquet_shape(uri)
        splits = split_rows(config, rows, seed)
        kept = np.unique(np.concatenate([splits.train, splits.validation, splits.test]))
        what = f"{len(kept):,} of {rows:,} rows x {columns} columns x 8 bytes"
        refuse_what_does_not_fit(len(kept) * columns * 8, what, uri, "data.source")
        return read_source(config.source, config.target, "data.source", keep=kept), splits, kept
    raw = read_source(config.source, config.target, "data.source")
    if raw.y is None:
        raise InputError(f"data.source: {config.source} has inputs and no targets")
    if not isinstance(raw.x, pa.Table):
        check_arrays(raw.x, f"data.source: {config.source}")
    rows = len(raw.x) if isinstance(raw.x, pa.Table) else count_rows(raw.x)
    if not rows:
        raise InputError(f"data.source: {config.source} has no rows")
    if raw.y.shape[:1] != (rows,):
        raise InputError(f"data.source: {config.source} has {rows} rows of inputs and targets of shape {raw.y.shape}")
    return raw, split_rows(config, rows, seed), None


def _present(y: np.ndarray | None) -> np.ndarray:
    assert y is not None  # tables are read with their target, and other sources were asked for it
    return y


def load_inputs(source: str, schema: DataSchema, target: int | str | None = None, setting: str = "--data") -> Inputs:
    """Read new rows and encode them for a trained network.

    A target column and other columns that the network does not know are ignored. Raises InputError.
    """
    return schema.encode(_read_new(source, schema, target, setting), f"{setting}: {source}")


def _read_new(source: str, schema: DataSchema, target: int | str | None, setting: str) -> Any:
    raw = read_source(source, None, setting, held_out=True)
    x = raw.x
    if isinstance(x, pa.Table):
        known = {column.name for column in schema.features}
        if isinstance(target, str) and target in x.column_names and target not in known:
            x = x.drop_columns([target])
        elif isinstance(target, int) and b"headerless" in (x.schema.metadata or {}) and x.num_columns == len(known) + 1:
            x = x.remove_column(target % x.num_columns)
    elif isinstance(x, np.ndarray) and schema.features and raw.names:
        x = pa.table({name: x[:, column] for column, name in enumerate(raw.names)})
    return x


def _inputs(raw: Raw, where: str) -> tuple[Inputs, tuple]:
    if isinstance(raw.x, pa.Table):
        columns = learn_columns(raw.x, where)
        return encode_columns(raw.x, columns, where), columns
    x = map_arrays(lambda array: array[:, None] if array.ndim == 1 and isinstance(raw.x, np.ndarray) else array, raw.x)
    if isinstance(x, np.ndarray) and x.ndim == 2 and raw.names:
        return x, learn_columns(pa.table({name: x[:1, column] for column, name in enumerate(raw.names)}), where)
    return x, ()


def _targets(values: np.ndarray, raw: Raw, config: DataConfig, splits: Splits) -> tuple[np.ndarray, tuple[str, ...]]:
    where = f"data.source: {config.source}"
    if config.task == "regression":
        return number_targets(values, where), ()
    y, classes = class_targets(values, raw.classes, where)
    lost = sorted(set(range(len(classes))) - set(y[splits.train].tolist()))
    if lost:
        raise InputError(
            f"{where}: no training row has the class '{classes[lost[0]]}' ({len(splits.train)} training rows); change "
            "data.train_rows, data.validation or data.test, or shuffle the source"
        )
    return y, classes


def _target_scale(y: np.ndarray, config: DataConfig) -> tuple[float, float]:
    if config.task == "classification":
        return 0.0, 1.0
    where = f"data.source: {config.source}: the target"
    if np.ptp(y) <= CONSTANT * np.abs(y).max():
        raise InputError(f"{where} is {y[0]:g} in every training row; nothing to learn")
    std = float(y.std())
    if std == 0:
        raise InputError(f"{where} varies by {np.ptp(y):.3g} only, too little to be squared. Rescale it")
    return (float(y.mean()), std) if config.standardize else (0.0, 1.0)


def _learn_parts(x: Inputs, tokens: bool, standardize: bool) -> Parts:
    several = isinstance(x, (dict, tuple))

    def learn(array: np.ndarray) -> Part:
        if tokens and several and array.dtype.kind == "b":  # a mask beside token numbers or sequences
            return Part(array.shape[1:], "bool", 1.0, np.zeros(()), np.ones(()))
        return _learn_part(array, tokens, standardize)

    return map_arrays(learn, x)


def _learn_part(array: np.ndarray, tokens: bool, standardize: bool) -> Part:
    """Scale of one array by its training rows.

    By column for (rows, columns), by channel for (rows, channels, height, width), else one number for all.
    """
    shape = array.shape[1:]
    image = array.dtype == np.uint8 and array.ndim > 2
    if tokens and array.dtype.kind in "iu" and not image:
        return Part(shape, "int64", 1.0, np.zeros(()), np.ones(()))
    dtype = "float32" if image or array.dtype in (np.float32, np.float16) else "float64"
    scale = 1 / 255 if image else 1.0
    if not standardize:
        return Part(shape, dtype, scale, np.zeros(()), np.ones(()))
    axes = (0,) if array.ndim == 2 else (0, 2, 3) if array.ndim == 4 else None
    mean = array.mean(axis=axes, dtype=np.float64, keepdims=axes is not None) * scale
    std = array.std(axis=axes, dtype=np.float64, keepdims=axes is not None) * scale
    if axes is not None:
        mean, std = mean[0], std[0]
    # A column that does not vary is rounding noise in its standard deviation, which must not be blown up.
    std = np.where(std <= CONSTANT * np.abs(mean), 1.0, std)
    return Part(shape, dtype, scale, np.asarray(mean), np.asarray(std))


def _assemble(config: DataConfig, x: Inputs, y: np.ndarray, splits: Splits, at: Splits, schema: DataSchema) -> Dataset:
    """Rows of the splits: their numbers in the source, and where they stand in x and y."""
    digest = Digest()
    digest.add_text("|".join([config.task, *schema.classes, *(column.name for column in schema.features)]))
    parts: dict[str, Rows] = {}
    for name in ("train", "validation", "test"):
        index, place = getattr(splits, name), getattr(at, name)
        chosen, targets = select_rows(x, place), y[place]
        for kind, array in (("x", chosen), ("y", targets), ("index", index)):
            digest.add(f"{name}.{kind}", array)
        scaled = targets if config.task == "classification" else (targets - schema.y_mean) / schema.y_std
        parts[name] = Rows(schema.scale(chosen), scaled, index)
    ood: dict[str, Inputs] = {}
    for source in config.ood:
        chosen = schema.select(_read_new(source, schema, config.target, "data.ood"), f"data.ood: {source}")
        if not count_rows(chosen):
            raise InputError(f"data.ood: {source} has no rows")
        name = _short_name(source, ood)
        digest.add(f"ood.{name}", chosen)
        ood[name] = schema.scale(chosen)
    some = np.array([0, len(parts["train"]) - 1])
    schema = replace(schema, example=select_rows(parts["train"].x, some))
    return Dataset(parts["train"], parts["validation"], parts["test"], ood, schema, digest.hexdigest())


def _short_name(source: str, taken: dict[str, Inputs]) -> str:
    kind, _, rest = source.partition(":")
    words = [word for word in re.split(r"[/:]+", rest) if word]
    name = words[-1] if words else kind
    name = re.sub(r"\.(csv|txt|data|parquet|npz)(\.\w+)?$", "", name) or kind
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("-_") or kind
    number = 2
    unique = name
    while unique in taken:
        unique, number = f"{name}_{number}", number + 1
    return unique
