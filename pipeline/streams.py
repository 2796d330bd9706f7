"""Random numbers: one stream for one purpose, drawn on the CPU."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def stream(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """Return the random stream of one purpose, for example ``stream(0, "drift", walk)``.

    A function of names and never of time, rank or order, so that a retry or another number of actors draws the same.
    """
    purpose_key = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "big")
    sequence = np.random.SeedSequence(seed, spawn_key=(purpose_key, *indices))
    return np.random.Generator(np.random.Philox(sequence))


def torch_generator(rng: np.random.Generator, below: int = 2**62) -> torch.Generator:
    """Return a torch generator of its own, seeded from a stream by a whole number smaller than `below`.

    The seed is that of the new generator alone: the global state of torch is not touched.
    """
    import torch  # not above: plan and store are read by commands that need no torch

    return torch.Generator().manual_seed(int(rng.integers(below)))
