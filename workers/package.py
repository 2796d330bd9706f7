"""What a job takes along: this package itself, the configuration, and the user's own code and small files."""

from __future__ import annotations

import ast
import glob
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pipeline
import workers
from pipeline.config import Config
from pipeline.errors import InputError

LIMIT = 50 * 2**20
"""Most bytes that one job takes along; Ray itself refuses about twice that."""
_IGNORE = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def is_here(address: str) -> bool:
    """Whether an address is this machine's own, so that its disk is the cluster's disk."""
    return (urlsplit(address).hostname or "") in _LOOPBACK


def stage(config: Config, folder: Path, *, remote: bool) -> str:
    """Fill `folder` with all that the job needs, and return the storage place as the job has to name it.

    Files under relative paths go along and keep their names, because names of data enter the run id.

    Raises:
        InputError: A file that only this machine has, or more than `LIMIT` bytes.
    """
    storage = _storage(config.storage, remote)
    for package in (pipeline, workers):
        source = Path(str(package.__file__)).parent
        shutil.copytree(source, folder / source.name, ignore=_IGNORE)
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    for value in config.own_code:
        for path, name in _user_code(value.rpartition("python:")[2].partition(":")[0]):
            _copy(path, folder / name)
    for setting, place in _places(config):
        for path, name in _files(setting, place, remote):
            _copy(path, folder / name)
    _check_size(folder)
    return storage


def _storage(uri: str, remote: bool) -> str:
    if "://" in uri:
        return uri
    if remote:
        raise InputError(
            f"storage: {uri} is a folder of this machine, and the cluster is elsewhere. Use s3://bucket/prefix, or "
            f"file://{os.path.abspath(uri)} if every node mounts that folder."
        )
    return os.path.abspath(os.path.expanduser(uri))


def _places(config: Config) -> Iterator[tuple[str, str]]:
    """Yield settings that name files, with the place that each names."""
    sources = [("data.source", config.data.source), *(("data.ood", source) for source in config.data.ood)]
    for setting, source in sources:
        kind, _, place = source.partition(":")
        if kind in ("csv", "parquet", "npz"):
            yield setting, place
        elif kind == "idx":
            yield setting, place + "*"
    for setting, place in (
        ("data.validation", config.data.validation),
        ("data.test", config.data.test),
        ("model.weights", config.model.weights),
    ):
        if isinstance(place, str):
            yield setting, place


def _files(setting: str, place: str, remote: bool) -> list[tuple[Path, str]]:
    """Return the files of this machine that a setting names, with their names in the job's folder."""
    if "://" in place:
        return []
    if os.path.isabs(os.path.expanduser(place)):
        if remote:
            raise InputError(
                f"{setting}: {place} lies on this machine, and the cluster is elsewhere. Put it on s3://, or name it "
                f"by a relative path: small files go along with the job. If every node mounts it, write file://{place}"
            )
        return []
    if ".." in Path(place).parts:
        raise InputError(f"{setting}: {place} leaves the working directory, which is what a job takes along")
    found = glob.glob(place) or ([place] if os.path.exists(place) else [])
    if not found:
        raise InputError(f"{setting}: {place} does not exist in the working directory {os.getcwd()}")
    return [(Path(path), path) for path in found]


def _user_code(module: str) -> list[tuple[Path, str]]:
    """Return the files of a user's module and of what it imports from the same folder; nothing if it is installed."""
    top = module.partition(".")[0]
    for root in _search_path():
        if _find(root, top):
            found: dict[str, Path] = {}
            _collect(root, top, found)
            return [(path, name) for name, path in found.items()]
    return []


def _search_path() -> list[Path]:
    """Folders with the user's own modules: the working directory, then PYTHONPATH."""
    folders = [os.getcwd(), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return [Path(folder).resolve() for folder in folders]


def _find(root: Path, name: str) -> Path | None:
    if name in ("pipeline", "workers") or name in sys.stdlib_module_names:
        return None
    if (root / f"{name}.py").is_file():
        return root / f"{name}.py"
    return root / name if (root / name).is_dir() and any((root / name).glob("*.py")) else None


def _collect(root: Path, name: str, found: dict[str, Path]) -> None:
    path = _find(root, name)
    if path is None or path.name in found:
        return
    found[path.name] = path
    for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
        for imported in _imports(file):
            _collect(root, imported, found)


def _imports(file: Path) -> set[str]:
    """Top-level names that a source file imports."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return set()
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [
        node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module and not node.level
    ]
    return {name.partition(".")[0] for name in names}


def _copy(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, target, ignore=_IGNORE, dirs_exist_ok=True)
    else:
        _check_one(path)
        shutil.copyfile(path, target)


def _check_one(path: Path) -> None:
    if path.stat().st_size > LIMIT:
        raise InputError(
            f"{path} has {path.stat().st_size / 2**20:.0f} MiB; a job takes along at most {LIMIT / 2**20:.0f} MiB. "
            "Put it on s3:// or a shared folder (file://...) and name it so."
        )


def _check_size(folder: Path) -> None:
    sizes = {path.relative_to(folder): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    total = sum(sizes.values())
    if total > LIMIT:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:3]
        listed = " + ".join(f"{path} {sizes[path] / 2**20:.1f}" for path in largest)
        rest = (total - sum(sizes[path] for path in largest)) / 2**20
        raise InputError(
            f"the job would take along {total / 2**20:.1f} MiB ({listed} + others {rest:.1f}), at most "
            f"{LIMIT / 2**20:.0f} MiB. Put large files on s3:// or a shared folder (file://...) and name them so."
        )
