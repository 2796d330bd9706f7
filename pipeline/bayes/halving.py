"""Passes that do not run out of memory: fewer walks at once, after the first time that they did."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor

log = logging.getLogger("fiberwalk")


Values = TypeVar("Values", Tensor, tuple[Tensor, Tensor])


class Halving(Generic[Values]):
    """A function of many walks that halves how many it takes at once when memory runs out, and goes on.

    It gives their gradient and NLL, or the NLL alone.

    The values are the same up to rounding, since batch shape changes rounding: relative differences of about 1e-6 in
    float32. The smaller number is kept for the rest of the process.
    """

    def __init__(self, kernel: Callable[..., Values]):
        self._kernel = kernel
        self.limit: int | None = None
        """Most walks at once; None until memory has run out."""

    def __call__(self, theta: Tensor, rows: Tensor | None = None) -> Values:
        """What the function gives, walks on the first axis."""
        while True:
            size = min(self.limit or len(theta), len(theta))
            try:
                if size == len(theta):
                    return self._kernel(theta, rows)
                return _joined([self._kernel(part, rows) for part in theta.split(size)])
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _out_of_memory(error) or size == 1:
                    raise
                self.limit = max(1, size // 2)
                log.warning("Out of memory with %d walks at once: going on with %d.", size, self.limit)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()


def _joined(parts: list[Values]) -> Values:
    if isinstance(parts[0], Tensor):
        return torch.cat(cast(list[Tensor], parts))
    first, second = zip(*parts, strict=True)
    return torch.cat(first), torch.cat(second)


def _out_of_memory(error: BaseException) -> bool:
    """The CPU allocator of torch raises a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
