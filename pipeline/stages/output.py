"""Where exports go: a new file or folder, on disk or on an object store, complete or not there at all."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import InputError
from pipeline.storage import Storage


@contextlib.contextmanager
def target(out_uri: str, *, inside: str) -> Iterator[Path]:
    """Give a local path to write to; on success it becomes the target in one go, otherwise nothing is left.

    Raises:
        InputError: The target has '..' in it, exists, or lies inside the run `inside`.
    """
    if ".." in out_uri.split("/"):
        raise InputError(f"--out must not hold '..', got {out_uri}. Write out the place that is meant.")
    place = refuse_inside(out_uri, inside)
    folder, _, name = place.uri.rpartition("/")
    if not name or folder.endswith(":/"):
        raise InputError(f"--out must name a file or folder below a storage place, got {out_uri}")
    if place.protocol == "file":
        yield from _local(Path(place.uri))
    else:
        yield from _remote(place, Storage.open(folder), name)


def refuse_inside(out_uri: str, run_uri: str) -> Storage:
    """The place of an output; raises InputError if it lies inside the run, whose objects it could hide or replace."""
    place, run = Storage.open(out_uri), Storage.open(run_uri)
    inside = f"{place.uri}/".startswith(f"{run.uri}/")
    if place.protocol == run.protocol == "file":  # also through a link
        inside = inside or Path(place.uri).resolve().is_relative_to(Path(run.uri).resolve())
    if inside:
        raise InputError(
            f"--out {out_uri} lies inside the run {run_uri}, whose folders are read as they are. Name another place."
        )
    return place


def _local(final: Path) -> Iterator[Path]:
    if final.is_dir() and not any(final.iterdir()):
        final.rmdir()
    if os.path.lexists(final):
        raise InputError(f"--out {final} exists. Remove it, or name another place; an export never overwrites.")
    partial = final.with_name(f".{final.name}.{secrets.token_hex(4)}.partial")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a file where a folder is needed, a place that takes no folders
        what = f"--out {final}: the folder {final.parent} cannot be made"
        raise InputError(f"{what}: {error.strerror}. Name another place.") from error
    try:
        with open(partial, "xb"):
            pass
        partial.unlink()
    except OSError as error:  # found out before the work, not after it
        raise InputError(f"--out {final} cannot be written: {error.strerror}. Name another place.") from error
    try:
        yield partial
        os.rename(partial, final)
    finally:
        _remove(partial)


def _remote(place: Storage, folder: Storage, name: str) -> Iterator[Path]:
    if folder.exists(name) or place.list():
        raise InputError(f"--out {place.uri} exists. Remove it, or name another place; an export never overwrites.")
    folder.check_writable()
    with tempfile.TemporaryDirectory(prefix="fiberwalk-export-") as temporary:
        partial = Path(temporary) / name
        yield partial
        files = [partial] if partial.is_file() else sorted(path for path in partial.rglob("*") if path.is_file())
        for file in files:
            with open(file, "rb") as source:
                key = file.relative_to(temporary).as_posix()
                if not folder.create_from(key, lambda sink, source=source: shutil.copyfileobj(source, sink, 2**22)):
                    raise InputError(
                        f"--out {folder.uri}/{key} was written by somebody else meanwhile. Name another place."
                    )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    for left in [path, *path.parent.glob(f"{glob.escape(path.name)}.*")]:
        left.unlink(missing_ok=True)
