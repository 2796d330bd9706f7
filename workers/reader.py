"""What a task of Ray Data reads. Without torch, so that its process starts at once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pipeline.fitting.stored import stored_rows
from pipeline.plan import BlockKey
from pipeline.storage import Storage
from pipeline.store import SampleStore


def rows_of(
    storage: Storage, marks: list[float] | None, items: dict[str, np.ndarray]
) -> Iterator[dict[str, np.ndarray]]:
    """Rows of the shards of one task; see `stored_rows`."""
    keys = [
        BlockKey(int(shard), int(block))
        for shard, blocks in zip(items["shard"], items["blocks"], strict=True)
        for block in blocks
    ]
    yield from stored_rows(SampleStore.open(storage), keys, marks)
