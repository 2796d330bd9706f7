"""Networks: the built-in ones, and the user's own by a factory function and a file of weights."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pipeline.config import ModelConfig
from pipeline.data.arrays import map_arrays
from pipeline.data.schema import DataSchema, Part
from pipeline.errors import InputError
from pipeline.own_code import cause, load_function, off_stdout
from pipeline.own_network import call_module, check_own
from pipeline.resnet import resnet18
from pipeline.streams import torch_generator
from pipeline.weights import load_weights

__all__ = ["build_module", "calibrate_batchnorm", "call_module", "load_weights"]

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "elu": nn.ELU,
}


def build_module(model: ModelConfig, schema: DataSchema, outputs: int, rng: np.random.Generator) -> nn.Module:
    """Build the configured network, checked and in eval mode: BatchNorm is frozen and dropout is off.

    The initial weights are a function of `rng` alone; torch's global random state is left as it was. `model.weights`
    are not loaded here but by `load_weights`.

    Args:
        model: The configuration's model section.
        schema: What inputs look like.
        outputs: Columns that the network must return.
        rng: Source of the initial weights.

    Raises:
        InputError: The network cannot be built, is no module, or does not fit the data.
    """
    with seeded(rng):
        own = model.architecture.startswith("python:")
        module = _own(model.architecture, schema, outputs) if own else _built_in(model, schema, outputs)
        if not _ends_in_linear(module):
            module.register_forward_hook(_plain_output)
        module.eval()
        if own:
            check_own(module, f"model.architecture: {model.architecture}", schema, outputs)
    return module


@contextmanager
def seeded(rng: np.random.Generator) -> Iterator[None]:
    """Run a block with torch's CPU random state drawn from `rng`, and put the old state back."""
    generator = torch_generator(rng, below=2**63 - 1)
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator.get_state())
        yield


@torch.no_grad()
def calibrate_batchnorm(module: nn.Module, x: Any, batch: int = 512) -> None:
    """Set the running statistics of normalisation layers to the average over batches of `x`; everything else stays.

    For networks that are trained from initial weights with frozen statistics: without it, mean 0 and variance 1 are
    frozen, and a deep network does not normalise at all. Does nothing without such layers.

    Args:
        module: The network; left in eval mode.
        x: Training rows as tensors, in the structure of the inputs, of the module's number format.
        batch: Rows of one pass, at least 2.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, _NormBase) and layer.track_running_stats]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain average over batches
        layer.train()
    rows = len(next(iter(x.values())) if isinstance(x, dict) else x[0] if isinstance(x, tuple) else x)
    for first in range(0, max(rows - 1, 1), batch):
        last = first + batch
        call_module(module, map_arrays(lambda part, a=first, b=last: torch.as_tensor(part[a:b]), x))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    module.eval()


def _ends_in_linear(module: nn.Module) -> bool:
    # Its output is plain already, and the fast gradients take no module with hooks: they could change anything.
    return isinstance(module, nn.Sequential) and len(module) > 0 and isinstance(module[-1], nn.Linear)


def _plain_output(module: nn.Module, args: Any, output: Any) -> Any:
    # A forward hook, not a wrapper module: names of parameters stay as the user knows them.
    if hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, dict) and "logits" in output:
        output = output["logits"]
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output[:, None] if isinstance(output, Tensor) and output.ndim == 1 else output


def _built_in(model: ModelConfig, schema: DataSchema, outputs: int) -> nn.Module:
    if not isinstance(schema.parts, Part) or schema.parts.dtype in ("int64", "bool"):
        raise InputError(
            f"model.architecture: {model.architecture} takes one array of numbers, the data have "
            f"{schema.input_shape} of token numbers or several arrays; name your own network as python:MODULE:FUNCTION"
        )
    shape = schema.parts.shape
    activation = _ACTIVATIONS[model.activation]
    if model.architecture == "mlp":
        return _mlp(shape, model.hidden, activation, outputs)
    channels, height, width, first = _image(model.architecture, shape)
    if model.architecture == "conv":
        layers = _conv((channels, height, width), model.hidden, activation, outputs)
    elif model.architecture == "lenet":
        layers = _lenet((channels, height, width), activation, outputs)
    else:
        layers = resnet18(channels, outputs)
    return (
        nn.Sequential(*first, *layers)
        if isinstance(layers, list)
        else nn.Sequential(*first, layers)
        if first
        else layers
    )


def _mlp(
    shape: tuple[int, ...], hidden: tuple[int, ...], activation: Callable[[], nn.Module], outputs: int
) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()] if len(shape) != 1 else []
    width = math.prod(shape)
    for units in hidden:
        layers += [nn.Linear(width, units), activation()]
        width = units
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def _image(architecture: str, shape: tuple[int, ...]) -> tuple[int, int, int, list[nn.Module]]:
    if len(shape) == 2:
        return 1, shape[0], shape[1], [nn.Unflatten(1, (1, shape[0]))]
    if len(shape) == 3:
        if shape[2] in (1, 3, 4) and shape[0] > 4:
            raise InputError(
                f"model.architecture: {architecture} takes (channels, height, width); the data have {shape}"
            )
        return shape[0], shape[1], shape[2], []
    raise InputError(
        f"model.architecture: {architecture} takes images (channels, height, width), the data have rows of "
        f"shape {shape}; use mlp"
    )


def _conv(
    shape: tuple[int, int, int], hidden: tuple[int, ...], activation: Callable[[], nn.Module], outputs: int
) -> list[nn.Module]:
    """3x3 convolutions of stride 2, one for each entry of `hidden`, then one linear layer."""
    channels, height, width = shape
    layers: list[nn.Module] = []
    for filters in hidden:
        layers += [nn.Conv2d(channels, filters, 3, stride=2, padding=1), activation()]
        channels, height, width = filters, (height + 1) // 2, (width + 1) // 2
    return [*layers, nn.Flatten(), nn.Linear(channels * height * width, outputs)]


def _lenet(shape: tuple[int, int, int], activation: Callable[[], nn.Module], outputs: int) -> list[nn.Module]:
    """LeNet-5 with average pooling (LeCun et al. 1998), its last convolution written as a linear layer.

    28 x 28 is padded to 32 x 32 as in the original; images below 12 x 12 are padded in both convolutions.
    """
    channels, height, width = shape
    if min(height, width) < 4:
        raise InputError(f"model.architecture: lenet needs images of at least 4 x 4, the data have {height} x {width}")
    pads = (0 if min(height, width) >= 32 else 2, 0 if min(height, width) >= 12 else 2)
    for pad in pads:
        height, width = (height + 2 * pad - 4) // 2, (width + 2 * pad - 4) // 2
    return [
        *(nn.Conv2d(channels, 6, 5, padding=pads[0]), activation(), nn.AvgPool2d(2)),
        *(nn.Conv2d(6, 16, 5, padding=pads[1]), activation(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(16 * height * width, 120), activation()),
        *(nn.Linear(120, 84), activation(), nn.Linear(84, outputs)),
    ]


def _own(spec: str, schema: DataSchema, outputs: int) -> nn.Module:
    function = load_function(spec, "model.architecture")
    offered = {"inputs": schema.input_shape, "outputs": outputs}
    try:
        with off_stdout():
            module = function(**_accepted(function, offered))
    except (Exception, SystemExit) as error:
        raise InputError(f"model.architecture: {spec} failed: {cause(error)}") from error
    if not isinstance(module, nn.Module) or isinstance(module, torch.jit.ScriptModule):
        raise InputError(
            f"model.architecture: {spec} must return a torch.nn.Module (not a scripted one), it returned a "
            f"{type(module).__name__}"
        )
    _uncompiled(module)
    return module


def _uncompiled(module: nn.Module) -> None:
    """Take back `torch.compile`, under the same names: torch.func goes through the module's own Python."""
    dynamo = sys.modules.get("torch._dynamo")  # slow to import, and there if anything was compiled
    for layer in module.modules():
        layer._compiled_call_impl = None
        if dynamo is not None and isinstance(layer, dynamo.OptimizedModule):
            original: Any = layer._orig_mod
            layer.forward = original.__call__


def _accepted(function: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """What of the offered a function takes: by name, or everything where it takes any name."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # some functions written in C do not tell
        return {}
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
        return offered
    return {name: value for name, value in offered.items() if name in parameters}
