"""Objects on a mounted file system: written aside, synced, and given their name by a link that refuses to replace."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from pipeline.backends.base import Entry, Truncated
from pipeline.errors import InputError

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_PAGE = 1000


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(handle)


def make_folders(folder: Path) -> list[Path]:
    """Create a folder with its parents, durably; return those that were not there, outermost first."""
    missing = [part for part in (folder, *folder.parents) if not part.exists()][::-1]
    folder.mkdir(parents=True, exist_ok=True)
    for part in missing:
        _sync_folder(part.parent)
    return missing


def _host() -> str:
    return socket.gethostname().replace(".", "-")


def _open_new(path: Path) -> IO[bytes]:
    """Open a new file; another process may remove its empty folder between the two calls, so ask a few times."""
    for _ in range(5):
        make_folders(path.parent)
        with contextlib.suppress(FileNotFoundError):
            return open(path, "x+b")
    return open(path, "x+b")


def _name_new(temporary: Path, target: Path) -> bool:
    """Give the finished file its name unless the name is taken."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # Without hard links two writers can both pass this test; the same key holds the same bytes, so either may stay.
        if target.exists():
            return False
        os.replace(temporary, target)
    return True


class LocalBackend:
    """A folder. See `pipeline.backends.base.Backend` for the meaning of each method."""

    def __init__(self, root: str):
        self.root = Path(root)

    def _target(self, path: str) -> Path:
        target = self.root / path
        if not target.resolve().is_relative_to(self.root.resolve()):
            raise InputError(f"{target} leaves {self.root} through a symbolic link. Use a place without such links.")
        return target

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        """Return bytes of an object."""
        try:
            file = open(self._target(path), "rb")
        except NotADirectoryError as error:  # a file where the root should be: the object is not there either
            raise FileNotFoundError(error.errno, error.strerror, error.filename) from None
        with file:
            file.seek(start)
            data = file.read(-1 if length is None else length)
        if length is not None and len(data) != length:
            raise Truncated(errno.EIO, f"{path} ends {length - len(data)} bytes too early")
        return data

    def tail(self, path: str, length: int) -> tuple[bytes, int]:
        """Return the end of an object, and its size."""
        size = self._target(path).stat().st_size
        return self.read(path, max(0, size - length)), size

    def size(self, path: str) -> int | None:
        """Return the size of an object or None."""
        try:
            return self._target(path).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def pages(self, prefix: str) -> Iterator[list[Entry]]:
        """Yield objects page by page; hidden names are not objects."""
        page: list[Entry] = []
        folders = [self.root / prefix if prefix else self.root]
        while folders:
            try:
                scan = os.scandir(folders.pop())
            except (FileNotFoundError, NotADirectoryError):
                continue
            with scan:
                for item in scan:
                    if item.name.startswith("."):
                        continue
                    if item.is_dir(follow_symlinks=False):
                        folders.append(Path(item.path))
                        continue
                    with contextlib.suppress(FileNotFoundError):  # deleted since the folder was read
                        page.append(Entry(os.path.relpath(item.path, self.root), item.stat().st_size))
                    if len(page) >= _PAGE:
                        yield page
                        page = []
        yield page

    @contextlib.contextmanager
    def _aside(self, target: Path) -> Iterator[tuple[Path, IO[bytes]]]:
        """Open a hidden file beside the target; it is gone afterwards whatever happens, short of a kill."""
        temporary = target.parent / f".{target.name}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        try:
            with _open_new(temporary) as file:
                yield temporary, file
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()

    def create(self, path: str, write: Callable[[IO[bytes]], None]) -> bool:
        """Commit a new object."""
        target = self._target(path)
        if target.exists():
            return False
        with self._aside(target) as (temporary, file):
            write(file)
            file.flush()
            os.fsync(file.fileno())
            new = _name_new(temporary, target)
        _sync_folder(target.parent)
        return new

    def replace(self, path: str, data: bytes) -> None:
        """Commit an object over whatever is there."""
        target = self._target(path)
        with self._aside(target) as (temporary, file):
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, target)
        _sync_folder(target.parent)

    def delete(self, path: str) -> None:
        """Remove an object."""
        target = self._target(path)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            target.unlink()
            _sync_folder(target.parent)

    def sweep(self, prefix: str, min_age: float) -> list[str]:
        """Remove temporary files whose writer is dead, or that are old."""
        removed = []
        for temporary in (self.root / prefix).rglob(".*.tmp"):
            if _abandoned(temporary, min_age):
                with contextlib.suppress(FileNotFoundError):
                    temporary.unlink()
                    removed.append(os.path.relpath(temporary, self.root))
        return sorted(removed)

    def arrow(self) -> tuple[Any, str]:
        """Return pyarrow's local file system and the root."""
        import pyarrow.fs

        return pyarrow.fs.LocalFileSystem(), str(self.root)


def _abandoned(temporary: Path, min_age: float) -> bool:
    """Whether the writer of a temporary file can no longer finish it."""
    parts = temporary.name.rsplit(".", 4)
    if len(parts) != 5 or not parts[2].isdigit():
        return False
    try:
        age = time.time() - temporary.stat().st_mtime
    except FileNotFoundError:
        return False
    ours = parts[1] == _host() and Path("/proc/self").exists()
    return (ours and not Path("/proc", parts[2]).exists()) or age > min_age
