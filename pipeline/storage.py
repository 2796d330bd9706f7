"""Bytes under one root, on a disk or an object store. One object is one commit, and the first writer of a name wins."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar, cast

from pipeline.backends.base import Backend, Entry, Patience, causes, describe, passing, scrub, service_code
from pipeline.backends.local import LocalBackend, make_folders
from pipeline.backends.other import OtherBackend
from pipeline.backends.s3 import S3Backend
from pipeline.documents import Damaged, decode, sealed
from pipeline.errors import InputError, RunError

__all__ = ["Entry", "Storage"]
T = TypeVar("T")
Entries = list[Entry]
Names = list[str]
PATIENCE = float(os.environ.get("FIBERWALK_STORAGE_PATIENCE", "120"))
"""Seconds for which an operation is tried again while its place gives passing errors."""
_TAIL = 2**18
"""Bytes from the end that opening an object brings: small objects whole, and the footers of large ones."""
CHECK_PATIENCE = 12.0
"""The same for the test whether a place can be written, in total; it must end within 30 s."""
_ADVICE = {
    "NoSuchBucket": "There is no such bucket. Create it first, or name another.",
    "SignatureDoesNotMatch": "The secret key is wrong. Check AWS_SECRET_ACCESS_KEY.",
    "InvalidAccessKeyId": "The access key is not known there. Check AWS_ACCESS_KEY_ID.",
    "ExpiredToken": "The session token has expired. Renew AWS_SESSION_TOKEN.",
    "AccessDenied": "These credentials may not write there. Ask for write permission, or name another place.",
    "RequestTimeTooSkewed": "The clock of this machine is wrong. Set it, for example by NTP.",
}


def _normal(uri: str) -> tuple[str, str]:
    """Return (protocol, URI without a trailing slash); a local path becomes absolute."""
    if not uri or "\0" in uri:
        raise InputError("The storage place is empty. Give a folder or a URI such as s3://bucket/prefix.")
    protocol, separator, rest = uri.partition("://")
    if not separator or protocol in ("file", "local"):
        return "file", os.path.abspath(os.path.expanduser(rest if separator else uri))
    if "@" in rest.split("/")[0]:
        raise InputError(f"{scrub(uri)} holds credentials. They belong in the environment, never in a storage place.")
    if protocol in ("s3", "s3a") and not rest.strip("/"):
        raise InputError(f"{uri} names no bucket. Use s3://bucket/prefix.")
    return ("s3" if protocol == "s3a" else protocol), uri.rstrip("/")


def _relative(path: str) -> str:
    """Return a path that stays below the root."""
    parts = path.split("/")
    if path.startswith("/") or "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise InputError(f"'{path}' is not a plain relative path. Use no '..' and no '//'.")
    return path


class Storage:
    """One root and the objects below it. Picklable: another process opens its own connection.

    Missing objects raise FileNotFoundError; a place that stays broken raises RunError with one line.
    """

    def __init__(self, uri: str):
        self.protocol, self.uri = _normal(uri)
        self._opened: Backend | None = None

    @classmethod
    def open(cls, uri: str) -> Storage:
        """Open a local folder, ``s3://bucket/prefix`` or any fsspec URI. Nothing is touched until it is used."""
        return cls(uri)

    def __reduce__(self) -> tuple[Any, ...]:
        return Storage, (self.uri,)

    def __repr__(self) -> str:
        return f"Storage({self.uri!r})"

    def child(self, path: str) -> Storage:
        """Return the storage below a folder of this one."""
        return Storage(f"{self.uri}/{_relative(path)}")

    def _backend(self) -> Backend:
        if self._opened is None:
            self._opened = self._connect(Patience(PATIENCE))
        return self._opened

    def _connect(self, patience: Patience, connect_timeout: float = 10, read_timeout: float = 30) -> Backend:
        if self.protocol == "file":
            return LocalBackend(self.uri)
        if self.protocol == "s3":
            endpoint = os.environ.get("AWS_ENDPOINT_URL") or "https://"
            if not endpoint.startswith(("http://", "https://")):
                raise InputError(f"AWS_ENDPOINT_URL must begin with http:// or https://, got {scrub(endpoint)}")
            return S3Backend(self.uri.split("://", 1)[1], patience, connect_timeout, read_timeout)
        return OtherBackend(self.uri, patience)

    def _guard(self, call: Callable[[], T], what: str) -> T:
        """Run an operation; failures of the place become one line."""
        try:
            return call()
        except (InputError, RunError, FileNotFoundError):
            raise
        except Exception as error:
            if not isinstance(error, OSError) and service_code(error) is None and not _of_client(error):
                raise
            message = f"{what} in {self.uri}: {describe(error)}. "
            raise RunError(message + "What is committed stays; mend it, then run again.") from error

    def read(self, path: str) -> bytes:
        """Return a whole object."""
        return self._guard(lambda: self._backend().read(_relative(path)), f"Cannot read {path}")

    def read_checked(self, path: str, sha256: str) -> bytes:
        """Return a whole object; raises RunError if it is missing or its digest is not the one that is expected."""
        data = self.read(path) if self.exists(path) else None
        if data is None or hashlib.sha256(data).hexdigest() != sha256:
            raise RunError(
                f"{self.uri}/{path} is {'missing' if data is None else 'damaged: its sha256 is not the recorded one'}. "
                f"Run 'fiberwalk verify {self.uri} --repair', then run again."
            )
        return data

    def read_range(self, path: str, start: int, length: int) -> bytes:
        """Return exactly `length` bytes from byte `start`."""
        return self._guard(lambda: self._backend().read(_relative(path), start, length), f"Cannot read {path}")

    def size(self, path: str) -> int | None:
        """Return the size of an object in bytes, None if it is not there."""
        return self._guard(lambda: self._backend().size(_relative(path)), f"Cannot look for {path}")

    def exists(self, path: str) -> bool:
        """Whether there is such an object (a folder is not an object)."""
        return self.size(path) is not None

    def list(self, prefix: str = "", suffix: str = "") -> Entries:
        """Return the objects below the folder `prefix` whose names end with `suffix`, sorted by path."""
        folder = _relative(prefix.rstrip("/")) if prefix else ""

        def collect() -> Entries:
            entries = (entry for page in self._backend().pages(folder) for entry in page)
            return [entry for entry in entries if entry.path.endswith(suffix) and not _hidden(entry.path)]

        try:
            return sorted(self._guard(collect, f"Cannot list {prefix or 'objects'}"), key=lambda entry: entry.path)
        except FileNotFoundError as error:  # a folder without objects is an empty list, a bucket is not
            raise InputError(f"{self.uri} cannot be listed: {describe(error)}. Name a place that exists.") from error

    def create(self, path: str, data: bytes) -> bool:
        """Commit a new object. False: the name was taken, and nothing changed."""
        return self.create_from(path, lambda file: cast(None, file.write(data)))

    def create_from(self, path: str, write: Callable[[BinaryIO], None]) -> bool:
        """Commit a new object that `write` streams to a seekable file. False: the name was taken."""
        sink = cast(Callable[[IO[bytes]], None], write)
        return self._guard(lambda: self._backend().create(_relative(path), sink), f"Cannot write {path}")

    def replace(self, path: str, data: bytes) -> None:
        """Commit an object over an older one; for outputs that can be rebuilt from other objects, and only those."""
        self._guard(lambda: self._backend().replace(_relative(path), data), f"Cannot write {path}")

    def delete(self, path: str) -> None:
        """Remove an object; nothing happens if it is not there."""
        self._guard(lambda: self._backend().delete(_relative(path)), f"Cannot delete {path}")

    def sweep(self, prefix: str = "", min_age: float = 3600) -> Names:
        """Remove what killed writers left half-written; return the names. Unfinished writes are never objects."""
        return self._guard(lambda: self._backend().sweep(prefix, min_age), "Cannot sweep")

    def open_input(self, path: str) -> BinaryIO:
        """Open an object for reading in pieces, each piece retried by itself. Raises FileNotFoundError."""
        if self.protocol == "file":
            return self._guard(lambda: open(Path(self.uri, _relative(path)), "rb"), f"Cannot read {path}")
        tail, size = self._guard(lambda: self._backend().tail(_relative(path), _TAIL), f"Cannot read {path}")
        if len(tail) == size:
            return io.BytesIO(tail)
        return cast(BinaryIO, io.BufferedReader(_Pieces(self, path, size, tail), 2**20))

    def arrow_filesystem(self) -> tuple[Any, str]:
        """Return (pyarrow.fs.FileSystem, path of the root on it)."""
        return self._backend().arrow()

    def read_json(self, path: str, *, strict: bool = True) -> Any:
        """Return a decoded JSON object; with `strict` only as `create_json` or `replace_json` wrote it."""
        try:
            return decode(self.read(path), path=path, strict=strict)
        except Damaged as error:
            raise RunError(
                f"{self.uri}/{path} is damaged: {error}. Run 'fiberwalk verify {self.uri} --repair', then run again."
            ) from None

    def create_json(self, path: str, value: Any) -> bool:
        """Commit a value as a new JSON object with its seal; see `create` and `pipeline.documents`."""
        return self.create(path, sealed(value))

    def replace_json(self, path: str, value: Any) -> None:
        """Commit a value as JSON with its seal over an older one; see `replace`."""
        self.replace(path, sealed(value))

    def check_writable(self) -> None:
        """Write and delete a small object within 30 s, leaving no trace.

        Raises:
            InputError: It cannot be done; one line says why and what to change.
        """
        name = f".fiberwalk-{secrets.token_hex(4)}.probe"
        made: Sequence[Path] = ()
        try:
            if self.protocol == "file":
                made = make_folders(Path(self.uri))
            backend = self._connect(Patience(CHECK_PATIENCE, in_total=True), connect_timeout=3, read_timeout=4)
            if isinstance(backend, S3Backend):
                _find_bucket(backend)
            try:
                backend.create(name, lambda file: cast(None, file.write(bytes(4096))))
            finally:
                backend.delete(name)
        except Exception as error:
            if not isinstance(error, OSError | RunError | ImportError | ValueError) and not _of_client(error):
                raise
            raise InputError(self._refusal(error)) from error
        finally:
            for folder in reversed(made):
                if not any(folder.iterdir()):
                    folder.rmdir()

    def _refusal(self, error: BaseException) -> str:
        """Say in one line why the place cannot be used."""
        start = f"storage: cannot write to {self.uri}: "
        codes = [service_code(cause) for cause in causes(error)]
        for code in codes:
            if code in _ADVICE:
                return start + _ADVICE[code]
        if any(type(cause).__name__ in ("NoCredentialsError", "PartialCredentialsError") for cause in causes(error)):
            return start + "no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment."
        if isinstance(error, NotADirectoryError | FileExistsError):
            return start + "a file is in the way. Name a folder."
        if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno == errno.EROFS):
            return start + f"it is read-only here ({describe(error)}). Ask for write permission, or name another place."
        if isinstance(error, RunError) or passing(error):
            inner = describe(error.__cause__ or error)
            return start + f"it does not answer ({inner}). Check AWS_ENDPOINT_URL and the network."
        return start + f"{describe(error)}. Make it writable, or name another place."


def _find_bucket(backend: S3Backend) -> None:
    """Raise FileNotFoundError with the code NoSuchBucket if there is none: some servers would create it."""
    try:
        backend.read_bucket()
    except PermissionError:
        return  # listing may be forbidden where writing is allowed


def _of_client(error: BaseException) -> bool:
    """Whether a storage client raised this, rather than a defect of ours."""
    package = type(error).__module__.split(".")[0]
    return package in ("botocore", "aiobotocore", "aiohttp", "s3fs", "fsspec", "gcsfs", "adlfs")


def _hidden(path: str) -> bool:
    return path.rsplit("/", 1)[-1].startswith(".")


class _Pieces(io.RawIOBase):
    """A stored object as a seekable file; a read before its tail is one ranged request."""

    def __init__(self, storage: Storage, path: str, size: int, tail: bytes):
        self._storage, self._path, self._size, self._position = storage, path, size, 0
        self._tail, self._tail_start = tail, size - len(tail)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._position))
        if count:
            first = self._position - self._tail_start
            inside = self._tail[first : first + count] if first >= 0 else None
            buffer[:count] = inside or self._storage.read_range(self._path, self._position, count)
            self._position += count
        return count
