"""The limits of the machine for one case: its elementwise functions and matrix products, each by itself."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from tests.bench.walk_cases import Case

CHUNK = 1 << 18
"""Elements of the elementwise rates' buffer: 1 MiB, as much as a pass holds in cache."""


def rates(case: Case, walks: int) -> dict[str, float]:
    """Elements and operations a second, and the seconds of one particle-step that they imply.

    `seconds_tanh` is the limit of the issue: torch's tanh at its rate, and all products at the rate of a large square
    one. `seconds_shapes` is the limit of this way of computing: the faster sigmoid in place of tanh, its derivative,
    and every product of the pass timed by itself at its own shape.
    """
    a, out = torch.randn(CHUNK), torch.empty(CHUNK)
    slope = torch.randn(CHUNK)
    backward = torch.ops.aten.sigmoid_backward.grad_input
    tanh = CHUNK / best(lambda: torch.tanh(a, out=out))
    sigmoid = CHUNK / best(lambda: torch.sigmoid(a, out=out))
    derivative = CHUNK / best(lambda: backward(slope, a, grad_input=out))
    square, result = torch.randn(1024, 1024), torch.empty(1024, 1024)
    products = 2 * 1024**3 / best(lambda: torch.mm(square, square, out=result), 3)
    operations = sum(2.0 * times * m * k * n for _, times, m, k, n in case.products())
    at_shapes = sum(_product_seconds(kind, m, k, n, walks) * times for kind, times, m, k, n in case.products())
    values = case.activations()
    return {
        "tanh_per_s": tanh,
        "sigmoid_per_s": sigmoid,
        "flop_per_s": products,
        "flop_per_step": operations,
        "tanh_per_step": values,
        "seconds_tanh": values / tanh + operations / products,
        "seconds_products": operations / products,
        "seconds_shapes": values / sigmoid + values / derivative + at_shapes,
    }


def _product_seconds(kind: str, m: int, k: int, n: int, walks: int) -> float:
    """Seconds a walk of one product of a pass, batched over as many walks as stay in cache."""
    batch = max(1, min(walks, 64, (1 << 21) // (m * k + k * n + m * n)))
    left = torch.randn(batch, m, k) if kind != "inputs" else torch.randn(batch, k, m).transpose(1, 2)
    right = torch.randn(batch, k, n) if kind != "weights" else torch.randn(batch, n, k).transpose(1, 2)
    out = torch.empty(batch, m, n)
    return best(lambda: torch.bmm(left, right, out=out)) / batch


def best(function: Callable[[], object], repeats: int = 7) -> float:
    """Shortest seconds of a call on the processor's clock, over repeats of about ten milliseconds."""
    function()
    began = time.process_time()
    function()
    inner = max(1, int(0.01 / max(time.process_time() - began, 1e-6)))
    shortest = float("inf")
    for _ in range(repeats):
        began = time.process_time()
        for _ in range(inner):
            function()
        shortest = min(shortest, (time.process_time() - began) / inner)
    return shortest
