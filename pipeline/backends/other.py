"""Objects on any other fsspec file system, for example Google Cloud Storage or Azure."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, Any

from pipeline.backends.base import Entry, Patience, Truncated
from pipeline.errors import InputError


class OtherBackend:
    """A folder of an fsspec file system. See `pipeline.backends.base.Backend` for the meaning of each method."""

    def __init__(self, uri: str, patience: Patience):
        self._uri, self._patience = uri, patience
        self._files: Any = None
        self._process = 0

    def _place(self, path: str) -> tuple[Any, str]:
        import fsspec

        if self._files is None or self._process != os.getpid():
            try:
                self._files, self._root = fsspec.core.url_to_fs(self._uri, use_listings_cache=False)
            except (ValueError, ImportError) as error:  # a kind of place that is not known, or needs another package
                raise InputError(
                    f"{self._uri} cannot be opened: {error}. Use a folder or s3://bucket/prefix."
                ) from error
            self._process = os.getpid()
        return self._files, f"{self._root.rstrip('/')}/{path}" if path else self._root

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        """Return bytes of an object."""
        files, name = self._place(path)
        end = None if length is None else start + length
        data = self._patience.retry(lambda _: files.cat_file(name, start=start, end=end), f"Reading {path}")
        if length is not None and len(data) != length:
            raise Truncated(errno.EIO, f"{path} ends {length - len(data)} bytes too early")
        return data

    def tail(self, path: str, length: int) -> tuple[bytes, int]:
        """Return the end of an object, and its size."""
        size = self.size(path)
        if size is None:
            raise FileNotFoundError(errno.ENOENT, "no such object", path)
        return self.read(path, max(0, size - length)), size

    def size(self, path: str) -> int | None:
        """Return the size of an object or None."""
        files, name = self._place(path)
        try:
            found = self._patience.retry(lambda _: files.info(name), f"Looking for {path}")
        except FileNotFoundError:
            return None
        return None if found["type"] == "directory" else int(found["size"])

    def pages(self, prefix: str) -> Iterator[list[Entry]]:
        """Yield objects, all in one page."""
        files, name = self._place(prefix)
        _, root = self._place("")
        found = self._patience.retry(lambda _: files.find(name, detail=True), f"Listing {prefix}")
        paths = {path[len(root.rstrip("/")) + 1 :]: int(info["size"] or 0) for path, info in found.items()}
        yield [Entry(path, size) for path, size in paths.items() if path]

    def create(self, path: str, write: Callable[[IO[bytes]], None]) -> bool:
        """Commit a new object if the file system can refuse an existing name."""
        with tempfile.NamedTemporaryFile() as file:
            write(file)  # type: ignore[arg-type]
            file.flush()
            return self._upload(path, file.name)

    def _upload(self, path: str, source: str) -> bool:
        files, name = self._place(path)

        def attempt(number: int) -> bool:
            with contextlib.suppress(FileExistsError):
                files.put_file(source, name, mode="create")
                return True
            with open(source, "rb") as file:
                return number > 0 and files.cat_file(name) == file.read()

        return self._patience.retry(attempt, f"Writing {path}")

    def replace(self, path: str, data: bytes) -> None:
        """Commit an object over whatever is there."""
        files, name = self._place(path)
        self._patience.retry(lambda _: files.pipe_file(name, data), f"Writing {path}")

    def delete(self, path: str) -> None:
        """Remove an object."""
        files, name = self._place(path)
        with contextlib.suppress(FileNotFoundError):
            self._patience.retry(lambda _: files.rm_file(name), f"Deleting {path}")

    def sweep(self, prefix: str, min_age: float) -> list[str]:
        """Nothing is left half-written where an upload is one request."""
        return []

    def arrow(self) -> tuple[Any, str]:
        """Return a pyarrow view."""
        import pyarrow.fs

        files, root = self._place("")
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(files)), root.rstrip("/")
