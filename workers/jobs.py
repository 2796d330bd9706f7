"""Runs as Ray jobs over HTTP: submit, follow, stop, read the log.

No credential is ever sent: Ray may show a job's environment to everyone who sees its dashboard. The job takes its own
from the environment or the instance role of the cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import shlex
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from pipeline.config import Config, load_config
from pipeline.errors import InputError, RunError
from workers.package import is_here, stage

_CONNECT_SECONDS = 10
_RECONNECTS = 5
_ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
_NO_CREDENTIALS = "there are no credentials"


def submit(path: str, address: str, *, storage: str | None = None, overrides: Sequence[str] = ()) -> str:
    """Start a run on a cluster and return the job's name. What is already stored is not done again.

    Args:
        path: Configuration file.
        address: ``http://HOST:8265`` of the cluster's head.
        storage: A place that every node sees; None takes that of the configuration.
        overrides: Settings as ``a.b=value``.

    Raises:
        InputError: The configuration is wrong, the cluster cannot be reached or refuses, the same run is being
            computed there already, or it needs files that the cluster cannot see.
    """
    given = [] if storage is None else [f"storage={json.dumps(storage)}"]
    config = load_config(path, [*overrides, *given])
    client = _connect(address)
    with tempfile.TemporaryDirectory(prefix="fiberwalk-job-") as folder:
        storage = stage(config, Path(folder), remote=not is_here(address))
        _refuse_second(client, config, storage)
        job = f"{config.run_id}-{secrets.token_hex(3)}"
        command = f"python -m pipeline.cli run config.yaml --address auto --storage {shlex.quote(storage)} --quiet"
        with _told(address):
            return client.submit_job(
                entrypoint=command,
                submission_id=job,
                runtime_env={"working_dir": folder, "env_vars": {"PYTHONUNBUFFERED": "1"}},
                metadata={"run_id": config.run_id, "storage": storage},
            )


def what_now(job: str, address: str) -> str:
    """Lines that say how to look after a job."""
    client = _connect(address)
    with _told(address, job):
        told = client.get_job_info(job).metadata or {}
    run = f"{told.get('storage', '').rstrip('/')}/{told.get('run_id', '')}"
    return (
        f"progress: fiberwalk status {run}\nits log:  fiberwalk logs {job} --address {address}\n"
        f"end it:   fiberwalk stop {job} --address {address}\n"
    )


def follow(job: str, address: str, write: Callable[[str], None]) -> int:
    """Hand the job's log to `write` piece by piece until the job ends; return its exit status.

    0: every stage is done; 1, 2: as of ``fiberwalk run``; 130: somebody stopped it. Leaving this function by an
    exception leaves the job running.
    """
    client = _connect(address)
    seen = 0
    for attempt in range(_RECONNECTS + 1):
        try:
            seen = asyncio.run(_tail(client, job, write, seen))
        except KeyboardInterrupt:
            write(f"The job goes on by itself. End it with: fiberwalk stop {job} --address {address}\n")
            raise
        except (TimeoutError, RuntimeError, OSError) as error:
            if attempt == _RECONNECTS:
                raise RunError(
                    f"{address}: lost the log of {job} ({_line(error)}). The job goes on by itself."
                ) from error
        details = _settled(client, address, job)
        if details is not None:
            return _exit_status(client, details, job, write)
        time.sleep(2**attempt)
    raise RunError(f"{address}: the log of {job} ended, the job did not. Look at it with: fiberwalk logs {job}")


def stop(job: str, address: str) -> bool:
    """Ask a job to end; what it committed stays. False if it had ended before."""
    client = _connect(address)
    with _told(address, job):
        return client.stop_job(job)


def logs(job: str, address: str) -> str:
    """Return all that a job has written so far."""
    client = _connect(address)
    with _told(address, job):
        return client.get_job_logs(job)


def status(job: str, address: str) -> str:
    """Return PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    client = _connect(address)
    with _told(address, job):
        return client.get_job_status(job).value


def _connect(address: str) -> JobSubmissionClient:
    """Open the job server. An unreachable host must not hang: Ray's own requests have no time limit."""
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError as error:  # a bracket that is not closed, a port beyond 65535
        raise InputError(
            f"--address must be http://HOST:8265 (the head's job server), got {address}: {error}"
        ) from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"--address must be http://HOST:8265 (the head's job server), got {address}")
    if parts.username or parts.password:
        raise InputError("--address must not hold credentials. Give the cluster's token in RAY_AUTH_TOKEN.")
    port = port or (443 if parts.scheme == "https" else 8265)
    try:
        socket.create_connection((parts.hostname, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise InputError(
            f"no Ray cluster answers at {address} ({_line(error)}). "
            "Check that it runs, and that its job server (port 8265) can be reached from here."
        ) from error
    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    with _told(address), _without_ray_address():
        return JobSubmissionClient(f"{parts.scheme}://{parts.hostname}:{port}{parts.path.rstrip('/')}")


@contextlib.contextmanager
def _without_ray_address() -> Iterator[None]:
    """Ray prefers these variables to the address it is given; here the command line decides."""
    names = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextlib.contextmanager
def _told(address: str, job: str = "") -> Iterator[None]:
    """Failures of the job server become one line."""
    try:
        yield
    except AuthenticationError:
        raise InputError(
            f"the Ray cluster at {address} asks for a token. Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN (or "
            "RAY_AUTH_TOKEN_PATH) to the one that the cluster was started with."
        ) from None
    except (RuntimeError, OSError, ValueError) as error:
        text = _line(error)
        if job and "404" in text:
            raise InputError(f"the Ray cluster at {address} knows no job {job}") from None
        raise InputError(f"the Ray cluster at {address} refuses: {text}") from error


def _refuse_second(client: JobSubmissionClient, config: Config, storage: str) -> None:
    """Two jobs on one run would both be right, and one of them in vain."""
    with _told(storage):
        jobs = client.list_jobs()
    for other in jobs:
        same = other.metadata or {}
        if other.status not in _ENDED and (same.get("run_id"), same.get("storage")) == (config.run_id, storage):
            raise InputError(
                f"{config.run_id} is being computed by job {other.submission_id}. Follow it with "
                f"'fiberwalk logs {other.submission_id}', or stop it before it is submitted again."
            )


async def _tail(client: JobSubmissionClient, job: str, write: Callable[[str], None], seen: int) -> int:
    """Write the log beyond its first `seen` characters; return how much there is now."""
    position = 0
    async for piece in client.tail_job_logs(job):
        fresh = piece[max(0, seen - position) :]
        position += len(piece)
        if fresh:
            write(fresh)
            seen = max(seen, position)
    return seen


def _settled(client: JobSubmissionClient, address: str, job: str) -> JobDetails | None:
    """Return the ended job; its log may end a moment before it does."""
    for _ in range(20):
        with _told(address, job):
            details = client.get_job_info(job)
        if details.status in _ENDED:
            return details
        time.sleep(0.5)
    return None


def _exit_status(client: JobSubmissionClient, details: JobDetails, job: str, write: Callable[[str], None]) -> int:
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        return 130
    if details.driver_exit_code is None or details.driver_exit_code < 0:
        write(f"{job} failed: {details.message or 'Ray gives no reason'}\n")
        return 1
    if _NO_CREDENTIALS in client.get_job_logs(job):
        write("Credentials of this machine are not sent with a job: give them to the cluster's nodes.\n")
    return details.driver_exit_code


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
