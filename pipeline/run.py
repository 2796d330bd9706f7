"""A run: configuration, data and the place that holds its objects. Opening one refuses what does not belong to it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import Config, config_difference, parse_config
from pipeline.data import Dataset, load_dataset
from pipeline.documents import sealed_text, text_is_sealed
from pipeline.errors import InputError, RunError
from pipeline.storage import Storage

SCHEMA = 1
"""Version of everything that lies below a run; a change that older readers misread increments it."""
PACKAGES = ("fiberwalk", "torch", "numpy", "pyarrow", "ray", "s3fs", "scipy", "scikit-learn", "safetensors")


@dataclass(frozen=True)
class Run:
    """What every stage and every actor is given. Picklable; holds no open connection."""

    config: Config
    storage: Storage
    """Rooted at the run."""
    dataset: Dataset

    @property
    def uri(self) -> str:
        """Address of the run: storage/run_id."""
        return self.storage.uri


def prepare(config: Config) -> Run:
    """Load the data and name the place, without writing anything. Raises InputError."""
    dataset = load_dataset(config.data, config.seed)
    return Run(config, Storage.open(config.storage).child(config.run_id), dataset)


def claim(run: Run) -> None:
    """Write `run.json` and `config.yaml`, or check that those that are there are ours.

    Raises:
        InputError: The run exists with another configuration, other data or another schema; nothing is written.
    """
    run.storage.check_writable()  # first, because it says best what is wrong with a place
    _refuse_foreign(run)
    run.storage.create_json("run.json", describe(run))
    run.storage.create("config.yaml", sealed_text(run.config.to_yaml().encode()))
    _refuse_foreign(run)  # another driver may have been first


def load_run(run_uri: str, *, trust_code: bool = False) -> Run:
    """Open a stored run with the configuration that it was made with.

    Raises:
        InputError: There is no run, it was written by another schema, its data changed, or its configuration would run
            Python code of somebody else and `trust_code` is false.
    """
    config = stored_config(run_uri, trust_code=trust_code)
    run = Run(config, Storage.open(run_uri), load_dataset(config.data, config.seed))
    _refuse_foreign(run)
    return run


def stored_config(run_uri: str, *, trust_code: bool = False) -> Config:
    """The configuration of a stored run, refused where it names Python code and `trust_code` is false."""
    storage = Storage.open(run_uri)
    if not storage.exists("config.yaml"):
        raise InputError(
            f"No run at {run_uri}: config.yaml is missing there. Give the address that 'fiberwalk run' printed."
        )
    config = _parse_stored(storage)
    if config.own_code and not trust_code:
        raise InputError(
            f"The stored configuration of {run_uri} runs Python code ({'; '.join(config.own_code)}). "
            "If you trust whoever wrote it, add --trust-code."
        )
    return config


def describe(run: Run) -> dict[str, Any]:
    """What `run.json` holds: digests of data and code, versions, the schema of the data."""
    return {
        "schema": SCHEMA,
        "run_id": run.config.run_id,
        "data_digest": run.dataset.digest,
        "data": run.dataset.schema.to_json(),
        "rows": {name: len(getattr(run.dataset, name).y) for name in ("train", "validation", "test")},
        "code_digest": code_digest(),
        "versions": versions(),
        "network_mode": "eval: BatchNorm uses stored statistics, dropout is off",
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def code_digest() -> str:
    """sha256 over the source files of the mathematics, for the record."""
    total = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        total.update(path.read_bytes())
    return total.hexdigest()


def _refuse_foreign(run: Run) -> None:
    if run.storage.exists("run.json"):
        # Not strict: whoever edits it by hand hears in what it differs, not that it was edited.
        stored = run.storage.read_json("run.json", strict=False)
        if not {"schema", "data_digest", "rows", "data"} <= stored.keys():
            run.storage.read_json("run.json")  # says that it is damaged
        if stored["schema"] != SCHEMA:
            raise InputError(
                f"{run.uri} was written by schema {stored['schema']}; this version writes {SCHEMA}. Use another name, "
                "or the release that wrote it."
            )
        if stored["data_digest"] != run.dataset.digest:
            raise InputError(_other_data(run, stored))
    if run.storage.exists("config.yaml"):
        stored_settings = _parse_stored(run.storage)
        changes = [
            line
            for line in config_difference(stored_settings, run.config)
            if not line.startswith(("storage:", "cluster."))
        ]
        if changes:
            raise InputError(
                f"{run.uri} exists with another configuration (stored -> given): {'; '.join(changes)}. "
                "Use another name."
            )


def _parse_stored(storage: Storage) -> Config:
    """The stored configuration; raises RunError where it was damaged so that it cannot be read."""
    text = storage.read("config.yaml")
    try:
        return parse_config(yaml.safe_load(text))
    except (InputError, yaml.YAMLError, UnicodeDecodeError) as error:
        if isinstance(error, InputError) and text_is_sealed(text):
            raise
        raise RunError(
            f"{storage.uri}/config.yaml is damaged. Run 'fiberwalk verify {storage.uri} --repair', then run again."
        ) from None


def _other_data(run: Run, stored: dict[str, Any]) -> str:
    now = describe(run)
    fields = [f"rows.{k}: {v} -> {now['rows'][k]}" for k, v in stored["rows"].items() if v != now["rows"][k]]
    fields += [f"data.{k}: changed" for k, v in stored["data"].items() if v != now["data"].get(k)]
    what = "; ".join(fields) or "same shape, other values"
    return (
        f"{run.uri} exists with other data: digest {stored['data_digest'][:12]} -> {run.dataset.digest[:12]} ({what}). "
        f"Bring the old data back, or use another name; 'fiberwalk verify {run.uri}' says whether run.json is damaged."
    )
