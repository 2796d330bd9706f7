"""The buffers of one layer for a chunk of walks and a block of rows, and its passes forward and backward.

Values lie features-major with rows innermost: (walks, features, rows), and images as (walks, channels, height, width,
rows). The inputs of a product carry one more feature that is always 1, so that biases come out of the same product.
Buffers live as long as the pass, so that every view of them is made once: for small networks a view costs as much as
the operation on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.bayes.chain import Layer
from pipeline.bayes.losses import Loss
from pipeline.bayes.windows import Fold, Pooling, Unfold

TURNED = 16
"""Outputs from which the slope of the weights is held transposed: with its longer side first that product runs twice as
fast there, and with few outputs at half to a quarter of the speed (MKL, one thread, 17 to 257 inputs)."""


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
        self.packed = like.new_zeros(walks, layer.outputs, layer.inputs + 1)
        self._turned_slope = not first and layer.outputs >= TURNED
        turned = (walks, layer.inputs + 1, layer.outputs)
        self.slope = like.new_empty(turned).transpose(1, 2) if self._turned_slope else torch.empty_like(self.packed)
        self.turned = self.packed.transpose(1, 2)
        self._rows = self.packed.flatten(0, 1)
        held = self.slope.transpose(1, 2) if self._turned_slope else self.slope
        self._sum = held.flatten(0, 1) if first else held
        self._weight, self._bias = self.packed[:, :, :-1], self.packed[:, :, -1]
        self._weight_slope, self._bias_slope = self.slope[:, :, :-1], self.slope[:, :, -1]
        self._q, self._p, self._r = layer.inner, layer.before.outer, layer.before.shift
        # As tensors: a number is made one at each call.
        self._qp, self._qr, self._q1 = (like.new_tensor(v) for v in (self._q * self._p, self._q * self._r, self._q))

    def read(self, theta: Tensor) -> None:
        """Take the layer's parameters from theta (W, D), as they act on the core values s of its inputs."""
        weight, bias = self.layer.weights(theta), self.layer.biases(theta)
        torch.mul(weight, self._qp, out=self._weight)
        if self._r:
            torch.sum(weight, 2, out=self._bias)
            self._bias.mul_(self._qr)
            if bias is not None:
                self._bias.add_(bias, alpha=self._q)
        elif bias is not None:
            torch.mul(bias, self._q1, out=self._bias)

    def write(self, gradient: Tensor) -> None:
        """Bring their slope back to weights and biases in the gradient (W, D)."""
        weight, bias = self.layer.weights(gradient), self.layer.biases(gradient)
        torch.mul(self._weight_slope, self._qp, out=weight)
        if self._r:
            weight.add_(self._bias_slope[:, :, None], alpha=self._q * self._r)
        if bias is not None:
            torch.mul(self._bias_slope, self._q1, out=bias)

    def add_slope(self, slope: Tensor, columns: Tensor, share: float) -> None:
        """Slope of the sums, and the inputs both as the layer's pass turned them, to `share` times that held."""
        if self.first:
            self._sum.addmm_(slope, columns, beta=share)
        elif self._turned_slope:
            self._sum.baddbmm_(columns, slope, beta=share)
        else:
            self._sum.baddbmm_(slope.transpose(1, 2), columns.transpose(1, 2), beta=share)

    def sums(self, columns: Tensor, out: Tensor) -> None:
        """The products with the inputs: (W, outputs, n), or for the first layer (W * outputs, n)."""
        if self.first:
            torch.mm(self._rows, columns, out=out)
        else:
            torch.bmm(self.packed, columns, out=out)


class LayerPass:
    """One layer.

    Args:
        weights: The layer and its weights.
        shape: Shape of what comes in for one row: (features,) or (channels, height, width).
        rows: Rows in the block.
        like: A tensor of the type and device.
        before: The pass of the layer before; None for the first.
    """

    input: Tensor
    """Where the layer before writes its outputs, (W, *shape, rows)."""
    output_slope: Tensor
    """Where the layer after writes the slope of the outputs, (W, *output_shape, rows)."""

    def __init__(
        self, weights: Weights, shape: tuple[int, ...], rows: int, like: Tensor, before: LayerPass | None = None
    ):
        layer, walks, first = weights.layer, weights.walks, weights.first
        self.weights, self.layer = weights, layer
        self.target: Tensor | None = None
        lead = () if first else (walks,)
        spread: tuple[int, ...] = ()
        if layer.window is not None:
            spread = layer.window.positions(shape[1], shape[2])
            self._padded(like, lead, shape, rows)
            self.columns = like.new_ones(*lead, layer.inputs + 1, spread[0] * spread[1] * rows)
        elif first:
            self.columns = like.new_empty(0)
        else:
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
        self._pooling = None
        if pool:
            between = like.new_empty(small if layer.pool_first else full)
            self._pooling = Pooling(pool, between, self.sums if layer.pool_first else between, self.slope)
        self._bind(before)

    def _bind(self, before: LayerPass | None) -> None:
        """Make the views that the passes use, and join the pass to the one before."""
        window = self.layer.window
        self._sums_flat, self._slope_flat = self.sums.flatten(2), self.slope.flatten(2)
        if before is None:
            self._sums_flat = self._sums_flat.flatten(0, 1)
            self._slope_turned = self._slope_flat.flatten(0, 1)
        else:
            self._slope_turned, self._columns_turned = self._slope_flat.transpose(1, 2), self.columns
            before.target, self._before_slope = self.input, before.output_slope.flatten(1, -2)
            self._inner = self.weights.packed[:, :, :-1].transpose(1, 2)
            if window is not None:
                self._fold = Fold(self.columns, window, self.slope.shape[2:4], before.output_slope)
        if window is not None:
            self._unfold = Unfold(self.canvas, window, self.columns)
            if before is None:
                self._columns_turned = self.columns.T
        self._first = before is None

    def feed(self, x: Tensor) -> None:
        """Take the data of a block, for the first layer: (features + 1, rows) or (channels, height, width, rows)."""
        if self.layer.window is not None:
            self.input.copy_(x)
        elif self.columns is not x:
            self.columns, self._columns_turned = x, x.T

    def _padded(self, like: Tensor, lead: tuple[int, ...], shape: tuple[int, ...], rows: int) -> None:
        """A canvas whose border is the zero of the inputs, which is -r / p in their core values."""
        layer = self.layer
        assert layer.window is not None
        (down, across), (channels, height, width) = layer.window.padding, shape
        zero = -layer.before.shift / layer.before.outer
        self.canvas = like.new_full((*lead, channels, height + 2 * down, width + 2 * across, rows), zero)
        self.input = self.canvas[..., down : down + height, across : across + width, :]

    def forward(self) -> None:
        """From `input` to the next layer's input; the last layer leaves the outputs in `sums`."""
        layer, pooling = self.layer, self._pooling
        if layer.window is not None:
            self._unfold.run()
        self.weights.sums(self.columns, self._sums_flat)
        if self.target is None:
            return
        if pooling is None:
            layer.after.forward(self.sums, self.target)
        elif layer.pool_first:
            pooling.forward(pooling.values)
            layer.after.forward(pooling.values, self.target)
        else:
            layer.after.forward(self.sums, pooling.values)
            pooling.forward(self.target)

    def end(self, loss: Loss, rows: int, nll: Tensor) -> None:
        """For the last layer: the summed NLL of the first `rows` outputs, and their slope in the outputs' place."""
        if rows == self.slope.shape[-1]:
            loss(self.slope, nll)
        else:
            loss(self.slope[..., :rows], nll)
            self.slope[..., rows:] = 0

    def backward(self, share: float) -> None:
        """From `slope` to that of the weights, added to `share` times what they hold, and to that of the inputs."""
        self.weights.add_slope(self._slope_turned, self._columns_turned, share)
        if self._first:
            return
        if self.layer.window is None:
            torch.bmm(self._inner, self._slope_flat, out=self._before_slope)
        else:
            # The columns have done their service: their slope takes their place.
            torch.bmm(self.weights.turned, self._slope_flat, out=self.columns)
            self._fold.run()

    def backward_activation(self) -> None:
        """From `output_slope` to `slope`, through pooling and the activation."""
        layer, pooling, target = self.layer, self._pooling, self.target
        after = layer.after
        assert target is not None
        if pooling is None:
            after.backward(self.slope, self.sums if after.saves_input else target)
        elif layer.pool_first:
            after.backward(self.output_slope, pooling.values if after.saves_input else target)
            pooling.backward(self.output_slope, pooling.values)
        else:
            pooling.backward(self.output_slope, target)
            after.backward(self.slope, self.sums if after.saves_input else pooling.values)
