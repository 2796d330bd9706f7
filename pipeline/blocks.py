"""One sample block as one Parquet object: rows ordered by record, then walk; checksums over everything in it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DamagedBlock
from pipeline.plan import BlockKey, WalkPlan
from pipeline.seal import OPEN_SEAL, BrokenBlock, Sealing

SCHEMA_VERSION = "1"
ROW_GROUP_BYTES = 16 * 2**20
STATUSES = ("ok", "halved", "diverged")
NUMBERS = {
    "walk": "int32",
    "start": "int16",
    "step": "int32",
    "radius": "float32",
    "potential": "float64",
    "nll": "float64",
    "grad_norm": "float32",
    "distance": "float32",
    "step_size": "float64",
}
"""Columns of one number a row, in the order of the file."""
SMALL = [*NUMBERS, "status"]


def _none() -> np.ndarray:
    return np.empty(0)


@dataclass(frozen=True)
class SampleBlock:
    """Recorded points of the walks of one shard. Rows are ordered by record, then walk; n rows."""

    key: BlockKey
    walk: np.ndarray
    """Number of the walk in the run, (n,) int32."""
    start: np.ndarray
    """The MAP estimate from which the walk began, (n,) int16."""
    step: np.ndarray = field(default_factory=_none)
    """Steps taken, (n,) int32."""
    radius: np.ndarray = field(default_factory=_none)
    """Drift so far, in units of the parameters, (n,) float32."""
    potential: np.ndarray = field(default_factory=_none)
    """U in nats, (n,) float64."""
    nll: np.ndarray = field(default_factory=_none)
    """Summed negative log likelihood of the training rows in nats, (n,) float64."""
    grad_norm: np.ndarray = field(default_factory=_none)
    """Norm of the gradient of U, (n,) float32."""
    distance: np.ndarray = field(default_factory=_none)
    """Distance from the start of the walk, (n,) float32."""
    step_size: np.ndarray = field(default_factory=_none)
    """Step size of the correction, (n,) float64."""
    status: Sequence[str] | np.ndarray = ()
    """ok, halved or diverged, n entries."""
    theta: np.ndarray = field(default_factory=_none)
    """Positions, (n, D) float32, or float64 if the plan says so."""
    momentum: np.ndarray | None = None
    """Momentum after the last record, (walks, D); None if the correction keeps none."""


@dataclass(frozen=True)
class Stamp:
    """What the footer says of a block."""

    run_id: str
    digest: str
    """sha256 of the theta bytes, row by row."""
    parameters: list[dict[str, Any]]
    plan: str
    """`plan_digest` of the plan that it was computed by."""
    schema: str


def plan_digest(plan: WalkPlan) -> str:
    """Return the sha256 of all that the plan fixes; how it was chosen does not count."""
    fixed = {name: value for name, value in plan.to_json().items() if name != "chosen"}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def theta_type(plan: WalkPlan) -> pa.FixedShapeTensorType:
    """Arrow type of one position."""
    return pa.fixed_shape_tensor(pa.float64() if plan.dtype == "float64" else pa.float32(), (plan.dim,))


def arrow_schema(plan: WalkPlan, momentum: bool) -> pa.Schema:
    """Columns of a block. `momentum` only where the walk has one."""
    value = theta_type(plan)
    fields = [pa.field(name, pa.type_for_alias(kind), nullable=False) for name, kind in NUMBERS.items()]
    fields += [pa.field("status", pa.string(), nullable=False), pa.field("theta", value, nullable=False)]
    if momentum:
        fields.append(pa.field("momentum", pa.large_list(value.value_type)))
    return pa.schema(fields)


def has_columns(schema: pa.Schema, plan: WalkPlan) -> bool:
    """Whether the columns and types are those of a block."""
    return schema.remove_metadata().equals(arrow_schema(plan, "momentum" in schema.names))


def rows_per_group(plan: WalkPlan, momentum: bool = False) -> int:
    """Rows of a row group of about 16 MB; at least one."""
    row = plan.dim * np.dtype(plan.dtype).itemsize * (2 if momentum else 1)
    return max(1, ROW_GROUP_BYTES // row)


def write_block(file: BinaryIO, block: SampleBlock, plan: WalkPlan, run_id: str) -> None:
    """Write a block to a seekable file, one row group at a time; memory beyond the block is one encoded group.

    Raises:
        ValueError: The block does not fit the plan: a defect of the caller, found before it is stored.
    """
    _check_shape(block, plan)
    schema = arrow_schema(plan, block.momentum is not None)
    theta = np.ascontiguousarray(block.theta, dtype=plan.dtype)
    stamp = {
        "fiberwalk.schema": SCHEMA_VERSION,
        "fiberwalk.run_id": run_id,
        "fiberwalk.plan": plan_digest(plan),
        "fiberwalk.parameters": json.dumps(plan.parameters),
    }
    options: dict[str, Any] = {
        "compression": "none",
        "use_dictionary": False,
        "write_statistics": SMALL,
        "write_page_checksum": True,
    }
    # The digest needs the whole of theta and is needed last: it is taken beside the writing.
    with ThreadPoolExecutor(1) as pool, Sealing(file) as sealed:
        digest = pool.submit(lambda: hashlib.sha256(theta.data).hexdigest())
        with pq.ParquetWriter(pa.PythonFile(sealed, "w"), schema, **options) as writer:
            group = rows_per_group(plan, block.momentum is not None)
            for first in range(0, len(theta), group):
                batch = _batch(block, theta, schema, slice(first, min(first + group, len(theta))))
                writer.write_batch(batch, row_group_size=group)
            writer.add_key_value_metadata({**stamp, "fiberwalk.digest": digest.result(), **OPEN_SEAL})


def _check_shape(block: SampleBlock, plan: WalkPlan) -> None:
    rows = len(block.walk)
    shard = plan.shards()[block.key.shard]
    expected = shard.walks * len(plan.records_in_block(block.key.block))
    if rows != expected or block.theta.shape != (rows, plan.dim):
        raise ValueError(
            f"{block.key.path} needs {expected} rows of {plan.dim} parameters, got theta of shape {block.theta.shape}."
        )
    lengths = {name: len(getattr(block, name)) for name in SMALL}
    if any(length != rows for length in lengths.values()):
        raise ValueError(f"{block.key.path} has {rows} rows, but its columns have {lengths}.")
    if block.momentum is not None and block.momentum.shape != (shard.walks, plan.dim):
        raise ValueError(f"{block.key.path} needs momentum ({shard.walks}, {plan.dim}), got {block.momentum.shape}.")


def _batch(block: SampleBlock, theta: np.ndarray, schema: pa.Schema, rows: slice) -> pa.RecordBatch:
    columns: list[pa.Array] = []
    for name, kind in NUMBERS.items():
        columns.append(pa.array(np.asarray(getattr(block, name))[rows].astype(kind)))
    columns.append(pa.array(list(block.status[rows]), pa.string()))
    value = schema.field("theta").type
    flat = pa.FixedSizeListArray.from_arrays(pa.array(theta[rows].reshape(-1)), value.shape[0])
    columns.append(pa.ExtensionArray.from_storage(value, flat))
    if block.momentum is not None:
        columns.append(_momentum(block.momentum.astype(theta.dtype, copy=False), len(theta), rows))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _momentum(momentum: np.ndarray, total: int, rows: slice) -> pa.Array:
    """Momentum of some rows of a block: null but in the rows of its last record."""
    walks, dim = momentum.shape
    numbers = np.arange(rows.start, rows.stop) - (total - walks)  # walk of the last record, negative before it
    kept = np.ascontiguousarray(momentum[numbers[numbers >= 0]])
    lengths = np.where(numbers >= 0, dim, 0)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
    return pa.LargeListArray.from_arrays(offsets, pa.array(kept.reshape(-1)), mask=pa.array(numbers < 0))


@contextlib.contextmanager
def reading(run_uri: str, path: str) -> Iterator[None]:
    """What Arrow finds wrong with the bytes of a block becomes DamagedBlock; what disk, network or memory say stays."""
    try:
        yield
    except (pa.ArrowMemoryError, FileNotFoundError):
        raise
    except (BrokenBlock, pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # Arrow's own have none
            raise
        raise DamagedBlock(
            f"{run_uri}/{path}: {' '.join(str(error).split())}. Run 'fiberwalk verify {run_uri} --repair', then run "
            "again."
        ) from None


def read_stamp(metadata: Any) -> Stamp:
    """Return what the footer says; raises BrokenBlock if it was not written by this schema of fiberwalk."""
    found = metadata.metadata or {}
    names = ("schema", "run_id", "digest", "parameters", "plan")
    try:
        text = {name: found[f"fiberwalk.{name}".encode()].decode() for name in names}
        parameters = json.loads(text["parameters"])
    except (KeyError, ValueError):
        raise BrokenBlock("not a block: the fiberwalk fields are missing in its footer") from None
    return Stamp(text["run_id"], text["digest"], parameters, text["plan"], text["schema"])


def differences(stamp: Stamp, plan: WalkPlan, run_id: str) -> list[str]:
    """Say in what a block's footer differs from the run it lies in."""
    wrong = []
    if stamp.schema != SCHEMA_VERSION:
        wrong.append(f"written by schema {stamp.schema}, this version reads {SCHEMA_VERSION}")
    if stamp.run_id != run_id:
        wrong.append(f"belongs to run {stamp.run_id}, not {run_id}")
    if stamp.parameters != json.loads(json.dumps(plan.parameters)):
        wrong.append("has another parameter layout")
    elif stamp.plan != plan_digest(plan):
        wrong.append("was computed by another plan (plan.json has changed)")
    return wrong


def misplaced(metadata: pq.FileMetaData, plan: WalkPlan, key: BlockKey) -> str | None:
    """Say what rows a block holds where they are not those of its name, as far as its footer tells; None: it fits."""
    shard, records = plan.shards()[key.shard], plan.records_in_block(key.block)
    expected = {
        "walk": (shard.first_walk, shard.first_walk + shard.walks - 1),
        "step": ((records[0] + 1) * plan.record_every, (records[-1] + 1) * plan.record_every),
    }
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    for place in range(metadata.row_group(0).num_columns if groups else 0):
        columns = [group.column(place) for group in groups]
        name = columns[0].path_in_schema
        if name in expected and all(c.statistics is not None and c.statistics.has_min_max for c in columns):
            held = (min(c.statistics.min for c in columns), max(c.statistics.max for c in columns))
            if held != expected[name]:
                return f"holds {name} {held[0]} to {held[1]}, its name says {expected[name][0]} to {expected[name][1]}"
    return None


def to_numpy(column: pa.ChunkedArray, rows: np.ndarray, dim: int) -> np.ndarray:
    """Some rows of a column; of momentum those that have it, (rows, dim)."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0)
    if isinstance(array, pa.FixedShapeTensorArray):
        return array.to_numpy_ndarray()[rows]
    if isinstance(array, pa.LargeListArray):
        kept = array.take(pa.array(rows)).drop_null()
        return kept.flatten().to_numpy().reshape(-1, dim)
    return array.to_numpy(zero_copy_only=False)[rows]


def join_parts(parts: list[np.ndarray]) -> np.ndarray:
    """Arrays one after the other, without a copy of a single one; empty for none."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0)
