"""Plain chains of layers, read from a module: what the batched passes can write out by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor, nn

from pipeline.bayes.activations import IDENTITY, Activation, activation_of


@dataclass(frozen=True)
class Window:
    """The geometry of a convolution, (height, width) each."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def positions(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output."""
        sizes = zip((height, width), self.kernel, self.stride, self.padding, strict=True)
        high, wide = ((size + 2 * pad - kernel) // stride + 1 for size, kernel, stride, pad in sizes)
        return high, wide


@dataclass(frozen=True)
class Pool:
    """Pooling over windows that do not overlap."""

    size: tuple[int, int]
    mean: bool
    """Mean of the window; otherwise its maximum."""

    @property
    def count(self) -> int:
        """What the sum over a window is divided by: its size for a mean, one for a maximum."""
        return self.size[0] * self.size[1] if self.mean else 1


@dataclass(frozen=True)
class Layer:
    """A linear layer or convolution with what follows it, by where its parameters lie in the flat vector."""

    inputs: int
    """Columns of the weight matrix: features, or channels times kernel."""
    outputs: int
    """Rows of the weight matrix: features or channels."""
    weight: int
    """Offset of the weight matrix."""
    bias: int | None
    """Offset of the bias, (outputs,)."""
    before: Activation = IDENTITY
    """The activation that made the inputs."""
    after: Activation = IDENTITY
    """The activation of the outputs."""
    window: Window | None = None
    """Set for a convolution."""
    pool: Pool | None = None
    pool_first: bool = False
    """Whether pooling comes before the activation."""

    def weights(self, theta: Tensor) -> Tensor:
        """View of the weight matrices, (W, D) -> (W, outputs, inputs)."""
        row, column = theta.stride()
        size, strides = (len(theta), self.outputs, self.inputs), (row, column * self.inputs, column)
        return theta.as_strided(size, strides, theta.storage_offset() + self.weight * column)

    def biases(self, theta: Tensor) -> Tensor | None:
        """View of the biases, (W, D) -> (W, outputs)."""
        return None if self.bias is None else theta.narrow(1, self.bias, self.outputs)

    @property
    def inner(self) -> float:
        """What the sums are scaled by: q of the activation, and 1 / n where means over n are pooled first."""
        return self.after.inner / (self.pool.count if self.pool and self.pool_first else 1)

    @property
    def passed_on(self) -> Activation:
        """The activation as the next layer's weights take it in: with 1 / n where means over n are pooled after it."""
        if self.pool is None or self.pool_first or self.pool.count == 1:
            return self.after
        return replace(self.after, outer=self.after.outer / self.pool.count)


@dataclass(frozen=True)
class Chain:
    """Reshaping of the inputs, then layers: convolutions first, then linear ones, the last with nothing after it."""

    reshaping: tuple[nn.Module, ...]
    layers: tuple[Layer, ...]


def parse_chain(module: nn.Module, dim: int) -> Chain | None:
    """Read a chain of Linear, Conv2d, pooling and activations with `dim` parameters; None if it is something else."""
    leaves = _leaves(module)
    if leaves is None:
        return None
    start = next((i for i, leaf in enumerate(leaves) if not isinstance(leaf, (nn.Flatten, nn.Unflatten))), len(leaves))
    layers: list[Layer] = []
    offset, image = 0, True  # image: no Flatten or Linear layer yet
    for leaf in leaves[start:]:
        layer = _linear(leaf, offset) or (_convolution(leaf, offset) if image else None)
        if isinstance(leaf, nn.Flatten) and layers and (leaf.start_dim, leaf.end_dim) == (1, -1):
            image = False
        elif layer is not None and not (image and layers and layer.window is None):
            layers.append(replace(layer, before=layers[-1].passed_on if layers else IDENTITY))
            offset += layer.inputs * layer.outputs + (0 if layer.bias is None else layer.outputs)
            image = layer.window is not None
        else:
            changed = _followed(layers[-1], leaf, image) if layers else None
            if changed is None:
                return None
            layers[-1] = changed
    plain = bool(layers) and layers[-1].after is IDENTITY and layers[-1].window is None
    # Tied or fixed parameters show in `dim`. After a last activation no weights are left that could take in its scale.
    return Chain(tuple(leaves[:start]), tuple(layers)) if plain and offset == dim else None


def _followed(layer: Layer, module: nn.Module, image: bool) -> Layer | None:
    """The layer with an activation or pooling after it, or None if that is more than one layer can hold."""
    activation = activation_of(module)
    if activation is not None and layer.after is IDENTITY:
        return replace(layer, after=activation, pool_first=layer.pool is not None)
    pool = _pooling(module)
    return replace(layer, pool=pool) if pool and layer.pool is None and layer.window and image else None


def _linear(module: nn.Module, offset: int) -> Layer | None:
    if type(module) is not nn.Linear:
        return None
    size = module.weight.numel()
    return Layer(module.in_features, module.out_features, offset, None if module.bias is None else offset + size)


def _convolution(module: nn.Module, offset: int) -> Layer | None:
    if type(module) is not nn.Conv2d or module.groups != 1 or module.dilation != (1, 1):
        return None
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        return None
    kernel, stride = cast(tuple[int, int], module.kernel_size), cast(tuple[int, int], module.stride)
    window = Window(kernel, stride, cast(tuple[int, int], module.padding))
    size = module.weight.numel()
    bias = None if module.bias is None else offset + size
    return Layer(size // module.out_channels, module.out_channels, offset, bias, window=window)


def _pooling(module: nn.Module) -> Pool | None:
    if type(module) not in (nn.MaxPool2d, nn.AvgPool2d):
        return None
    pool = cast(nn.MaxPool2d, module)  # both have these attributes
    size, stride = _pair(pool.kernel_size), _pair(pool.stride)
    odd = pool.ceil_mode or _pair(pool.padding) != (0, 0) or _pair(getattr(pool, "dilation", 1)) != (1, 1)
    odd = odd or getattr(pool, "return_indices", False) or getattr(pool, "divisor_override", None) is not None
    return None if odd or stride != size else Pool(size, type(module) is nn.AvgPool2d)


def _pair(value: object) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else cast(tuple[int, int], tuple(cast(tuple, value)))


def _leaves(module: nn.Module) -> list[nn.Module] | None:
    """The modules that do something, in order; None if a hook, or a forward of its own, could do more."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return None
    if type(module) in (nn.Identity, nn.Dropout, nn.Dropout2d):
        return []
    if type(module) is not nn.Sequential:
        return [module]
    parts = [_leaves(child) for child in module]
    return None if None in parts else [leaf for part in parts for leaf in part or []]
