"""A checksum of a whole Parquet object inside the object itself, so that one upload is still one commit.

The last field of the footer is a CRC-32 of all bytes with that field zeroed: a flip of any byte is found, in data, page
headers and footer alike. The field has a fixed length and is filled in after the rest is written.
"""

from __future__ import annotations

import io
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

_SEAL = b"fiberwalk.crc32"
_EMPTY = b"crc32:00000000"
OPEN_SEAL = {_SEAL.decode(): _EMPTY.decode()}
"""Metadata field to be written last in the footer."""
_PIECE = 16 * 2**20
_WAITING = 8
"""Writes that may wait for the disk; each has the size of a page."""


class BrokenBlock(Exception):
    """A stored block is not what was written. The message says what is wrong with it."""


class Sealing(io.RawIOBase):
    """Passes bytes on to a seekable file and seals it at the end; a context manager.

    Summing and writing happen in a thread of their own, beside the encoding.
    """

    def __init__(self, file: BinaryIO):
        self._file, self._crc, self._count = file, 0, 0
        self._pool, self._waiting = ThreadPoolExecutor(1, "seal"), deque[Future[None]]()

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            if kind is None:
                while self._waiting:
                    self._waiting.popleft().result()
                _seal(self._file, self._crc)
        finally:
            self._pool.shutdown()

    def __enter__(self) -> Sealing:
        return self

    def writable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Return the bytes taken so far."""
        return self._count

    def write(self, data: Any) -> int:
        """Take bytes; a failure of an earlier write is raised here or at the end."""
        self._waiting.append(self._pool.submit(self._put, data))
        if len(self._waiting) > _WAITING:
            self._waiting.popleft().result()
        self._count += len(data)
        return len(data)

    def _put(self, data: Any) -> None:
        self._crc = zlib.crc32(data, self._crc)
        self._file.write(data)

    def close(self) -> None:
        """Leave the file underneath open: it still has to be sealed."""


def _footer(tail: bytes) -> bytes:
    """Return the footer out of the last bytes of an object; raises BrokenBlock."""
    if len(tail) < 12 or tail[-4:] != b"PAR1":
        raise BrokenBlock("truncated: it does not end like a Parquet file")
    length = int.from_bytes(tail[-8:-4], "little")
    if length + 12 > len(tail):
        raise BrokenBlock("truncated or overwritten: its footer is longer than the object")
    return tail[-8 - length :]


def _seal_place(footer: bytes) -> int:
    """Return where in the footer the checksum stands."""
    place = footer.rfind(_SEAL)
    place = footer.find(b"crc32:", place) if place >= 0 else -1
    if place < 0:
        raise BrokenBlock("no checksum: not written by fiberwalk, or damaged in its footer")
    return place


def _seal(file: BinaryIO, crc: int) -> None:
    size = file.seek(0, io.SEEK_END)
    file.seek(-8, io.SEEK_END)
    length = int.from_bytes(file.read(4), "little")
    file.seek(size - 8 - length)
    place = size - 8 - length + _seal_place(file.read())
    file.seek(place)
    file.write(f"crc32:{crc:08x}".encode())
    file.seek(0, io.SEEK_END)


def check_seal(file: BinaryIO) -> None:
    """Read a whole object once and compare it with its own checksum, in constant memory.

    Raises:
        BrokenBlock: Any byte differs from what was written, or bytes are missing.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 8))
    end = file.read()
    length = int.from_bytes(end[:4], "little") + 8
    file.seek(max(0, size - min(length, size) - 4))
    footer = _footer(file.read())
    place = size - len(footer) + _seal_place(footer)
    file.seek(place)
    stored = file.read(len(_EMPTY))
    crc = 0
    for start, data in _pieces(file, size):
        low, high = place - start, place - start + len(_EMPTY)
        if high > 0 and low < len(data):
            mutable = bytearray(data)
            mutable[max(0, low) : high] = _EMPTY[max(0, -low) : len(data) - low]
            data = mutable
        crc = zlib.crc32(data, crc)
    if stored != f"crc32:{crc:08x}".encode():
        raise BrokenBlock(
            f"corrupted: its bytes give crc32:{crc:08x}, it was written with {stored.decode('ascii', 'replace')}"
        )


def _pieces(file: BinaryIO, size: int) -> Iterator[tuple[int, bytes]]:
    file.seek(0)
    start = 0
    while start < size:
        data = file.read(min(_PIECE, size - start))
        if not data:
            raise BrokenBlock("truncated while it was read")
        yield start, data
        start += len(data)
