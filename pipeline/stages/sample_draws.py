"""Posterior draws of the deformation model as a Parquet file, streamed."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.posterior import DrawBatch, Posterior
from pipeline.stages.output import target

ROW_GROUP_BYTES = 16 * 2**20


def sample_draws(
    run_uri: str,
    draws: int,
    out_uri: str,
    *,
    seed: int = 0,
    radius: float | None = None,
    potential: bool = False,
    trust_code: bool = False,
) -> None:
    """Write the draws of `Posterior.draw` to a Parquet file, in constant memory.

    Columns: `draw` int64, `start` int16 (the MAP estimate it lies around), `learned` bool (false for a draw of the
    Gaussian of the walks' points, see `deformation.gaussian_share`), `potential` float64 in nats if asked for, and
    `theta`, a fixed-shape tensor of D numbers. Names and shapes of the parameters stand in the file's metadata.

    Args:
        run_uri: Address of a finished run.
        draws: How many.
        out_uri: A new .parquet file, on disk or on an object store.
        seed: The same seed gives the same draws.
        radius: Units of the parameters; None takes the one that was chosen for each model, as the metadata say.
        potential: Add the potential of each draw, a forward pass over the training rows.
        trust_code: Allow a stored configuration to import the Python code that it names.

    Raises:
        InputError: There is no deformation model, the radius was not walked, or the target exists.
    """
    if not out_uri.endswith(".parquet"):
        raise InputError(f"--out must end with .parquet, got {out_uri}")
    if draws < 1:
        raise InputError(f"--draws must be at least 1, got {draws}")
    with target(out_uri, inside=run_uri) as path:
        posterior = Posterior.load(run_uri, trust_code=trust_code)
        batches = posterior.draw_batches(draws, seed, radius, potential=potential)
        first = next(batches)
        own = {"radius": posterior.radius, "gaussian_radius": posterior.facts["radius"]}
        radii = own if radius is None else dict.fromkeys(own, radius)
        schema = _schema(posterior, first, {"seed": seed} | radii)
        group = max(1, ROW_GROUP_BYTES // (posterior.dim * first.theta.element_size()))
        options: dict[str, Any] = {"use_dictionary": False, "write_statistics": ["draw", "start"]}
        with pq.ParquetWriter(path, schema, **options) as writer:
            written = 0
            for batch in itertools.chain([first], batches):
                written = _write(writer, schema, batch, written, group)


def _schema(posterior: Posterior, batch: DrawBatch, facts: dict[str, Any]) -> pa.Schema:
    kind = pa.from_numpy_dtype(batch.theta.numpy().dtype)
    fields = [pa.field("draw", pa.int64()), pa.field("start", pa.int16()), pa.field("learned", pa.bool_())]
    if batch.potential is not None:
        fields.append(pa.field("potential", pa.float64()))
    fields.append(pa.field("theta", pa.fixed_shape_tensor(kind, (posterior.dim,))))
    metadata = {f"fiberwalk.{name}": str(value) for name, value in facts.items()}
    metadata["fiberwalk.run_id"] = posterior.store.run_id
    metadata["fiberwalk.parameters"] = json.dumps(posterior.store.plan.parameters)
    return pa.schema(fields, metadata=metadata)


def _write(writer: pq.ParquetWriter, schema: pa.Schema, batch: DrawBatch, written: int, group: int) -> int:
    theta = batch.theta.numpy()
    for low in range(0, len(theta), group):
        part = theta[low : low + group]
        rows = slice(low, low + len(part))
        value = schema.field("theta").type
        flat = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(part).reshape(-1)), value.shape[0])
        columns: list[pa.Array] = [
            pa.array(np.arange(written, written + len(part))),
            pa.array(batch.start[rows].astype(np.int16)),
            pa.array(batch.learned[rows]),
        ]
        if batch.potential is not None:
            columns.append(pa.array(batch.potential[rows]))
        columns.append(pa.ExtensionArray.from_storage(value, flat))
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema), row_group_size=group)
        written += len(part)
    return written
