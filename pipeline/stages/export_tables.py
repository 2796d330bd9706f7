"""Export formats with a row or a file a point: Parquet and safetensors. Points come piece by piece, none is kept."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.stages.export_read import STATS, Points, Selection, State, variable_names

ROW_GROUP_BYTES = 16 * 2**20


class ParquetExport:
    """One Parquet file, a row a point, a column a parameter: lists of fixed size, shapes in the columns' metadata."""

    def __init__(self, path: Path, selection: Selection, attributes: dict[str, Any]):
        self._selection = selection
        # A parameter without numbers has no column: a list of fixed size holds one at least.
        named = zip(variable_names(selection.parameters), selection.parameters, strict=True)
        self._columns = [(name, parameter) for name, parameter in named if parameter.size]
        value = pa.from_numpy_dtype(np.dtype(selection.dtype))
        fields = [pa.field("walk", pa.int32()), pa.field("start", pa.int16())]
        fields += [pa.field(name, pa.from_numpy_dtype(np.dtype(kind))) for name, kind in STATS.items()]
        fields.append(pa.field("status", pa.string()))
        for name, parameter in self._columns:
            about = {"name": parameter.name, "shape": json.dumps(parameter.shape)}
            fields.append(pa.field(name, pa.list_(value, parameter.size), metadata=about))
        metadata = {f"fiberwalk.{key}": str(item) for key, item in attributes.items()}
        self._schema = pa.schema(fields, metadata=metadata)
        options: dict[str, Any] = {"use_dictionary": False, "write_statistics": ["walk", "start", *STATS]}
        self._writer = pq.ParquetWriter(path, self._schema, **options)

    def write(self, points: Points) -> None:
        """Store some points."""
        group = max(1, ROW_GROUP_BYTES // max(1, self._selection.row_bytes))
        columns: list[pa.Array] = [
            pa.array(self._selection.walks[points.chain], pa.int32()),
            pa.array(self._selection.starts[points.chain], pa.int16()),
            *(pa.array(values) for values in points.stats.values()),
            pa.array(points.status, pa.string()),
        ]
        for _, parameter in self._columns:
            flat = np.ascontiguousarray(points.theta[:, parameter.columns]).reshape(-1)
            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(flat), parameter.size))
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema), row_group_size=group)

    def close(self) -> None:
        """Finish what was written."""
        self._writer.close()


_SAFETENSORS = {"float16": "F16", "float32": "F32", "float64": "F64", "int64": "I64", "int32": "I32", "int16": "I16",
                "int8": "I8", "uint8": "U8", "bool": "BOOL"}  # fmt: skip


def write_safetensors(
    file: BinaryIO, layout: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> dict[str, int]:
    """Write the header of a safetensors file; returns where the bytes of each tensor begin."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    begins = {}
    for name, (kind, shape) in layout.items():
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize
        header[name] = {"dtype": _SAFETENSORS[kind], "shape": list(shape), "data_offsets": [offset, offset + size]}
        begins[name] = offset
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    return {name: begin + 8 + len(text) for name, begin in begins.items()}


class SafetensorsFolder:
    """One file a point with the complete state dict: `load_state_dict` in plain torch takes it as it is."""

    def __init__(self, path: Path, selection: Selection, attributes: dict[str, Any], state: State):
        self._path, self._selection, self._state = path, selection, state
        self._metadata = {"format": "pt", **{key: str(value) for key, value in attributes.items()}}
        path.mkdir()

    def write(self, points: Points) -> None:
        """Store some points."""
        for row, chain in enumerate(points.chain):
            about = {name: str(values[row]) for name, values in points.stats.items()}
            about["walk"] = str(self._selection.walks[chain])
            name = f"walk={self._selection.walks[chain]:06d}-step={points.stats['step'][row]:06d}.safetensors"
            state = self._state(points.theta[row], int(self._selection.starts[chain]))
            with open(self._path / name, "wb") as file:
                layout = {key: (str(value.dtype), value.shape) for key, value in state.items()}
                write_safetensors(file, layout, {**self._metadata, **about})
                for value in state.values():
                    file.write(np.ascontiguousarray(value).tobytes())

    def close(self) -> None:
        """Every file is complete already."""


class SafetensorsStacked:
    """One file: parameters with a leading axis of points, in the order walk then draw; the rest of the state once."""

    def __init__(self, path: Path, selection: Selection, attributes: dict[str, Any], state: State):
        self._selection, self._file = selection, open(path, "wb")
        walked = {parameter.name: parameter for parameter in selection.parameters}
        count = selection.chains * selection.draws
        dim = max(parameter.columns.stop for parameter in selection.parameters)
        fixed: dict[str, np.ndarray] = {}
        for start in sorted(set(selection.starts.tolist())):
            for name, value in state(np.zeros(dim, selection.dtype), start).items():
                if name not in walked and not np.array_equal(fixed.setdefault(name, value), value):
                    raise InputError(
                        f"{name} is not walked and differs between starts, so that points cannot be stacked. Export a "
                        "folder with one file a point instead: --out NAME without .safetensors"
                    )
        layout = {name: (selection.dtype, (count, *parameter.shape)) for name, parameter in walked.items()}
        layout |= {name: (kind, (count,)) for name, kind in (("walk", "int64"), *STATS.items()) if name not in layout}
        layout |= {name: (str(value.dtype), value.shape) for name, value in fixed.items()}
        metadata = {"format": "pt", "stacked": json.dumps(list(walked)), **{k: str(v) for k, v in attributes.items()}}
        self._begin = write_safetensors(self._file, layout, metadata)
        for name, value in fixed.items():
            self._file.seek(self._begin[name])
            self._file.write(np.ascontiguousarray(value).tobytes())

    def write(self, points: Points) -> None:
        """Store some points."""
        place = points.chain * self._selection.draws + points.draw
        numbers = {"walk": self._selection.walks[points.chain].astype(np.int64), **points.stats}
        for row, position in enumerate(place):
            for parameter in self._selection.parameters:
                self._at(parameter.name, int(position), np.ascontiguousarray(points.theta[row, parameter.columns]))
            for name, values in numbers.items():
                self._at(name, int(position), values[row : row + 1])

    def _at(self, name: str, position: int, values: np.ndarray) -> None:
        self._file.seek(self._begin[name] + position * values.nbytes)
        self._file.write(values.tobytes())

    def close(self) -> None:
        """Finish what was written."""
        self._file.close()
