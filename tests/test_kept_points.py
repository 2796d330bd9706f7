"""Points of the Gaussian control are read once for many draws, unless they are too many to keep."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.bayes.deformation.gaussian import Gaussian
from pipeline.fitting import loading, reading
from pipeline.fitting.loading import Supply
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


@pytest.mark.parametrize(("keep", "ahead", "reads"), [(8, 10 * 8 * 3, 4), (8, 0, 8), (1 << 20, 10 * 8 * 3, 1)])
def test_draws_are_made_ahead_where_each_reads_all_points(
    keep: int, ahead: int, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 of them, asked for in eight pieces: ten at a time at least, never more than are left, and always the same."""
    for module in (loading, reading):
        monkeypatch.setattr(module, "KEEP_BYTES", keep)
    monkeypatch.setattr(loading, "AHEAD_BYTES", ahead)
    read: list[float] = []
    supply = Supply(Gaussian(1.0, 3, 12, reader(read)), np.random.default_rng(1), 32)
    pieces = [supply.take(n) for n in (1, 6, 3, 4, 7, 1, 9, 1)]
    assert [len(piece) for piece in pieces] == [1, 6, 3, 4, 7, 1, 9, 1] and len(read) == reads
    whole = Gaussian(1.0, 3, 12, reader([])).draw(np.random.default_rng(1), 32)
    torch.testing.assert_close(torch.cat(pieces), whole)
