r"""Gradients of many parameter vectors at once for plain chains of layers, by batched matrix products.

Walks are the batch axis; convolutions are matrix products over windows that are copied out. A chunk of walks and a
block of rows pass together, few enough that what lies between the layers stays in the processor's cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.bayes.chain import Chain, Layer
from pipeline.bayes.likelihood import Likelihood
from pipeline.bayes.losses import Loss, loss_of
from pipeline.bayes.passes import LayerPass, Weights
from pipeline.errors import InputError

Block = tuple[Tensor, Loss, int]
"""Inputs of some rows, features-major as the first layer takes them; the loss of their targets; how many they are."""

LINE = 16
"""Rows of a block are filled up to a multiple of this where it costs little: products then start at cache lines."""

BLOCK_ELEMENTS = {"cpu": 1 << 20, "cpu images": 1 << 18, "cuda": 1 << 25, "cuda images": 1 << 25}
"""Most elements between the layers of one walk and one block of rows; they stay in a processor's cache."""
CHUNK_ELEMENTS = {"cpu": 1 << 21, "cpu images": 1 << 20, "cuda": 1 << 27, "cuda images": 1 << 27}
"""Most elements between the layers of one chunk of walks and one block of rows."""
CHUNK_WALKS = {"cpu": (2, 64), "cuda": (2, 4096)}
"""Fewest and most walks of a chunk: each call of an operation has its cost."""


class BatchedChain:
    """Gradient of the summed NLL for many parameter vectors of a plain chain of layers.

    Args:
        chain: From `parse_chain`.
        likelihood: Likelihood of a row.
        x: Inputs, (rows, ...).
        y: Targets, (rows,).
        walks: Most walks in one pass; None takes what fits the cache.
        rows: Most rows in one pass; None takes what fits the cache.

    Raises:
        InputError: The inputs do not have the shape that the first layer takes.
    """

    def __init__(
        self,
        chain: Chain,
        likelihood: Likelihood,
        x: Tensor,
        y: Tensor,
        walks: int | None = None,
        rows: int | None = None,
    ):
        for module in chain.reshaping:
            x = module(x)
        image = chain.layers[0].window is not None
        if x.ndim != (4 if image else 2):
            takes = "(rows, channels, height, width)" if image else "(rows, features)"
            raise InputError(f"walk.form 'batched': the first layer takes {takes}, the inputs are {tuple(x.shape)}.")
        self.layers, self.likelihood, self.y, self.image = chain.layers, likelihood, y, image
        self.shape = tuple(x.shape[1:])
        self.x = x if image else torch.cat([x, x.new_ones(len(x), 1)], 1)
        self.most_walks, self.most_rows = walks, rows
        self.blocks = self._split(self.x, y)
        self._weights: dict[int, list[Weights]] = {}
        self._passes: dict[tuple[int, int], list[LayerPass]] = {}

    @torch.no_grad()
    def __call__(self, theta: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """theta (W, D) -> gradient (W, D) and summed NLL (W,), over all rows or those with these numbers."""
        gradient = torch.empty_like(theta)
        return gradient, self._values(theta, rows, gradient)

    @torch.no_grad()
    def nll(self, theta: Tensor, rows: Tensor | None = None) -> Tensor:
        """The summed NLL alone, (W,), from the passes forward."""
        return self._values(theta, rows, None)

    def _values(self, theta: Tensor, rows: Tensor | None, gradient: Tensor | None) -> Tensor:
        blocks = self.blocks if rows is None else self._split(self.x[rows], self.y[rows])
        nll = theta.new_empty(len(theta))
        most = self.most_walks or chunk_walks(self.layers, self.shape, blocks[0][0].shape[-1], theta.device.type)
        for first, last in even_parts(len(theta), most):
            part = None if gradient is None else gradient[first:last]
            self._run(theta[first:last], blocks, nll[first:last], part)
        return nll

    def _run(self, theta: Tensor, blocks: list[Block], nll: Tensor, gradient: Tensor | None) -> None:
        weights = self._weights_of(len(theta))
        for held in weights:
            held.read(theta)
        for number, (x, loss, rows) in enumerate(blocks):
            passes = self._passes_of(len(theta), x.shape[-1])
            passes[0].feed(x)
            for layer in passes:
                layer.forward()
            value = torch.empty_like(nll) if number else nll
            passes[-1].end(loss, rows, value)
            if gradient is not None:
                _backward(passes, 1.0 if number else 0.0)
            if number:
                nll.add_(value)
        if gradient is not None:
            for held in weights:
                held.write(gradient)

    def _split(self, x: Tensor, y: Tensor) -> list[Block]:
        most = self.most_rows or block_rows(self.layers, self.shape, x.device.type)
        blocks = []
        for first, last in even_parts(len(x), most):
            part = x[first:last]
            part = part.permute(1, 2, 3, 0) if self.image else part.T
            empty = -(last - first) % LINE
            filled = functional.pad(part, (0, empty if empty * LINE <= last - first else 0)).contiguous()
            blocks.append((filled, loss_of(self.likelihood, y[first:last], x.dtype), last - first))
        return blocks

    def _weights_of(self, walks: int) -> list[Weights]:
        if walks not in self._weights:
            if len(self._weights) == 4:  # walks of a few numbers only; do not hold buffers of all that ever came
                self._weights.clear()
                self._passes.clear()
            self._weights[walks] = [Weights(layer, walks, self.x, i == 0) for i, layer in enumerate(self.layers)]
        return self._weights[walks]

    def _passes_of(self, walks: int, rows: int) -> list[LayerPass]:
        key = walks, rows
        if key not in self._passes:
            if len(self._passes) == 8:
                self._passes.clear()
            shape, passes = self.shape, []
            for weights in self._weights_of(walks):
                passes.append(LayerPass(weights, shape, rows, self.x, passes[-1] if passes else None))
                shape = passes[-1].output_shape
            self._passes[key] = passes
        return self._passes[key]


def _backward(passes: list[LayerPass], share: float) -> None:
    """Add the slopes of weights to `share` times what they hold."""
    passes[-1].backward(share)
    for layer in passes[-2::-1]:
        layer.backward_activation()
        layer.backward(share)


def even_parts(count: int, most: int) -> list[tuple[int, int]]:
    """Bounds of the fewest parts of at most `most`, as even as they can be."""
    parts = -(-count // most)
    bounds = [count * i // parts for i in range(parts + 1)]
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def block_rows(layers: tuple[Layer, ...], shape: tuple[int, ...], device: str = "cpu") -> int:
    """Rows of a block: what one walk needs between its layers fits the cache."""
    fewest = LINE if layers[0].window else 2 * LINE
    return max(fewest, BLOCK_ELEMENTS[_kind(device, layers)] // _elements(layers, shape) // LINE * LINE)


def chunk_walks(layers: tuple[Layer, ...], shape: tuple[int, ...], rows: int, device: str = "cpu") -> int:
    """Walks of a chunk: what they need between their layers and for their weights fits the cache."""
    weights = sum(2 * layer.inputs * layer.outputs for layer in layers)
    fewest, most = CHUNK_WALKS["cpu" if device == "cpu" else "cuda"]
    elements = _elements(layers, shape) * rows + weights
    return max(fewest, min(most, CHUNK_ELEMENTS[_kind(device, layers)] // elements))


def _kind(device: str, layers: tuple[Layer, ...]) -> str:
    # The windows of convolutions are written and read once more, and want a cache that is nearer.
    return ("cpu" if device == "cpu" else "cuda") + (" images" if layers[0].window else "")


def _elements(layers: tuple[Layer, ...], shape: tuple[int, ...]) -> int:
    """Elements between the layers of one walk for one row."""
    total = 0
    for number, layer in enumerate(layers):
        positions = layer.window.positions(shape[-2], shape[-1]) if layer.window else ()
        columns = layer.inputs if number else 0  # the first layer's are shared by all walks
        total += (columns + layer.outputs) * math.prod(positions)
        pool = layer.pool.size if layer.pool else (1, 1)
        shape = (layer.outputs, *(n // k for n, k in zip(positions, pool, strict=False)))
    return total
