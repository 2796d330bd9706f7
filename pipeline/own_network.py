"""What a user's own network must be like, found out before anything is computed or written."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.utils.checkpoint import CheckpointError

from pipeline.bayes.attention import plain_attention
from pipeline.bayes.params import Network
from pipeline.bayes.trees import leaves, row_count, take_rows, to_tensors
from pipeline.data.arrays import map_arrays
from pipeline.data.schema import DataSchema, Part
from pipeline.errors import InputError, few
from pipeline.own_code import cause, off_stdout
from pipeline.streams import stream, torch_generator

_TRIED = 16
"""Rows of every split on which a user's own network is tried."""
_SAME = 1e-4
"""Relative difference up to which two outputs count as the same in float32."""


def call_module(module: nn.Module, x: Any) -> Tensor:
    """Call a network on an input: a mapping by name, a tuple by position."""
    if isinstance(x, dict):
        return module(**x)
    return module(*x) if isinstance(x, tuple) else module(x)


def check_own(module: nn.Module, where: str, schema: DataSchema, outputs: int) -> None:
    """Bring a module to single precision and try it on two rows.

    Its buffers are as before afterwards. Layers that take their shapes from the first call have them then.

    Args:
        module: In eval mode.
        where: Setting that named it, for messages.
        schema: What inputs look like.
        outputs: Columns that it must return.

    Raises:
        InputError: It does not take such rows, returns something else, has no or no finite parameters, mixes rows, is
            random, or cannot be differentiated.
    """
    _check_layers(module, where)
    known = schema.example is not None
    example = to_tensors(schema.example) if known else map_arrays(_example, schema.parts)
    rows = f"rows of shape {schema.input_shape}"
    first = _call(module, example, where, rows)
    if not isinstance(first, Tensor) or tuple(first.shape) != (2, outputs):
        found = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
        raise InputError(
            f"{where} must return {outputs} outputs a row, shape (2, {outputs}) for 2 rows; it returned {found}"
            f"{_way_out(first, outputs)}"
        )
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(f"{where}: {name} begins with values that are not finite")
    _check_repeats(module, example, first, where, rows)
    _check_slope(module, example, where)


def check_rows(network: Network, architecture: str, x: Any, what: str) -> None:
    """Try a user's own network on the first rows, and on those with the smallest and largest token numbers.

    Args:
        network: It, at the values to try.
        architecture: The setting `model.architecture`; a built-in network is not tried.
        x: Arrays with rows first.
        what: What the rows are, for messages.

    Raises:
        InputError: It fails on some row, such as a token number beyond its table, or gives what is not finite.
    """
    if not architecture.startswith("python:"):
        return
    where, theta = f"model.architecture: {architecture}", network.theta()
    rows, tokens = set(range(min(row_count(x), _TRIED))), []
    for leaf in leaves(x) if row_count(x) else ():
        if leaf.dtype.kind in "iu" and leaf.size:
            flat = leaf.reshape(len(leaf), -1)
            rows |= {int(flat.max(axis=1).argmax()), int(flat.min(axis=1).argmin())}
            tokens.append(f"{flat.min()} to {flat.max()}")
    for row in sorted(rows):
        try:
            with torch.no_grad(), off_stdout():
                part = to_tensors(take_rows(x, slice(row, row + 1)), network.dtype, network.device)
                outputs = network.outputs(theta, part)
        except (RuntimeError, IndexError, ValueError) as error:
            held = f"; token numbers there go from {', '.join(tokens)}" if tokens else ""
            raise InputError(f"{where} does not take {what} row {row}: {cause(error)}{held}") from error
        if not torch.isfinite(outputs).all():
            raise InputError(f"{where} gives outputs that are not finite for {what} row {row}")


def _way_out(first: Any, outputs: int) -> str:
    if isinstance(first, Tensor):
        one = outputs == 2 and tuple(first.shape) == (2, 1)
        return ". For one output that is the logit of the second class, set likelihood.kind: bernoulli" if one else ""
    return ". Return a tensor, a tuple that begins with it, or a dict that names it 'logits'"


def check_gradient(network: Network, architecture: str, x: Any) -> None:
    """Compare the gradient of a user's own network with differences of its outputs, on the first rows.

    What is detached on the way, or has a derivative that is not its own, changes the outputs without a gradient that
    could correct it, and the walk would leave the fiber without noticing.

    Args:
        network: It, in double precision, at the values to try.
        architecture: The setting `model.architecture`; a built-in network is not tried.
        x: Arrays with rows first.

    Raises:
        InputError: They differ, with the names of the parameters.
    """
    if not architecture.startswith("python:"):
        return
    x = to_tensors(take_rows(x, slice(0, 4)), network.dtype, network.device)
    generator = torch_generator(stream(0, "gradient"))
    # Off the very point: zeros, as in biases and empty pixels, lie on the kinks of ReLU.
    theta = network.theta()
    theta = theta + 1e-3 * torch.randn(theta.shape, generator=generator).to(theta)
    direction = torch.randn(theta.shape, generator=generator).to(theta)
    outputs, weights, gradient = _pull_back(network, architecture, theta, x, generator)
    slope = gradient * direction
    largest = float(outputs.detach().abs().max())

    def agrees(part: Tensor) -> bool:
        expected, along = float(slope[part].sum()), torch.zeros_like(theta)
        along[part] = direction[part]
        for step, tolerance in ((1e-6, 0.01), (1e-3, 0.1)):  # the second for what rounds to single precision
            found = float((_change(network, theta, step * along, x) * weights).sum()) / (2 * step)
            if abs(found - expected) <= tolerance * max(abs(found), abs(expected)) + 1e-7 * largest:
                return True
        return False

    def moves(part: Tensor) -> bool:
        along = torch.zeros_like(theta)
        along[part] = 1e-6 * direction[part]
        return float(_change(network, theta, along, x).abs().max()) > 1e-10 * largest

    bounds = torch.arange(len(theta), device=theta.device)
    parts = list(zip(network.layout.names, bounds.split(network.layout.sizes), strict=True))
    # A small parameter without any gradient is lost in the sum over all.
    names = [name for name, part in parts if not slope[part].any() and moves(part)]
    if names or not agrees(bounds):
        names = names or [name for name, part in parts if not agrees(part)] or ["its parameters"]
        raise InputError(
            f"model.architecture: {architecture}: its outputs change with {few(names, 4)} in another way than their "
            "gradient says, so that a walk could not be held on the fiber. Something in forward is detached "
            "(torch.no_grad, .detach(), .item(), numpy) or has a gradient that is not its own; let the gradient pass, "
            "or leave these parameters out with model.parameters"
        )


def gradient_seconds(network: Network, x: Any) -> float:
    """Seconds that the gradient of one row takes in this process, from a pass over the first rows."""
    some = to_tensors(take_rows(x, slice(0, 8 * _TRIED)), network.dtype, network.device)  # more than their fixed cost
    taken = []
    for _ in range(2):  # the first call prepares what later ones find
        began = time.monotonic()
        leaf = network.theta().requires_grad_(True)
        with torch.enable_grad(), off_stdout():
            torch.autograd.grad(network.outputs(leaf, some).sum(), leaf)
        taken.append(time.monotonic() - began)
    return min(taken) / row_count(some)


def _pull_back(
    network: Network, architecture: str, theta: Tensor, x: Any, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, random weights of them, and the gradient of the weighted sum, (D,). Raises InputError."""
    leaf = theta.clone().requires_grad_(True)
    try:
        with torch.enable_grad(), off_stdout():
            outputs = network.outputs(leaf, x)
            weights = torch.randn(outputs.shape, generator=generator).to(theta)
            return outputs, weights, torch.autograd.grad((outputs * weights).sum(), leaf)[0]
    except RuntimeError as error:
        why = cause(error)
        if isinstance(error, CheckpointError):  # its words are a page long, and about something else
            why = "it uses gradient checkpointing (torch.utils.checkpoint). Turn that off; it changes no output"
        raise InputError(
            f"model.architecture: {architecture} cannot be differentiated by its parameters: {why}"
        ) from error


def _change(network: Network, theta: Tensor, along: Tensor, x: Any) -> Tensor:
    """Outputs a step ahead less those a step behind."""
    with torch.no_grad(), off_stdout():
        return network.outputs(theta + along, x) - network.outputs(theta - along, x)


def _check_layers(module: nn.Module, where: str) -> None:
    if next(module.parameters(), None) is None:
        raise InputError(f"{where}: the network has no parameters")
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_complex():
            raise InputError(f"{where}: {name} is complex; parameters and buffers must be real numbers")
    for name, layer in module.named_modules():
        hooks = layer._forward_pre_hooks.values()
        if isinstance(layer, _SpectralNorm) or any(isinstance(hook, SpectralNorm) for hook in hooks):
            raise InputError(
                f"{where}: {name} is spectral_norm, which follows the weights in training mode only; remove it with "
                "torch.nn.utils.parametrize.remove_parametrizations or remove_spectral_norm: the weights stay"
            )
        by_batch = isinstance(layer, _NormBase) and not layer.track_running_stats
        if by_batch and not isinstance(layer, (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)):
            raise InputError(
                f"{where}: {name} normalises by the batch even in eval mode, so that rows depend on each other; "
                "set track_running_stats=True or use LayerNorm or GroupNorm"
            )
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.max_norm is not None:
            raise InputError(
                f"{where}: {name} has max_norm, which rewrites its weights whenever it is called; leave max_norm out"
            )
        if isinstance(layer, nn.Embedding):
            layer.padding_idx = None  # it only hides the gradient of a row that the outputs may depend on
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
            layer.sparse = False  # the same gradient, as a tensor that can be joined with the others
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise InputError(f"{where}: no parameter has requires_grad, so that nothing is left to walk")
    module.float()


def _example(part: Part) -> Tensor:
    """Two different rows of small numbers, or of token 1 and masks that hide nothing."""
    if part.dtype != "float32" and part.dtype != "float64":
        return torch.ones((2, *part.shape), dtype=getattr(torch, part.dtype))
    return torch.randn((2, *part.shape), generator=torch_generator(stream(0, "example")))


def _call(module: nn.Module, x: Any, where: str, what: str) -> Tensor:
    # A layer that takes its shapes from the first call has nothing to be kept before it.
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers() if not is_lazy(buffer)}
    try:
        with torch.no_grad(), off_stdout(), plain_attention():
            result = call_module(module, x)
    except (Exception, SystemExit) as error:
        raise InputError(f"{where} does not take {what}: {cause(error)}{_hint(error)}") from error
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if name in buffers and buffer.shape == buffers[name].shape:
                buffer.copy_(buffers[name])
    return result


def _hint(error: BaseException) -> str:
    text = str(error)
    if "indices" in text and "Long" in text:  # the words of torch's embedding
        return "; token numbers come as named inputs: arrays x.NAME of an npz file, or a mapping from a python: source"
    fixed = "; parameters come in single and in double precision: in forward, use the number format of a parameter"
    return fixed if "dtype" in text else ""


def _check_repeats(module: nn.Module, example: Any, first: Tensor, where: str, rows: str) -> None:
    """Equal rows must give equal outputs, whatever stands beside them and however often they are asked for."""
    if not _close(_call(module, example, where, rows), first):
        raise InputError(
            f"{where} gives other outputs when it is called again with the same rows, in eval mode too; take what is "
            "random out of its forward (dropout as a layer is off in eval mode), and what changes its input in place"
        )
    single = _call(module, map_arrays(lambda part: part[:1], example), where, "a single row")
    if single.shape != first[:1].shape or not _close(single, first[:1]):
        raise InputError(
            f"{where}: the outputs of a row depend on the rows beside it, so that no likelihood of a row exists; "
            "normalise by stored statistics (BatchNorm in eval mode) or within the row"
        )


def _check_slope(module: nn.Module, example: Any, where: str) -> None:
    """The outputs must have a gradient by the parameters."""
    free = [parameter for parameter in module.parameters() if parameter.requires_grad]
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        with torch.enable_grad(), off_stdout(), plain_attention():
            found = torch.autograd.grad(call_module(module, example).sum(), free, allow_unused=True)
    except RuntimeError as error:
        raise InputError(f"{where} cannot be differentiated by its parameters: {cause(error)}") from error
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])
    if all(slope is None for slope in found):
        raise InputError(f"{where}: no output depends on any parameter")


def _close(one: Tensor, other: Tensor) -> bool:
    scale = float(other.abs().max()) if other.numel() else 0.0
    return torch.allclose(one, other, rtol=_SAME, atol=_SAME * max(scale, 1e-6), equal_nan=True)
