"""Points of the Gaussian control are read once for many draws, unless they are too many to keep."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.bayes.deformation.gaussian import Gaussian
from pipeline.fitting import reading
from pipeline.fitting.reading import KeptPoints

POINTS = torch.from_numpy(np.random.default_rng(0).standard_normal((12, 3)))


def reader(reads: list[float]) -> KeptPoints:
    def read(radius: float) -> Iterator[Tensor]:
        reads.append(radius)
        return iter((POINTS * radius).split(5))

    return KeptPoints(read)


@pytest.mark.parametrize(("limit", "expected"), [(1 << 20, [1.0, 2.0]), (8, [1.0, 1.0, 2.0])])
def test_points_are_read_again_only_where_they_do_not_fit(
    limit: int, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "KEEP_BYTES", limit)
    reads: list[float] = []
    kept, plain = reader(reads), reader([])
    for radius in (1.0, 1.0, 2.0):
        draws = Gaussian(radius, 3, 12, kept).draw(np.random.default_rng(1), 4)
        fresh = Gaussian(radius, 3, 12, lambda r: iter((POINTS * r).split(5))).draw(np.random.default_rng(1), 4)
        assert torch.equal(draws, fresh)
    assert reads == expected
    assert torch.equal(torch.cat(list(plain(1.0))), POINTS)


def test_a_reading_that_is_given_up_is_not_taken_for_the_whole() -> None:
    reads: list[float] = []
    kept = reader(reads)
    next(kept(1.0))
    assert torch.equal(torch.cat(list(kept(1.0))), POINTS)
    assert reads == [1.0, 1.0]
