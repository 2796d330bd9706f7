"""Objects on S3 or anything that speaks it: one finished upload with If-None-Match is one commit."""

from __future__ import annotations

import datetime
import errno
import functools
import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, Any

from pipeline.backends.base import Entry, Patience, Truncated, passing, service_code
from pipeline.backends.parts import PART, Ahead, Parts

_TAKEN = {"PreconditionFailed", "412"}
_SPOOL = 128 * 2**20


def _taken(error: BaseException) -> bool:
    """Whether a conditional upload was refused since the name is taken."""
    return service_code(error) in _TAKEN or isinstance(error, FileExistsError)


@functools.lru_cache(maxsize=8)
def _connect(process: int, settings: tuple[tuple[str, str], ...], connect_timeout: float, read_timeout: float) -> Any:
    """Return one s3fs file system for each process and each set of credentials; making one takes half a second.

    It must not live through a fork, so the process is part of the key.
    """
    import s3fs

    config = {
        "connect_timeout": connect_timeout,
        "read_timeout": read_timeout,
        "retries": {"total_max_attempts": 1},
        "max_pool_connections": 16,
        # Every body is signed with its sha256; a checksum beside it would be taken over the same bytes again.
        "request_checksum_calculation": "when_required",
    }
    files = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True, config_kwargs=config)
    files.retries = 1  # retrying is done here, where an ambiguous answer can be told from a plain one
    return files


class S3Backend:
    """A bucket and prefix, through s3fs. See `pipeline.backends.base.Backend` for the meaning of each method."""

    def __init__(self, root: str, patience: Patience, connect_timeout: float = 10, read_timeout: float = 30):
        self.bucket, _, prefix = root.strip("/").partition("/")
        self.prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self._patience = patience
        self._timeouts = {"connect_timeout": connect_timeout, "read_timeout": read_timeout}

    def _connection(self) -> Any:
        settings = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
        return _connect(os.getpid(), settings, *self._timeouts.values())

    def request(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Send one request, without retries. Twice the time-outs is the limit for all of it, the body included."""
        limit = 2 * sum(self._timeouts.values())
        return self._connection().call_s3(method, Bucket=self.bucket, timeout=limit, **arguments)

    def read_bucket(self) -> None:
        """Ask for the bucket. Raises FileNotFoundError if there is none, PermissionError if listing is forbidden."""
        self._patience.retry(lambda _: self.request("list_objects_v2", MaxKeys=1), "Looking for the bucket")

    def _get(self, path: str, limits: str | None) -> tuple[bytes, int]:
        """Return a body, and the size of the whole object."""
        from fsspec.asyn import sync

        chosen = {"Range": limits} if limits else {}
        answer = self.request("get_object", Key=self.prefix + path, **chosen)
        try:
            body: Any = sync(self._connection().loop, answer["Body"].read, timeout=4 * sum(self._timeouts.values()))
        finally:
            answer["Body"].close()
        if len(body) != answer["ContentLength"]:
            raise Truncated(errno.EIO, f"{path}: {len(body)} of {answer['ContentLength']} bytes came")
        return body, int(answer.get("ContentRange", f"/{len(body)}").rsplit("/", 1)[1])

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        """Return bytes of an object, large ones piece by piece."""
        if length == 0:
            return b""
        last = "" if length is None else start + length - 1
        limits = None if start == 0 and length is None else f"bytes={start}-{last}"
        data = self._patience.retry(lambda _: self._get(path, limits), f"Reading {path}")[0]
        if length is not None and len(data) != length:
            raise Truncated(errno.EIO, f"{path} ends {length - len(data)} bytes too early")
        return data

    def tail(self, path: str, length: int) -> tuple[bytes, int]:
        """Return the end of an object and its size, in one request."""

        def attempt(_: int) -> tuple[bytes, int]:
            try:
                return self._get(path, f"bytes=-{length}")
            except OSError as error:
                if service_code(error) in ("InvalidRange", "416"):  # an empty object has no last bytes
                    return b"", 0
                raise

        return self._patience.retry(attempt, f"Reading {path}")

    def size(self, path: str) -> int | None:
        """Return the size of an object or None."""

        def head(_: int) -> int | None:
            try:
                return int(self.request("head_object", Key=self.prefix + path)["ContentLength"])
            except FileNotFoundError:
                return None

        return self._patience.retry(head, f"Looking for {path}")

    def pages(self, prefix: str) -> Iterator[list[Entry]]:
        """Yield objects in pages of a thousand."""
        start = self.prefix + (prefix.strip("/") + "/" if prefix.strip("/") else "")
        token: dict[str, Any] = {}
        while True:
            answer = self._patience.retry(
                lambda _, token=token: self.request("list_objects_v2", Prefix=start, MaxKeys=1000, **token),
                f"Listing {prefix or 'the storage'}",
            )
            found = [(item["Key"][len(self.prefix) :], item["Size"]) for item in answer.get("Contents", [])]
            yield [Entry(key, size) for key, size in found if key and not key.endswith("/")]
            if not answer.get("IsTruncated"):
                return
            token = {"ContinuationToken": answer["NextContinuationToken"]}

    def create(self, path: str, write: Callable[[IO[bytes]], None]) -> bool:
        """Commit a new object; what is written waits in memory, or in a temporary file if it is large.

        The parts of a large object leave while it is being written. The name is asked for first, since the condition
        would refuse a taken one only after the whole upload.
        """
        taken = False

        def begin() -> Parts | None:
            nonlocal taken
            taken = self.size(path) is not None
            return None if taken else self._parts(path)

        with tempfile.SpooledTemporaryFile(max_size=_SPOOL) as file:
            ahead = Ahead(file, begin)  # type: ignore[arg-type]
            try:
                write(ahead)  # type: ignore[arg-type]
            except BaseException:
                if ahead.parts is not None:
                    ahead.parts.abort()
                raise
            return False if taken else self._upload(path, file, {"IfNoneMatch": "*"}, ahead)  # type: ignore[arg-type]

    def replace(self, path: str, data: bytes) -> None:
        """Commit an object over whatever is there."""
        self._upload(path, io.BytesIO(data), {})

    def _upload(self, path: str, file: IO[bytes], condition: dict[str, str], ahead: Ahead | None = None) -> bool:
        size = file.seek(0, io.SEEK_END)
        doubt = False

        def attempt(number: int) -> bool:
            nonlocal doubt
            try:
                if size <= 2 * PART:
                    file.seek(0)
                    self.request("put_object", Key=self.prefix + path, Body=file.read(), **condition)
                else:
                    begun = ahead if ahead is not None and number == 0 else None
                    self._upload_parts(path, begun or Ahead(file, lambda: None), condition)
                return True
            except Exception as error:
                if condition and _taken(error):
                    # After a lost answer the object in the way may be our own, committed before the line broke.
                    return doubt and self._holds(path, file, size)
                if doubt and service_code(error) == "NoSuchUpload" and self._holds(path, file, size):
                    return True
                doubt = doubt or passing(error)
                raise

        return self._patience.retry(attempt, f"Writing {path}")

    def _upload_parts(self, path: str, ahead: Ahead, condition: dict[str, str]) -> None:
        ahead.parts = ahead.parts or self._parts(path)
        try:
            ahead.send_rest()
            ahead.parts.finish(**condition)
        except BaseException:
            ahead.parts.abort()
            raise

    def _parts(self, path: str) -> Parts:
        once = functools.partial(self.request, Key=self.prefix + path)

        def request(method: str, what: str, **arguments: Any) -> dict[str, Any]:
            return self._patience.retry(lambda _: once(method, **arguments), f"{what} {path}")

        return Parts(request, once)

    def _holds(self, path: str, file: IO[bytes], size: int) -> bool:
        """Whether the stored object has exactly the bytes of `file`."""
        if self.size(path) != size:
            return False
        file.seek(0)
        for start in range(0, size, PART):
            piece = file.read(min(PART, size - start))
            if hashlib.sha256(self.read(path, start, len(piece))).digest() != hashlib.sha256(piece).digest():
                return False
        return True

    def delete(self, path: str) -> None:
        """Remove an object."""
        self._patience.retry(lambda _: self.request("delete_object", Key=self.prefix + path), f"Deleting {path}")

    def sweep(self, prefix: str, min_age: float) -> list[str]:
        """Abort uploads that were never finished."""
        removed = []
        answer = self._patience.retry(
            lambda _: self.request("list_multipart_uploads", Prefix=self.prefix + prefix), "Listing unfinished uploads"
        )
        now = datetime.datetime.now(datetime.UTC)
        for item in answer.get("Uploads", []):
            if (now - item["Initiated"]).total_seconds() > min_age:
                self.request("abort_multipart_upload", Key=item["Key"], UploadId=item["UploadId"])
                removed.append(item["Key"][len(self.prefix) :])
        return removed

    def arrow(self) -> tuple[Any, str]:
        """Return a pyarrow view of a second connection, which retries by itself."""
        import pyarrow.fs
        import s3fs

        files = s3fs.S3FileSystem(use_listings_cache=False, config_kwargs=self._timeouts)
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(files)), f"{self.bucket}/{self.prefix}".rstrip("/")
