"""Built-in networks for tests, and the schemas of their inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from pipeline.config import ModelConfig
from pipeline.data.schema import DataSchema, Part
from pipeline.models import build_module
from pipeline.streams import stream


def part(*shape: int, dtype: str = "float32") -> Part:
    return Part(shape, dtype, 1.0, np.zeros(()), np.ones(()))


def schema(*shape: int, parts: Any = None) -> DataSchema:
    return DataSchema("classification", part(*shape) if parts is None else parts, classes=("a", "b", "c"))


def build(shape: tuple[int, ...] = (5,), outputs: int = 3, seed: int = 0, **model: Any) -> nn.Module:
    return build_module(ModelConfig(**model), schema(*shape), outputs, stream(seed, "init"))
