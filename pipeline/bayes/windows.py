"""What convolutions and pooling do between buffers: windows copied out and added back, sums and maxima over windows.

Images lie as (walks, channels, height, width, rows). All views are made once, for buffers that stay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.bayes.chain import Pool, Window


class Unfold:
    """Windows of (..., channels, height, width, rows) as columns, (..., channels * kernel + 1, positions * rows)."""

    def __init__(self, canvas: Tensor, window: Window, columns: Tensor):
        (high, wide), (down, across) = window.kernel, window.stride
        windows = canvas.unfold(-3, high, down).unfold(-3, wide, across)  # (..., c, positions, rows, kernel)
        self._windows = windows.movedim((-2, -1), (-5, -4))
        self._columns, self._ones = columns[..., :-1, :].view(self._windows.shape), columns[..., -1, :]

    def run(self) -> None:
        """Copy the windows of the canvas as it is now."""
        self._columns.copy_(self._windows)
        self._ones.fill_(1)


class Fold:
    """The adjoint of `Unfold`: the sum of all columns where they came from, inside of the border."""

    def __init__(self, columns: Tensor, window: Window, positions: torch.Size, out: Tensor):
        (high, wide), (down, across), (top, left) = window.kernel, window.stride, window.padding
        walks, channels, height, width, rows = out.shape
        pieces = columns[:, :-1].view(walks, channels, high, wide, *positions, rows)
        self._out, self._pairs = out, []
        for i in range(high):
            first_y, last_y, rows_out = _overlap(i - top, down, positions[0], height)
            for j in range(wide):
                first_x, last_x, columns_out = _overlap(j - left, across, positions[1], width)
                place = out[:, :, rows_out, columns_out]
                self._pairs.append((place, pieces[:, :, i, j, first_y:last_y, first_x:last_x]))

    def run(self) -> None:
        """Add the columns as they are now."""
        self._out.zero_()
        for place, piece in self._pairs:
            place.add_(piece)


def _overlap(offset: int, stride: int, positions: int, size: int) -> tuple[int, int, slice]:
    """Positions k with 0 <= offset + k * stride < size: first, last + 1, and where they lie."""
    first = max(0, -(offset // stride))
    last = min(positions, (size - 1 - offset) // stride + 1)
    return first, last, slice(offset + first * stride, offset + (last - 1) * stride + 1, stride)


class Pooling:
    """Sums, in place of means, or maxima over windows; the next or the same layer's weights take in the 1 / n.

    Args:
        pool: The windows.
        values: Where the activation's side of the pooling is kept.
        source: What is pooled.
        slope: Where the slope of what is pooled goes; it may be `source`.
    """

    def __init__(self, pool: Pool, values: Tensor, source: Tensor, slope: Tensor):
        self.values, self._mean, self._source, self._slope = values, pool.mean, source, slope
        self._corners, self._slopes = _corners(source, pool), _corners(slope, pool)
        self._cropped = self._corners[0].numel() * len(self._corners) != source.numel()
        self._pool = pool

    def forward(self, out: Tensor) -> None:
        """Pool the source into `out`."""
        combine = torch.add if self._mean else torch.maximum
        if len(self._corners) == 1:
            out.copy_(self._corners[0])
            return
        combine(self._corners[0], self._corners[1], out=out)
        for corner in self._corners[2:]:
            combine(out, corner, out=out)

    def backward(self, slope: Tensor, pooled: Tensor) -> None:
        """Bring the slope of the pooled values to those of the source; it is used up."""
        corners = self._corners
        if self._cropped:
            if self._source is self._slope and not self._mean:
                corners = _corners(self._source.clone(), self._pool)
            self._slope.zero_()
        for corner, place in zip(corners, self._slopes, strict=True):
            if self._mean:
                place.copy_(slope)
            else:
                # The first of equal maxima takes the whole slope, as in torch.
                taken = torch.where(corner == pooled, slope, 0)
                place.copy_(taken)
                slope.sub_(taken)


def _corners(values: Tensor, pool: Pool) -> list[Tensor]:
    """For each place in the pooling window, the values there: views (walks, channels, height, width, rows)."""
    high, wide = pool.size
    bottom, right = values.shape[-3] // high * high, values.shape[-2] // wide * wide
    return [values[..., i:bottom:high, j:right:wide, :] for i in range(high) for j in range(wide)]
