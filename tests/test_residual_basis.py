"""The basis of the residual kind is turned to the curvature by all workers together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.build import load_problem
from pipeline.fitting.looks import sample_rows
from pipeline.fitting.residual import towards_curvature
from pipeline.store import SampleStore
from tests.runs import finished


class Part:
    """One of some workers; what the others would add to a sum is given."""

    def __init__(self, rank: int, size: int, others: Tensor | None = None):
        self.rank, self.size, self.others, self.own = rank, size, others, torch.empty(0)

    def sum(self, tensors: list[Tensor]) -> None:
        (inner,) = tensors
        self.own = inner.clone()
        if self.others is not None:
            inner += self.others


@pytest.mark.parametrize(("directions", "size"), [(5, 2), (1, 2), (2, 3), (1, 4)])
def test_workers_turn_it_as_one_does_also_where_some_have_no_direction(directions: int, size: int) -> None:
    run = finished("classes")
    plan = SampleStore.open(run.storage).plan
    problem = load_problem(run, 0, plan)
    rows = sample_rows(run, problem, plan, 1)[0]
    normal = torch.randn(plan.dim, directions, generator=torch.Generator().manual_seed(0))
    basis, none = torch.linalg.qr(normal).Q.T.to(problem.theta_star).contiguous(), normal.new_empty(0, plan.dim)

    def turned(part: Part) -> Tensor:
        return towards_curvature(part, problem, none.to(basis), basis, rows)  # type: ignore[arg-type]

    alone, shares = turned(Part(0, 1)), []
    for rank in range(size):
        part = Part(rank, size)
        turned(part)
        shares.append(part.own)
    for rank in range(size):
        others = torch.stack(shares).sum(0) - shares[rank]
        torch.testing.assert_close(turned(Part(rank, size, others)), alone, rtol=1e-4, atol=1e-5)
    assert sum(bool(share.any()) for share in shares) == min(directions, size)
