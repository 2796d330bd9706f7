"""Sources of data for tests: small tables, and what loading them gives or says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.config import parse_config
from pipeline.data import Dataset, load_dataset
from pipeline.errors import InputError


def load(seed: int = 0, **data: Any) -> Dataset:
    """The data set of these `data` settings."""
    return load_dataset(parse_config({"name": "t", "data": data}).data, seed)


def refused(**data: Any) -> str:
    """The one line with which these `data` settings are refused."""
    with pytest.raises(InputError) as error:
        load(**data)
    assert "\n" not in str(error.value)
    return str(error.value)


def csv(path: Path, text: str) -> str:
    """Write a file and name it as a source."""
    path.write_text(text)
    return f"csv:{path}"


def table(rows: int = 30, seed: int = 1) -> pd.DataFrame:
    """Two columns of numbers, one of three words, and a target of two words that alternate."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"a": rng.normal(3, 2, rows).round(4), "b": rng.integers(0, 9, rows), "kind": "x", "y": "no"})
    frame["kind"] = np.array(["red", "blue", "green"])[np.arange(rows) % 3]
    frame["y"] = np.where(np.arange(rows) % 2, "yes", "no")
    return frame
