"""Whether a Ray cluster answers at an address; found out without Ray, which takes seconds to import."""

from __future__ import annotations

import socket

from pipeline.errors import InputError

CONNECT_SECONDS = 10


def check_address(address: str) -> None:
    """Raises InputError where `cluster.address` is no address of a cluster, or nobody answers there."""
    if address.startswith(("http://", "https://")):
        raise InputError(f"cluster.address: {address} is a job server. Give HOST:6379 here, or use 'fiberwalk submit'.")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdigit():
        raise InputError(f"cluster.address must be HOST:PORT, ray://HOST:PORT or auto, got {address}")
    try:  # Ray itself would try for minutes
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise InputError(f"cluster.address: no Ray cluster answers at {address} ({error}).") from error
