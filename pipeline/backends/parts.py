"""A large upload in parts, the first of which are on their way while the last are still being written."""

from __future__ import annotations

import contextlib
import io
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any

PART = 16 * 2**20
"""Bytes of one part of a large upload."""
_AT_ONCE = 4
"""Parts on their way, and in memory, at a time."""


class Parts:
    """One multipart upload. `send` the parts in order, then `finish`; else `abort`. Nothing is stored before `finish`.

    Args:
        request: Sends one request for the key with retries: (method, what for people, **arguments).
        once: The same without retries: (method, **arguments).
    """

    def __init__(self, request: Callable[..., dict[str, Any]], once: Callable[..., Any]):
        self._request, self._once = request, once
        self._upload: str = request("create_multipart_upload", "Beginning")["UploadId"]
        self._pool = ThreadPoolExecutor(_AT_ONCE, "part")
        self._on_way: deque[Future[dict[str, Any]]] = deque()
        self._done: list[dict[str, Any]] = []

    def send(self, body: bytes) -> None:
        """Take the next part; waits for the oldest where too many are on their way, and raises its failure."""
        number = len(self._done) + len(self._on_way) + 1
        self._on_way.append(self._pool.submit(self._send, number, body))
        if len(self._on_way) == _AT_ONCE:
            self._done.append(self._on_way.popleft().result())

    def _send(self, number: int, body: bytes) -> dict[str, Any]:
        answer = self._request(
            "upload_part", f"Writing part {number} of", UploadId=self._upload, PartNumber=number, Body=body
        )
        return {"PartNumber": number, "ETag": answer["ETag"]}

    def finish(self, **condition: str) -> None:
        """Make the object out of its parts."""
        while self._on_way:
            self._done.append(self._on_way.popleft().result())
        whole = {"Parts": self._done}
        self._once("complete_multipart_upload", UploadId=self._upload, MultipartUpload=whole, **condition)
        self._pool.shutdown()

    def abort(self) -> None:
        """Give up; what arrived is forgotten. Never raises: whoever aborts has an error to tell already."""
        self._pool.shutdown(cancel_futures=True)
        with contextlib.suppress(Exception):
            self._once("abort_multipart_upload", UploadId=self._upload)


class Ahead(io.RawIOBase):
    """Passes bytes on to a file and sends its first parts away as soon as they are surely final.

    A writer may go back at the end and change the last `PART` bytes (a checksum in a footer); further back it may not.
    """

    def __init__(self, file: IO[bytes], begin: Callable[[], Parts | None]):
        """`begin` starts the upload when the file turns out to be large; None if it need not be sent at all."""
        self._file, self._begin = file, begin
        self._sent, self._end, self._idle = 0, 0, False
        self.parts: Parts | None = None

    def writable(self) -> bool:
        """Yes."""
        return True

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As of the file."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """As of the file."""
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        """As of the file."""
        return self._file.read(size)

    def write(self, data: Any) -> int:
        """Take bytes; a failure of a part that is on its way is raised here."""
        place = self._file.tell()
        if place < self._sent:
            raise ValueError("Bytes that were sent already cannot be changed.")
        self._file.write(data)
        self._end = max(self._end, place + len(data))
        while not self._idle and self._end - self._sent > 2 * PART:
            self._send_part()
        return len(data)

    def _send_part(self) -> None:
        if self.parts is None:
            self.parts = self._begin()
            self._idle = self.parts is None
        if self.parts is not None:
            self._file.seek(self._sent)
            self.parts.send(self._file.read(PART))
            self._sent += PART
            self._file.seek(self._end)

    def send_rest(self) -> None:
        """Send what is left; the file must not be changed any more."""
        assert self.parts is not None
        self._file.seek(self._sent)
        while data := self._file.read(PART):
            self.parts.send(data)
            self._sent += len(data)
