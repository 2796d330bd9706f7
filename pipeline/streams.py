"""Random numbers: one stream for one purpose, drawn on the CPU."""

from __future__ import annotations

import hashlib

import numpy as np


def stream(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """Return the random stream of one purpose, for example ``stream(0, "drift", walk)``.

    A function of names and never of time, rank or order, so that a retry or another number of actors draws the same.
    """
    purpose_key = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "big")
    sequence = np.random.SeedSequence(seed, spawn_key=(purpose_key, *indices))
    return np.random.Generator(np.random.Philox(sequence))
