"""What a run needs of Ray: an executor for shards and a trainer for the deformation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.config import Config
from pipeline.executor import Executor
from pipeline.fitting.job import Trainer
from workers.cluster import connected
from workers.trainer import train
from workers.walker import RayExecutor


@contextmanager
def on_ray(config: Config) -> Iterator[tuple[Executor, Trainer]]:
    """Connect to the configured cluster, or start one here, until the block ends.

    Raises:
        InputError: The cluster cannot be reached, or lacks what one actor needs.
    """
    with connected(config):
        yield RayExecutor(config), train
