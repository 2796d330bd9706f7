"""The sample store for other programs: ArviZ, safetensors, Parquet, npz; streamed, thinned, by radius, by parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.errors import InputError
from pipeline.stages.export_read import Points, Selection, State, read, select
from pipeline.stages.output import target
from pipeline.store import SampleStore

ENDINGS = {
    "arviz": (".nc", ".zarr"),
    "safetensors": (".safetensors", ""),
    "parquet": (".parquet",),
    "npz": (".npz",),
}
"""What the target's name may end with; an empty ending is a folder with one file a point."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    uri: str
    walks: int
    draws: int
    """Points a walk."""
    parameters: int
    """Numbers a point."""
    diverged: int
    """Walks left out because they diverged."""
    unfinished: int
    """Walks left out because blocks of theirs are missing."""

    @property
    def left_out(self) -> str:
        """A line that says so; empty where no walk was."""
        parts = [f"{self.diverged} diverged"] if self.diverged else []
        parts += [f"{self.unfinished} not finished ('fiberwalk run' goes on)"] if self.unfinished else []
        return f"Walks left out: {', '.join(parts)}.\n" if parts else ""


class Writer(Protocol):
    """Takes points in any order, each once."""

    def write(self, points: Points) -> None:
        """Store some points."""
        ...

    def close(self) -> None:
        """Finish the file."""
        ...


def export(
    run_uri: str,
    format: str,
    out_uri: str,
    *,
    radius: float | None = None,
    thin: int = 1,
    parameters: str | None = None,
    trust_code: bool = False,
) -> Exported:
    """Write recorded points of a run for downstream analysis, in constant memory.

    Walks that diverged are left out, and so are walks with blocks still to come. Formats that need a seekable file are
    put together in a temporary folder (TMPDIR) and uploaded when they are complete, if `out_uri` is not on disk.

    Args:
        run_uri: Address of the run.
        format: ``arviz`` (``.nc`` or ``.zarr``: chain = walk, draw = recorded point), ``safetensors`` (a folder: one
            complete state dict a point; ``.safetensors``: one file, points stacked), ``parquet`` (a row a point, a
            column a parameter) or ``npz``.
        out_uri: File or folder, on disk or on an object store; nothing may be there yet.
        radius: One point a walk, its record nearest to this drift; None: all records.
        thin: Every so manieth record, counted back from the last.
        parameters: Regular expression found anywhere in a parameter's name; None: all.
        trust_code: Let safetensors build a network that a stored configuration names as ``python:``.

    Raises:
        InputError: Unknown format, nothing selected, a target that exists or lies inside the run.
    """
    ending = check_format(format, out_uri)
    store = SampleStore.open(run_uri)
    selection = select(store, radius, thin, parameters)
    attributes = {"inference_library": "fiberwalk", "fiberwalk_run": store.storage.uri.rpartition("/")[2]}
    state = _state_dicts(run_uri, selection, trust_code) if format == "safetensors" else None
    with target(out_uri, inside=run_uri) as path:
        writer = _writer(format + ending, path, selection, attributes, state)
        for points in read(store, selection):
            writer.write(points)
        writer.close()
    numbers = sum(parameter.size for parameter in selection.parameters)
    return Exported(out_uri, selection.chains, selection.draws, numbers, selection.diverged, selection.unfinished)


def check_format(format: str, out_uri: str) -> str:
    """Return the ending of the target's name that belongs to the format. Raises InputError."""
    if format not in ENDINGS:
        raise InputError(f"--format must be one of {', '.join(ENDINGS)}, got {format}")
    for ending in ENDINGS[format]:
        if out_uri.rstrip("/").endswith(ending):
            return ending
    wanted = " or ".join(ENDINGS[format])
    raise InputError(f"--out must end with {wanted} for --format {format}, got {out_uri}")


def _writer(
    kind: str,
    path: Path,
    selection: Selection,
    attributes: dict[str, Any],
    state: State | None,
) -> Writer:
    from pipeline.stages import export_arrays, export_tables

    plain: dict[str, Callable[[Path, Selection, dict[str, Any]], Writer]] = {
        "arviz.nc": export_arrays.NetcdfWriter,
        "arviz.zarr": export_arrays.ZarrWriter,
        "npz.npz": export_arrays.NpzWriter,
        "parquet.parquet": export_tables.ParquetExport,
    }
    if state is None:
        return plain[kind](path, selection, attributes)
    stacked = kind.endswith(".safetensors")
    make = export_tables.SafetensorsStacked if stacked else export_tables.SafetensorsFolder
    return make(path, selection, attributes, state)


def _state_dicts(run_uri: str, selection: Selection, trust_code: bool) -> State:
    """Return a function from a position and its start to the state dict, or to the chosen parameters if not all are.

    What is not walked (frozen parameters, buffers) belongs to the start.
    """
    import torch
    from safetensors.torch import load

    from pipeline.build import MAP_FILES, bare_network, start_folder
    from pipeline.data.schema import DataSchema
    from pipeline.run import stored_config
    from pipeline.storage import Storage

    config, storage = stored_config(run_uri, trust_code=trust_code), Storage.open(run_uri)
    schema = DataSchema.from_json(storage.read_json("run.json")["data"])  # the data themselves need not be here
    networks = {}
    for start in sorted(set(selection.starts.tolist())):
        networks[start] = bare_network(config, schema, start, getattr(torch, selection.dtype))
        folder, name = start_folder(start), MAP_FILES[0]
        digest = storage.read_json(f"{folder}/map.json")["files"][name]
        networks[start].module.load_state_dict(load(storage.read_checked(f"{folder}/{name}", digest)))
    chosen = {parameter.name for parameter in selection.parameters}
    complete = len(chosen) == len(next(iter(networks.values())).layout.names)

    def state(theta: np.ndarray, start: int) -> dict[str, np.ndarray]:
        tensors = networks[start].state_dict(torch.from_numpy(np.array(theta)))
        return {name: value.numpy() for name, value in tensors.items() if complete or name in chosen}

    return state
