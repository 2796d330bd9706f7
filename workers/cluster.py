"""Connecting to Ray: an embedded cluster of this machine, or one that runs already."""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import signal
import threading
import warnings
from collections.abc import Iterator

import ray

from pipeline.config import Config
from pipeline.errors import InputError
from workers.address import check_address

log = logging.getLogger("fiberwalk.ray")
_NICENESS = 5
"""Of embedded workers. Ray's own 15 starves them beside anything else that computes; its daemons still go first."""


@contextlib.contextmanager
def connected(config: Config) -> Iterator[None]:
    """Hold a connection to the cluster of `cluster.address`; an embedded one ends with the block.

    A connection that is open already is used and left open.

    Raises:
        InputError: The cluster cannot be reached, or lacks what one actor needs.
    """
    ours = not ray.is_initialized()
    if ours:
        _connect(config)
    try:
        _check_accelerators(config)
        yield
    finally:
        if ours:
            ray.shutdown()


def _connect(config: Config) -> None:
    _quieten()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray asks for an environment variable of its own to be set for every new default.
    with warnings.catch_warnings(), _own_signals():
        warnings.simplefilter("ignore")
        address = config.cluster.address or _job_address()
        if address is None:
            _start_embedded(config)
        else:
            _join(address)


def _quieten() -> None:
    """Send what Ray's daemons say to the log: Ray prints it on the standard output, where our results go.

    The name is private to Ray; without it the messages are seen, and nothing else changes.
    """
    internals = importlib.import_module("ray._private.worker")
    if hasattr(internals, "print_to_stdstream"):
        setattr(internals, "print_to_stdstream", lambda data, ignore_prefix: log.debug("%s", data))  # noqa: B010


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the handler of SIGTERM, which `ray.init` replaces: an interrupt must end the run in its own way."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)


def _job_address() -> str | None:
    """Inside a Ray job the cluster is the one that runs the job."""
    return "auto" if os.environ.get("RAY_JOB_ID") or os.environ.get("RAY_ADDRESS") else None


def _start_embedded(config: Config) -> None:
    os.environ.setdefault("RAY_worker_niceness", str(_NICENESS))
    # The environment, and with it the storage credentials, is inherited by the actors.
    ray.init(
        address="local",
        num_cpus=embedded_cpus(config),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.CRITICAL,
    )


def embedded_cpus(config: Config) -> int:
    """Logical processors of the embedded cluster: those of the machine, or more if the configuration needs more.

    Training needs one for each worker, one for its coordinator and one for reading.
    """
    actors = config.cluster.actors
    walking = config.cluster.cpus_per_actor * (1 if actors == "auto" else actors)
    return max(os.cpu_count() or 1, math.ceil(walking), config.deformation.workers + 2)


def _join(address: str) -> None:
    check_address(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"cluster.address: cannot join the Ray cluster at {address}: {reason}") from error


def _check_accelerators(config: Config) -> None:
    wanted, have = config.cluster.gpus_per_actor, ray.cluster_resources().get("GPU", 0)
    if wanted > have and config.cluster.address is None:
        raise InputError(
            f"cluster.gpus_per_actor is {wanted:g}, but Ray finds {have:g} here. Set it to 0, or give cluster.address."
        )
