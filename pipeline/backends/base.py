"""What a storage place must offer, and how failures of a place are sorted: try again, or say what is wrong."""

from __future__ import annotations

import errno
import http.client
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, Protocol, TypeVar

from pipeline.errors import RunError

T = TypeVar("T")
SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")
_PASSING_CODES = {
    "500", "502", "503", "504", "InternalError", "ServiceUnavailable", "SlowDown", "RequestTimeout", "Throttling",
    "ThrottlingException", "OperationAborted", "ConditionalRequestConflict", "IncompleteBody", "BadDigest",
    "XAmzContentSHA256Mismatch", "TooManyRequests", "429", "408",
}  # fmt: skip
_PASSING_ERRNO = {errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ETIMEDOUT, errno.ESTALE} | {
    getattr(errno, "EREMOTEIO", errno.EBUSY)
}
_FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_PASSING_NAMES = {  # by name, so that no optional client library is imported here
    "HTTPClientError", "ConnectionError", "EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError",
    "ConnectionClosedError", "ResponseParserError", "ResponseStreamingError", "IncompleteReadError", "ClientError",
    "FSTimeoutError", "HttpError", "TransportError", "AioHttpClientError",
}  # fmt: skip


class Truncated(OSError):
    """Fewer bytes came than were announced."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored object."""

    path: str
    """Relative to the storage root, with forward slashes."""
    size: int
    """In bytes."""


class Backend(Protocol):
    """Bytes under one root. Paths are relative, checked by the caller, with forward slashes."""

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        """Return bytes from `start`; all of `length`, or an error. Raises FileNotFoundError."""
        ...

    def tail(self, path: str, length: int) -> tuple[bytes, int]:
        """Return at most the last `length` bytes and the size of the whole. Raises FileNotFoundError."""
        ...

    def size(self, path: str) -> int | None:
        """Return the size in bytes, None if there is no such object."""
        ...

    def pages(self, prefix: str) -> Iterator[list[Entry]]:
        """Yield all objects whose path begins with the folder `prefix`, page by page."""
        ...

    def create(self, path: str, write: Callable[[IO[bytes]], None]) -> bool:
        """Commit what `write` writes in one step; False if the name is taken by other bytes."""
        ...

    def replace(self, path: str, data: bytes) -> None:
        """Commit `data` in one step whether or not the name is taken."""
        ...

    def delete(self, path: str) -> None:
        """Remove an object; nothing happens if it is not there."""
        ...

    def sweep(self, prefix: str, min_age: float) -> list[str]:
        """Remove what killed writers left half-written, if older than `min_age` seconds; return their names."""
        ...

    def arrow(self) -> tuple[Any, str]:
        """Return a pyarrow file system and the root's path on it."""
        ...


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what caused it, outermost first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def service_code(error: BaseException) -> str | None:
    """Return the error code that an object store answered with, for example ``AccessDenied``."""
    for cause in causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return None


def passing(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later."""
    if isinstance(error, Truncated):
        return True
    code = service_code(error)
    if code is not None:
        return code in _PASSING_CODES
    if isinstance(error, _FINAL):
        return False
    for cause in causes(error):
        if isinstance(cause, TimeoutError | ConnectionError | http.client.HTTPException):
            return True
        if isinstance(cause, OSError) and cause.errno in _PASSING_ERRNO:
            return True
        if _PASSING_NAMES & {kind.__name__ for kind in type(cause).__mro__}:
            return True
        if type(cause).__module__.startswith("aiohttp"):
            return True
    return False


def scrub(text: str) -> str:
    """Return `text` on one line and without any credential of the environment."""
    for name in SECRETS:
        value = os.environ.get(name, "")
        if len(value) >= 4:
            text = text.replace(value, f"<{name}>")
    text = re.sub(r"(?i)(x-amz-(?:signature|credential|security-token)=)[^&\s\"']+", r"\1<hidden>", text)
    text = re.sub(r"://[^/@\s]+:[^/@\s]+@", "://<hidden>@", text)
    return " ".join(text.split())


def describe(error: BaseException) -> str:
    """Return one line that says what went wrong at a storage place."""
    code = service_code(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full"
    if isinstance(error, OSError) and error.errno == errno.EDQUOT:
        return "the disk quota is used up"
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return "the file size limit of this process is reached"
    reason = str(error) or type(error).__name__
    return scrub(f"{code}: {reason}" if code and code not in reason else reason)[:300]


class Patience:
    """How long a place may be silent before we give up: per operation, or once for all that follows."""

    def __init__(self, seconds: float, *, in_total: bool = False):
        self._seconds = seconds
        self._end = time.monotonic() + seconds if in_total else None
        self._random = random.Random()

    def deadline(self) -> float:
        """Return the monotonic time at which an operation that starts now is given up."""
        return time.monotonic() + self._seconds if self._end is None else self._end

    def retry(self, call: Callable[[int], T], what: str) -> T:
        """Call `call(attempt)` until it answers; exponential pauses with jitter between passing failures.

        Raises:
            RunError: Passing failures went on beyond the deadline. Failures that will not pass are raised as they are.
        """
        end = self.deadline()
        attempt = 0
        while True:
            try:
                return call(attempt)
            except Exception as error:
                pause = min(8.0, 0.1 * 2**attempt) * self._random.uniform(0.5, 1.0)
                if not passing(error):
                    raise
                if time.monotonic() + pause > end:
                    message = f"{what} failed {attempt + 1} times: {describe(error)}. "
                    raise RunError(message + "What is committed stays; run again.") from error
            time.sleep(pause)
            attempt += 1
