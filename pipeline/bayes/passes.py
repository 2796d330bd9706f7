"""The buffers of one layer for a chunk of walks and a block of rows, and its passes forward and backward.

Values lie features-major with rows innermost: (walks, features, rows), and images as (walks, channels, height, width,
rows). The inputs of a product carry one more feature that is always 1, so that biases come out of the same product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.bayes.chain import Layer, Pool, Window


class Weights:
    """Weights and biases of one layer for a chunk of walks, packed for the product, and their slope.

    Args:
        layer: The layer.
        walks: Walks in the chunk.
        like: A tensor of the type and device.
        first: Whether the layer's inputs are the data, shared by all walks.
    """

    def __init__(self, layer: Layer, walks: int, like: Tensor, first: bool):
        self.layer, self.walks, self.first = layer, walks, first
        self.packed = like.new_empty(walks, layer.outputs, layer.inputs + 1)
        self.slope = torch.empty_like(self.packed)
        if not first:
            # Held transposed: with the longer side first these products run up to twice as fast.
            self.slope = like.new_empty(walks, layer.inputs + 1, layer.outputs).transpose(1, 2)

    def read(self, theta: Tensor) -> None:
        """Take the layer's parameters from theta (W, D)."""
        self.layer.read(theta, self.packed)

    def write(self, gradient: Tensor) -> None:
        """Put their slope into the gradient (W, D)."""
        self.layer.write(self.slope, gradient)

    def add_slope(self, slope: Tensor, columns: Tensor, share: float) -> None:
        """Slope of the sums (W, outputs, n) and the inputs, to `share` times the slope held plus theirs."""
        if self.first:
            self.slope.flatten(0, 1).addmm_(slope.flatten(0, 1), columns.T, beta=share)
        else:
            self.slope.transpose(1, 2).baddbmm_(columns, slope.transpose(1, 2), beta=share)


class LayerPass:
    """One layer.

    Args:
        weights: The layer and its weights.
        shape: Shape of what comes in for one row: (features,) or (channels, height, width).
        rows: Rows in the block.
        like: A tensor of the type and device.
    """

    input: Tensor
    """Where the layer before writes its outputs, (W, *shape, rows)."""
    output_slope: Tensor
    """Where the layer after writes the slope of the outputs, (W, *output_shape, rows)."""

    def __init__(self, weights: Weights, shape: tuple[int, ...], rows: int, like: Tensor):
        layer, walks, first = weights.layer, weights.walks, weights.first
        self.weights, self.layer = weights, layer
        lead = () if first else (walks,)
        spread: tuple[int, ...] = ()
        if layer.window is not None:
            spread = layer.window.positions(shape[1], shape[2])
            self._padded(like, lead, shape, rows)
            self.columns = like.new_ones(*lead, layer.inputs + 1, spread[0] * spread[1] * rows)
        elif not first:
            self.columns = like.new_ones(walks, layer.inputs + 1, rows)
            self.input = self.columns[:, :-1].unflatten(1, shape)
        pool = layer.pool
        pooled = tuple(n // k for n, k in zip(spread, pool.size, strict=True)) if pool else spread
        self.output_shape = (layer.outputs, *pooled)
        full, small = (walks, layer.outputs, *spread, rows), (walks, *self.output_shape, rows)
        # The slope of the sums takes their place, unless the activation needs them again.
        self.slope = like.new_empty(full)
        self.sums = torch.empty_like(self.slope) if layer.after.saves_input and not layer.pool_first else self.slope
        self.output_slope = like.new_empty(small) if pool else self.slope
        self.between = like.new_empty(small if layer.pool_first else full) if pool else None

    def feed(self, x: Tensor) -> None:
        """Take the data of a block, for the first layer: (features + 1, rows) or (channels, height, width, rows)."""
        if self.layer.window is None:
            self.columns = x
        else:
            self.input.copy_(x)

    def _padded(self, like: Tensor, lead: tuple[int, ...], shape: tuple[int, ...], rows: int) -> None:
        """A canvas whose border is the zero of the inputs, which is -r / p in their core values."""
        layer = self.layer
        assert layer.window is not None
        (down, across), (channels, height, width) = layer.window.padding, shape
        zero = -layer.before.shift / layer.before.outer
        self.canvas = like.new_full((*lead, channels, height + 2 * down, width + 2 * across, rows), zero)
        self.input = self.canvas[..., down : down + height, across : across + width, :]

    def forward(self, target: Tensor | None) -> None:
        """From `input` to `target`, the next layer's input; None leaves the outputs in `sums`."""
        layer = self.layer
        if layer.window is not None:
            _unfold(self.canvas, layer.window, self.columns)
        packed, sums = self.weights.packed, _matrix(self.sums)
        if self.weights.first:
            torch.mm(packed.flatten(0, 1), self.columns, out=sums.flatten(0, 1))
        else:
            torch.bmm(packed, self.columns, out=sums)
        if target is None:
            return
        self.target = target
        if layer.pool is None or self.between is None:
            layer.after.forward(self.sums, target)
        elif layer.pool_first:
            _pool(self.sums, layer.pool, self.between)
            layer.after.forward(self.between, target)
        else:
            layer.after.forward(self.sums, self.between)
            _pool(self.between, layer.pool, target)

    def backward(self, input_slope: Tensor | None, share: float) -> None:
        """From `slope` to that of the weights, added to `share` times what they hold, and to that of the inputs."""
        layer = self.layer
        slope, packed = _matrix(self.slope), self.weights.packed
        self.weights.add_slope(slope, self.columns, share)
        if input_slope is None:
            return
        if layer.window is None:
            torch.bmm(packed[:, :, :-1].transpose(1, 2), slope, out=input_slope.flatten(1, -2))
        else:
            # The columns have done their service: their slope takes their place.
            torch.bmm(packed.transpose(1, 2), slope, out=self.columns)
            _fold(self.columns, layer.window, self.slope.shape[2:4], input_slope)

    def backward_activation(self) -> None:
        """From `output_slope` to `slope`, through pooling and the activation."""
        layer = self.layer
        after, between = layer.after, self.between
        if layer.pool is None or between is None:
            after.backward(self.slope, self.sums if after.saves_input else self.target)
        elif layer.pool_first:
            after.backward(self.output_slope, between if after.saves_input else self.target)
            _unpool(self.output_slope, layer.pool, self.sums, between, self.slope)
        else:
            _unpool(self.output_slope, layer.pool, between, self.target, self.slope)
            after.backward(self.slope, self.sums if after.saves_input else between)


def _matrix(values: Tensor) -> Tensor:
    """View (walks, channels, positions..., rows) as (walks, channels, columns)."""
    return values.flatten(2)


def _unfold(canvas: Tensor, window: Window, columns: Tensor) -> None:
    """Windows of (..., channels, height, width, rows) as columns, (..., channels * kernel + 1, positions * rows)."""
    (high, wide), (down, across) = window.kernel, window.stride
    windows = canvas.unfold(-3, high, down).unfold(-3, wide, across)  # (..., c, positions, rows, kernel)
    ahead = windows.movedim((-2, -1), (-5, -4))
    columns[..., :-1, :].view(ahead.shape).copy_(ahead)
    columns[..., -1, :] = 1


def _fold(columns: Tensor, window: Window, positions: torch.Size, out: Tensor) -> None:
    """The adjoint of `_unfold`: the sum of all columns where they came from, inside of the border."""
    (high, wide), (down, across), (top, left) = window.kernel, window.stride, window.padding
    walks, channels, height, width, rows = out.shape
    pieces = columns[:, :-1].view(walks, channels, high, wide, *positions, rows)
    out.zero_()
    for i in range(high):
        first_y, last_y, rows_out = _overlap(i - top, down, positions[0], height)
        for j in range(wide):
            first_x, last_x, columns_out = _overlap(j - left, across, positions[1], width)
            out[:, :, rows_out, columns_out].add_(pieces[:, :, i, j, first_y:last_y, first_x:last_x])


def _overlap(offset: int, stride: int, positions: int, size: int) -> tuple[int, int, slice]:
    """Positions k with 0 <= offset + k * stride < size: first, last + 1, and where they lie."""
    first = max(0, -(offset // stride))
    last = min(positions, (size - 1 - offset) // stride + 1)
    return first, last, slice(offset + first * stride, offset + (last - 1) * stride + 1, stride)


def _corners(values: Tensor, pool: Pool) -> list[Tensor]:
    """For each place in the pooling window, the values there: views (walks, channels, height, width, rows)."""
    high, wide = pool.size
    bottom, right = values.shape[-3] // high * high, values.shape[-2] // wide * wide
    return [values[..., i:bottom:high, j:right:wide, :] for i in range(high) for j in range(wide)]


def _pool(values: Tensor, pool: Pool, out: Tensor) -> None:
    corners = _corners(values, pool)
    out.copy_(corners[0])
    for corner in corners[1:]:
        if pool.mean:
            out.add_(corner)
        else:
            torch.maximum(out, corner, out=out)
    if pool.mean:
        out.div_(len(corners))


def _unpool(slope: Tensor, pool: Pool, values: Tensor, pooled: Tensor, out: Tensor) -> None:
    """The slope of pooled values brought to the values, in `out`, which may be `values`; the slope is used up."""
    corners, targets = _corners(values, pool), _corners(out, pool)
    if pool.mean:
        slope.div_(len(corners))
    cropped = pooled[0].numel() * len(corners) != values[0].numel()
    if cropped:
        values = values.clone() if values is out else values
        corners = _corners(values, pool)
        out.zero_()
    for corner, target in zip(corners, targets, strict=True):
        if pool.mean:
            target.copy_(slope)
        else:
            # The first of equal maxima takes the whole slope, as in torch.
            taken = torch.where(corner == pooled, slope, 0)
            target.copy_(taken)
            slope.sub_(taken)
