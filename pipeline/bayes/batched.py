r"""Gradients of many parameter vectors at once for plain chains of layers, by batched matrix products.

Walks are the batch axis. Activations lie features-major, (walks, features, rows), so that rows run along memory; each
carries one more feature that is always 1, and the weights one more column for the bias, so that biases and their
gradients come out of the same products. The first layer sees the same inputs in every walk and is one large product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.bayes.activations import IDENTITY, Activation, activation_of
from pipeline.bayes.likelihood import Likelihood
from pipeline.bayes.losses import Loss, loss_of


@dataclass(frozen=True)
class Dense:
    """A linear layer and the activation after it, by where its parameters lie in the flat vector."""

    inputs: int
    outputs: int
    weight: int
    """Offset of the weight matrix, (outputs, inputs)."""
    bias: int | None
    """Offset of the bias, (outputs,)."""
    before: Activation
    """The activation that made the inputs."""
    after: Activation

    def weights(self, theta: Tensor) -> Tensor:
        """View of the weight matrices, (W, D) -> (W, outputs, inputs)."""
        part = theta[:, self.weight : self.weight + self.inputs * self.outputs]
        return part.view(len(theta), self.outputs, self.inputs)

    def biases(self, theta: Tensor) -> Tensor | None:
        """View of the biases, (W, D) -> (W, outputs)."""
        return None if self.bias is None else theta[:, self.bias : self.bias + self.outputs]

    def read(self, theta: Tensor, packed: Tensor) -> None:
        """Weights and biases as they act on the core values s: packed (W, outputs, inputs + 1)."""
        q, p, r = self.after.inner, self.before.outer, self.before.shift
        weight, bias, column = self.weights(theta), self.biases(theta), packed[:, :, -1]
        torch.mul(weight, q * p, out=packed[:, :, :-1])
        if r:
            torch.sum(weight, 2, out=column)
            column.mul_(q * r)
        else:
            column.zero_()
        if bias is not None:
            column.add_(bias, alpha=q)

    def write(self, packed: Tensor, gradient: Tensor) -> None:
        """The gradient with respect to packed, brought back to weights and biases in the flat gradient (W, D)."""
        q, p, r = self.after.inner, self.before.outer, self.before.shift
        weight, bias, column = self.weights(gradient), self.biases(gradient), packed[:, :, -1:]
        torch.mul(packed[:, :, :-1], q * p, out=weight)
        if r:
            weight.add_(column, alpha=q * r)
        if bias is not None:
            torch.mul(column[:, :, 0], q, out=bias)


def parse_mlp(module: nn.Module, dim: int) -> list[Dense] | None:
    """The layers of a chain of Linear and activations with `dim` parameters, all of them walked; else None."""
    found: list[tuple[nn.Linear, Activation]] = []
    for layer in _chain(module):
        activation = activation_of(layer)
        if layer._forward_hooks or layer._forward_pre_hooks:
            return None
        if type(layer) is nn.Linear:
            found.append((layer, IDENTITY))
        elif activation is not None and found and found[-1][1] is IDENTITY:
            found[-1] = (found[-1][0], activation)
        elif not (type(layer) in (nn.Identity, nn.Dropout) or (_flattens(layer) and not found)):
            return None
    dense: list[Dense] = []
    offset, before = 0, IDENTITY
    for linear, after in found:
        end = offset + linear.weight.numel()
        bias = None if linear.bias is None else end
        dense.append(Dense(linear.in_features, linear.out_features, offset, bias, before, after))
        offset, before = end + (0 if bias is None else linear.out_features), after
    # After a last activation there are no weights that could take in its scale. Tied or fixed weights change `dim`.
    return dense if dense and before is IDENTITY and offset == dim else None


class BatchedMLP:
    """Gradient of the summed NLL for many parameter vectors of a multilayer perceptron.

    Args:
        layers: From `parse_mlp`.
        likelihood: Likelihood of a row.
        x: Inputs, (rows, ...); flattened.
        y: Targets, (rows,).
        chunk: Walks in one pass for a number of rows.
    """

    def __init__(self, layers: Sequence[Dense], likelihood: Likelihood, x: Tensor, y: Tensor, chunk: int):
        x = x.flatten(1)
        self.layers, self.likelihood, self.y, self.chunk = tuple(layers), likelihood, y, chunk
        self.x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        self._loss = loss_of(likelihood, y, x.dtype)
        self._passes: dict[tuple[int, int], _Pass] = {}

    @torch.no_grad()
    def __call__(self, theta: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """theta (W, D) -> gradient (W, D) and summed NLL (W,), over all rows or those with these numbers."""
        x, loss = self.x, self._loss
        if rows is not None:
            x, loss = self.x[rows], loss_of(self.likelihood, self.y[rows], x.dtype)
        gradient, nll = torch.empty_like(theta), theta.new_empty(len(theta))
        for first, last in even_chunks(len(theta), self.chunk):
            work = self._pass(last - first, len(x))
            work.run(theta[first:last], x, loss, gradient[first:last], nll[first:last])
        return gradient, nll

    def _pass(self, walks: int, rows: int) -> _Pass:
        key = walks, rows
        if key not in self._passes:
            if len(self._passes) == 4:
                self._passes.clear()
            self._passes[key] = _Pass(self.layers, walks, rows, self.x)
        return self._passes[key]


class _Pass:
    """The buffers of one forward and backward pass, and the pass itself."""

    def __init__(self, layers: tuple[Dense, ...], walks: int, rows: int, like: Tensor):
        self.layers = layers
        widest = max(layer.outputs for layer in layers)
        scratch = [like.new_empty(walks * widest * rows) for _ in range(2)]
        self.packed = [like.new_empty(walks, layer.outputs, layer.inputs + 1) for layer in layers]
        self.packed_slope = [torch.empty_like(p) for p in self.packed]
        self.hidden = [like.new_ones(walks, layer.outputs + 1, rows) for layer in layers[:-1]]
        # Neighbouring layers take turns with two scratch buffers: a layer's sums, and later their slope.
        self.sums = [
            scratch[i % 2][: walks * layer.outputs * rows].view(walks, layer.outputs, rows)
            for i, layer in enumerate(layers)
        ]
        self.slopes = list(self.sums)
        for i, layer in enumerate(layers):
            if layer.after.saves_input:
                self.sums[i] = torch.empty_like(self.slopes[i])

    def run(self, theta: Tensor, x: Tensor, loss: Loss, gradient: Tensor, nll: Tensor) -> None:
        """Forward, loss, backward."""
        for layer, packed in zip(self.layers, self.packed, strict=True):
            layer.read(theta, packed)
        self._forward(x)
        loss(self.sums[-1], nll)
        self._backward(x)
        for layer, packed in zip(self.layers, self.packed_slope, strict=True):
            layer.write(packed, gradient)

    def _forward(self, x: Tensor) -> None:
        torch.mm(self.packed[0].flatten(0, 1), x.T, out=self.sums[0].flatten(0, 1))
        for i, hidden in enumerate(self.hidden):
            self.layers[i].after.forward(self.sums[i], hidden[:, :-1])
            torch.bmm(self.packed[i + 1], hidden, out=self.sums[i + 1])

    def _backward(self, x: Tensor) -> None:
        for i in range(len(self.hidden) - 1, -1, -1):
            after, hidden, slope = self.layers[i].after, self.hidden[i], self.slopes[i]
            torch.bmm(self.slopes[i + 1], hidden.transpose(1, 2), out=self.packed_slope[i + 1])
            torch.bmm(self.packed[i + 1][:, :, :-1].transpose(1, 2), self.slopes[i + 1], out=slope)
            after.backward(slope, self.sums[i] if after.saves_input else hidden[:, :-1])
        torch.mm(self.slopes[0].flatten(0, 1), x, out=self.packed_slope[0].flatten(0, 1))


def even_chunks(walks: int, most: int) -> list[tuple[int, int]]:
    """Bounds of the fewest chunks of at most `most` walks, as even as they can be."""
    count = -(-walks // most)
    bounds = [walks * i // count for i in range(count + 1)]
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def mlp_chunk(layers: Sequence[Dense], rows: int, elements: int) -> int:
    """Walks whose activations and weights together have about so many elements."""
    per_walk = sum((layer.inputs + layer.outputs + 2) * rows + 2 * layer.outputs * layer.inputs for layer in layers)
    return max(1, min(256, elements // per_walk))


def _chain(module: nn.Module) -> list[nn.Module]:
    if type(module) is not nn.Sequential:
        return [module]
    return [layer for child in module for layer in _chain(child)]


def _flattens(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Flatten) and layer.start_dim == 1 and layer.end_dim == -1
