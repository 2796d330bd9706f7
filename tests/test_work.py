"""How much a training of the remainder looks at: all that there is where that is little, else what fits its bound."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from pipeline.bayes.likelihood import Categorical
from pipeline.bayes.params import Network
from pipeline.bayes.target import Potential, prior_precision
from pipeline.fitting.work import (
    CHECKS,
    FEWEST_CHECKS,
    FEWEST_FRESH,
    FEWEST_JUDGED_ROWS,
    FEWEST_ROWS,
    FEWEST_STEPS,
    FRESH,
    GENERAL_STEPS,
    JUDGED,
    JUDGED_ALONE,
    OPERATIONS,
    Work,
    row_operations,
)


class LastState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(4, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


def problem(module: nn.Module, *shape: int, rows: int = 600) -> Potential:
    network = Network(module)
    precision = prior_precision(network.layout, 1.0, torch.float32)
    return Potential(network, Categorical(3), precision, torch.zeros(rows, *shape), torch.zeros(rows, dtype=torch.long))


def convolutional(channels: int, side: int, rows: int, after: nn.Module | None = None) -> Potential:
    first, last = nn.Conv2d(1, channels, 3, padding=1), nn.Linear(channels * side * side, 3)
    layers = [first, after or nn.Tanh(), nn.Flatten(), last]
    return problem(nn.Sequential(*layers), 1, side, side, rows=rows)


def cost(work: Work, row: int, seen: int) -> tuple[float, float]:
    """Operations of training steps and of judgements: a gradient is three forward passes."""
    steps = work.steps * work.fresh * 3 * row * (seen + work.rows)
    return steps, work.checks * JUDGED * work.fresh * work.judged * row


def test_operations_of_a_row_are_two_for_each_weight_and_place() -> None:
    assert row_operations(problem(nn.Sequential(nn.Linear(7, 11), nn.Linear(11, 3)), 7)) == 2 * (7 * 11 + 11 * 3 + 14)
    side, channels = 12, 16
    products = channels * 9 * side * side + 3 * channels * side * side
    assert row_operations(convolutional(channels, side, 4)) == 2 * products


def test_small_networks_are_trained_on_all_that_there_is() -> None:
    work = Work.of(problem(nn.Linear(4, 3), 4, rows=300), look_rows=300, looks=6, wanted=800)
    assert dataclasses.astuple(work) == (800, FRESH, 300, 300, CHECKS)
    assert Work.of(problem(nn.Linear(4, 3), 4), 512, 6, wanted=0).steps == 0


@pytest.mark.parametrize(("channels", "side", "looks"), [(8, 28, 4), (16, 28, 6), (32, 28, 9)])
def test_convolutions_take_as_many_operations_as_are_allowed_and_no_more(channels: int, side: int, looks: int) -> None:
    potential = convolutional(channels, side, 60_000)
    work, row = Work.of(potential, 512, looks, wanted=10_000), row_operations(potential)
    steps, judgements = cost(work, row, 512 * looks)
    assert 0.7 * OPERATIONS < steps <= OPERATIONS and FEWEST_STEPS <= work.steps < 10_000
    assert OPERATIONS / 8 < judgements <= OPERATIONS / 4 and work.judged < 60_000


def test_what_is_too_large_for_the_bound_is_trained_on_the_least() -> None:
    layers = [nn.Conv2d(1, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    potential = problem(nn.Sequential(*layers, nn.Linear(64, 3)), 1, 64, 64)
    work = Work.of(potential, 512, 6, wanted=800)
    least = (FEWEST_STEPS, FEWEST_FRESH, FEWEST_ROWS, FEWEST_JUDGED_ROWS, FEWEST_CHECKS)
    assert dataclasses.astuple(work) == least


def test_a_fresh_direction_of_a_long_network_is_alone() -> None:
    assert Work.of(problem(nn.Linear(1_500_000, 3), 1_500_000, rows=2), 2, 6, wanted=800).fresh == 1


def test_networks_without_batched_passes_take_few_steps_and_are_judged_on_fewer_rows() -> None:
    potential = convolutional(16, 28, 60_000, nn.GroupNorm(4, 16))
    work = Work.of(potential, 512, 6, wanted=10_000)
    _, judgements = cost(work, row_operations(potential), 512 * 6)
    assert work.steps <= GENERAL_STEPS and judgements <= OPERATIONS / 4 / JUDGED_ALONE
    assert Work.of(problem(LastState(), 5, 4), 512, 6, wanted=800).steps == GENERAL_STEPS
