"""Elementwise activations with their derivatives, written into buffers that exist already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    r"""The function $\phi(z) = p\, s(q z) + r$ through a core function s that is fast.

    Only s runs over the activations; scale and shift are taken into the weights on both sides, which are far fewer.
    """

    forward: Callable[[Tensor, Tensor], None]
    """(z, out): out = s(z)."""
    backward: Callable[[Tensor, Tensor], None]
    """(slope, saved): slope *= s'(z), in place."""
    saves_input: bool = False
    """`saved` is z; otherwise s(z)."""
    inner: float = 1.0
    """q."""
    outer: float = 1.0
    """p."""
    shift: float = 0.0
    """r."""


def _copy(z: Tensor, out: Tensor) -> None:
    out.copy_(z)


def _keep(slope: Tensor, saved: Tensor) -> None:
    """The derivative of the identity is one."""


def _sigmoid(z: Tensor, out: Tensor) -> None:
    torch.sigmoid(z, out=out)


def _sigmoid_slope(slope: Tensor, saved: Tensor) -> None:
    aten.sigmoid_backward.grad_input(slope, saved, grad_input=slope)


def _relu(z: Tensor, out: Tensor) -> None:
    torch.clamp_min(z, 0, out=out)


def _relu_slope(slope: Tensor, saved: Tensor) -> None:
    aten.threshold_backward.grad_input(slope, saved, 0, grad_input=slope)


def _gelu(z: Tensor, out: Tensor, approximate: str) -> None:
    # oneDNN, which serves gelu in float32, ignores the strides of `out` (torch 2.13).
    out.copy_(functional.gelu(z, approximate=approximate))


def _gelu_slope(slope: Tensor, saved: Tensor, approximate: str) -> None:
    aten.gelu_backward.grad_input(slope, saved, approximate=approximate, grad_input=slope)


def _silu(z: Tensor, out: Tensor) -> None:
    aten.silu.out(z, out=out)


def _silu_slope(slope: Tensor, saved: Tensor) -> None:
    aten.silu_backward.grad_input(slope, saved, grad_input=slope)


def _softplus(z: Tensor, out: Tensor, beta: float, threshold: float) -> None:
    aten.softplus.out(z, beta, threshold, out=out)


def _softplus_slope(slope: Tensor, saved: Tensor, beta: float, threshold: float) -> None:
    aten.softplus_backward.grad_input(slope, saved, beta, threshold, grad_input=slope)


def _elu(z: Tensor, out: Tensor, alpha: float) -> None:
    aten.elu.out(z, alpha, out=out)


def _elu_slope(slope: Tensor, saved: Tensor, alpha: float) -> None:
    aten.elu_backward.grad_input(slope, alpha, 1, 1, True, saved, grad_input=slope)


def _leaky(z: Tensor, out: Tensor, negative: float) -> None:
    aten.leaky_relu.out(z, negative, out=out)


def _leaky_slope(slope: Tensor, saved: Tensor, negative: float) -> None:
    aten.leaky_relu_backward.grad_input(slope, saved, negative, True, grad_input=slope)


IDENTITY = Activation(_copy, _keep)
SIGMOID = Activation(_sigmoid, _sigmoid_slope)
# tanh z = 2 sigmoid(2 z) - 1: torch's sigmoid runs five times as fast as its tanh on a CPU, and both are right to a few
# units of the last place of 1, which is what the next layer's sum rounds to.
TANH = Activation(_sigmoid, _sigmoid_slope, inner=2.0, outer=2.0, shift=-1.0)
RELU = Activation(_relu, _relu_slope)
SILU = Activation(_silu, _silu_slope, saves_input=True)


def activation_of(module: nn.Module) -> Activation | None:
    """The activation of a torch module, or None if it is not one of those known here."""
    kind = type(module)
    fixed = {nn.Tanh: TANH, nn.Sigmoid: SIGMOID, nn.ReLU: RELU, nn.SiLU: SILU}
    if kind in fixed:
        return fixed[kind]
    if isinstance(module, nn.GELU) and kind is nn.GELU:
        mode = module.approximate
        return Activation(partial(_gelu, approximate=mode), partial(_gelu_slope, approximate=mode), saves_input=True)
    if isinstance(module, nn.Softplus) and kind is nn.Softplus:
        shape = {"beta": module.beta, "threshold": module.threshold}
        return Activation(partial(_softplus, **shape), partial(_softplus_slope, **shape), saves_input=True)
    # A negative slope at or below zero would need the input, too; such networks are left to the general forms.
    if isinstance(module, nn.ELU) and kind is nn.ELU and module.alpha > 0:
        return Activation(partial(_elu, alpha=module.alpha), partial(_elu_slope, alpha=module.alpha))
    if isinstance(module, nn.LeakyReLU) and kind is nn.LeakyReLU and module.negative_slope > 0:
        negative = module.negative_slope
        return Activation(partial(_leaky, negative=negative), partial(_leaky_slope, negative=negative))
    return None
