"""One sample block as one Parquet object: rows ordered by record, then walk; checksums over everything in it.

The last field of the footer is a CRC-32 of the whole object with that field zeroed, so that a flip of any byte is
found, in data, page headers and footer alike. The field has a fixed length and is filled in after the rest is written.
"""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.plan import BlockKey, WalkPlan

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
_SEAL = b"fiberwalk.crc32"
_EMPTY = b"crc32:00000000"


class BrokenBlock(Exception):
    """A stored block is not what was written. The message says what is wrong with it."""


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
    sealed = _Sealing(file)
    stamp = {
        b"fiberwalk.schema": SCHEMA_VERSION,
        b"fiberwalk.run_id": run_id,
        b"fiberwalk.plan": plan_digest(plan),
        b"fiberwalk.parameters": json.dumps(plan.parameters),
    }
    options: dict[str, Any] = {
        "compression": "none",
        "use_dictionary": False,
        "write_statistics": SMALL,
        "write_page_checksum": True,
        "data_page_size": ROW_GROUP_BYTES,
    }
    # The digest needs the whole of theta and is needed last: it is taken beside the writing.
    with ThreadPoolExecutor(1) as pool, pq.ParquetWriter(pa.PythonFile(sealed, "w"), schema, **options) as writer:
        digest = pool.submit(lambda: hashlib.sha256(theta.data).hexdigest())
        group = rows_per_group(plan, block.momentum is not None)
        for first in range(0, len(theta), group):
            batch = _batch(block, theta, schema, slice(first, min(first + group, len(theta))))
            writer.write_batch(batch, row_group_size=group)
        writer.add_key_value_metadata({**stamp, b"fiberwalk.digest": digest.result(), _SEAL: _EMPTY})
    _seal(file, sealed.crc)


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


class _Sealing(io.RawIOBase):
    """Passes bytes on and keeps their CRC-32."""

    def __init__(self, file: BinaryIO):
        self._file, self.crc, self._count = file, 0, 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._count

    def write(self, data: Any) -> int:
        self.crc = zlib.crc32(data, self.crc)
        self._file.write(data)
        self._count += len(data)
        return len(data)

    def close(self) -> None:
        """Leave the file underneath open: it still has to be sealed."""


def _footer(tail: bytes) -> bytes:
    """Return the footer out of the last bytes of an object; raises BrokenBlock."""
    if len(tail) < 12 or tail[-4:] != b"PAR1":
        raise BrokenBlock("truncated: it does not end like a Parquet file")
    length = int.from_bytes(tail[-8:-4], "little")
    if length + 12 > len(tail):
        raise BrokenBlock("truncated or overwritten: its footer is longer than the object")
    return tail[-8 - length :]


def _seal_place(footer: bytes) -> int:
    """Return where in the footer the checksum stands."""
    place = footer.rfind(_SEAL)
    place = footer.find(b"crc32:", place) if place >= 0 else -1
    if place < 0:
        raise BrokenBlock("no checksum: not written by fiberwalk, or damaged in its footer")
    return place


def _seal(file: BinaryIO, crc: int) -> None:
    size = file.seek(0, io.SEEK_END)
    file.seek(-8, io.SEEK_END)
    length = int.from_bytes(file.read(4), "little")
    file.seek(size - 8 - length)
    place = size - 8 - length + _seal_place(file.read())
    file.seek(place)
    file.write(f"crc32:{crc:08x}".encode())
    file.seek(0, io.SEEK_END)


def check_seal(file: BinaryIO) -> None:
    """Read a whole object once and compare it with its own checksum, in constant memory.

    Raises:
        BrokenBlock: Any byte differs from what was written, or bytes are missing.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 8))
    end = file.read()
    length = int.from_bytes(end[:4], "little") + 8
    file.seek(max(0, size - min(length, size) - 4))
    footer = _footer(file.read())
    place = size - len(footer) + _seal_place(footer)
    file.seek(place)
    stored = file.read(len(_EMPTY))
    crc = 0
    for start, data in _pieces(file, size):
        low, high = place - start, place - start + len(_EMPTY)
        if high > 0 and low < len(data):
            mutable = bytearray(data)
            mutable[max(0, low) : high] = _EMPTY[max(0, -low) : len(data) - low]
            data = mutable
        crc = zlib.crc32(data, crc)
    if stored != f"crc32:{crc:08x}".encode():
        raise BrokenBlock(
            f"corrupted: its bytes give crc32:{crc:08x}, it was written with {stored.decode('ascii', 'replace')}"
        )


def _pieces(file: BinaryIO, size: int) -> Iterator[tuple[int, bytes]]:
    file.seek(0)
    start = 0
    while start < size:
        data = file.read(min(ROW_GROUP_BYTES, size - start))
        if not data:
            raise BrokenBlock("truncated while it was read")
        yield start, data
        start += len(data)


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
