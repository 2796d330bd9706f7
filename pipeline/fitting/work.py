"""How much work a training of the remainder may be: what it looks at, so that a long network takes minutes too."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.bayes.kernels import choose_form
from pipeline.bayes.params import Network
from pipeline.bayes.target import Potential
from pipeline.bayes.trees import take_rows

OPERATIONS = 3e12
"""Floating-point operations of a whole training, at most: a minute or a few of one core."""
FEWEST_STEPS = 40
"""Of a training that is worth the name."""
GENERAL_STEPS = 150
"""Training steps at most for networks without batched passes: a step asks for some 160 gradients, and one of a
recurrent network takes tens of milliseconds."""
FRESH, FEWEST_FRESH = 32, 8
"""Fresh directions of a step for the likelihood term, over all workers, at most and at least ..."""
NUMBERS = 4e6
"""... and no more than have so many numbers, or one."""
TERM_ROWS, FEWEST_ROWS = 512, 32
"""Training rows that the likelihood term looks at in one step."""
CHECKS, FEWEST_CHECKS = 20, 5
"""Times that a training is judged."""
JUDGED = 4
"""Draws that judge a training, for each fresh direction of a step."""
FEWEST_JUDGED_ROWS = 256
JUDGED_ALONE = 3
"""Without batched passes judged draws pass forward one after the other, which takes so many times as long."""


@dataclass(frozen=True)
class Work:
    """Of one training. Small networks get the most of all; the others what fits `OPERATIONS`, and never too little."""

    steps: int
    fresh: int
    """Fresh directions of a step."""
    rows: int
    """Training rows of the likelihood term in a step."""
    judged: int
    """Training rows on which a training is judged."""
    checks: int
    """Times that it is judged."""

    @classmethod
    def of(cls, potential: Potential, look_rows: int, looks: int, wanted: int) -> Work:
        """What fits.

        Args:
            potential: Of the network; one gradient of it is three forward passes.
            look_rows: Training rows of one look of the chain.
            looks: Looks of one fresh direction.
            wanted: Steps, at most.
        """
        row, dim, most_rows = row_operations(potential), potential.network.dim, potential.rows
        network = potential.network
        kind = choose_form(network.module, 1, dim, network.device, batches=network.batches(potential.x))
        batched = kind == "batched"
        step, judgements = OPERATIONS / FEWEST_STEPS, OPERATIONS / 4 / (1 if batched else JUDGED_ALONE)
        term_rows = min(TERM_ROWS, most_rows)
        seen = look_rows * looks
        fresh = _within(step / (3 * row * (seen + term_rows)), FEWEST_FRESH, FRESH)
        fresh = min(fresh, max(1, int(NUMBERS / dim)))
        term_rows = _within(step / (3 * row * fresh) - seen, min(FEWEST_ROWS, term_rows), term_rows)
        judged = judgements / FEWEST_CHECKS / (JUDGED * fresh * row)
        judged = _within(judged, min(FEWEST_JUDGED_ROWS, most_rows), most_rows)
        checks = _within(judgements / (JUDGED * fresh * row * judged), FEWEST_CHECKS, CHECKS)
        steps = _within(OPERATIONS / (3 * row * fresh * (seen + term_rows)), min(wanted, FEWEST_STEPS), wanted)
        return cls(steps if batched else min(steps, GENERAL_STEPS), fresh, term_rows, judged, checks)


def _within(value: float, least: int, most: int) -> int:
    return int(max(least, min(most, value)))


def row_operations(potential: Potential) -> int:
    """Floating-point operations of one training row passing forward, as torch counts them; 2 D at least.

    Torch does not count those of recurrent layers.
    """
    network: Network = potential.network
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.outputs(network.theta(), take_rows(potential.x, slice(0, 1)))
    return max(2 * network.dim, counter.get_total_flops())
