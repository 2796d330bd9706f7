"""A network as a function of one flat parameter vector, in one fixed order."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap

from pipeline.bayes.attention import may_use_attention, on_cudnn, plain_attention, without_cudnn
from pipeline.bayes.casts import AsDouble
from pipeline.bayes.chain import parse_chain
from pipeline.bayes.plain import differentiates_twice
from pipeline.bayes.trees import Tree, take_rows
from pipeline.errors import InputError, few

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParameterLayout:
    """Where each named parameter lies in the flat vector: in the order of `nn.Module.named_parameters`."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def dim(self) -> int:
        """Length D of the flat vector."""
        return sum(self.sizes)

    def split(self, theta: Tensor) -> dict[str, Tensor]:
        """Named views of flat vectors: (..., D) -> {name: (..., *shape)}."""
        parts = theta.split(self.sizes, dim=-1)
        lead = theta.shape[:-1]
        triples = zip(self.names, self.shapes, parts, strict=True)
        return {name: part.reshape(lead + shape) for name, shape, part in triples}

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Inverse of `split` for one vector: {name: shape} -> (D,)."""
        return torch.cat([tensors[name].reshape(-1) for name in self.names])

    def to_json(self) -> list[dict[str, Any]]:
        """Names and shapes in order, as plain JSON types."""
        return [{"name": n, "shape": list(s)} for n, s in zip(self.names, self.shapes, strict=True)]

    @classmethod
    def from_json(cls, data: list[dict[str, Any]]) -> ParameterLayout:
        """Inverse of `to_json`."""
        return cls(tuple(d["name"] for d in data), tuple(tuple(d["shape"]) for d in data))


class Network:
    """A module as a pure function of one flat vector of its selected parameters.

    Parameters that the regular expression does not select, and all buffers, are held fixed. The module is put in eval
    mode: BatchNorm uses its stored statistics and dropout is off. A tied parameter appears once, under its first name.
    Where some parameters require a gradient and others do not, those that do not are held fixed too.

    Args:
        module: Any torch module that returns one tensor of shape (rows, outputs).
        parameters: Regular expression; a parameter is walked if it is found anywhere in its name.
        dtype: Floating-point type of parameters, buffers and inputs.
        device: Where it is computed.

    Raises:
        InputError: The expression matches no parameter.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: str = ".*",
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ):
        named = dict(module.named_parameters())
        free = {name for name, p in named.items() if p.requires_grad} or set(named)
        pattern = re.compile(parameters)
        names = [name for name in named if name in free and pattern.search(name)]
        if not names:
            some = ", ".join([name for name in named if name in free][:5])
            raise InputError(f"model.parameters '{parameters}' matches no parameter of the network. It has: {some} ...")
        self.module = module.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self.dtype, self.device = dtype, torch.device(device)
        named = dict(module.named_parameters())
        chosen = {name: named[name] for name in names}
        if not any(parameter.numel() for parameter in chosen.values()):
            raise InputError(
                f"model.parameters '{parameters}' chooses only parameters without any number ({few(names)}); nothing "
                "is left to walk. Let it match others"
            )
        self.layout = ParameterLayout(tuple(chosen), tuple(tuple(p.shape) for p in chosen.values()))
        self._fixed = {name: p.detach() for name, p in named.items() if name not in chosen}
        self._buffers = dict(module.named_buffers())
        self._also = _other_names(module)
        self._writes: bool | None = None  # whether a call changes buffers; not known before the first
        self._batches: bool | None = None
        self._twice: bool | None = None
        self._elements: int | None = None
        # Whether it asks for single precision by name where all is double; not known before the first call.
        self._casts: bool | None = None if dtype == torch.float64 else False
        self._inside = False  # whether many outputs at once are only to be had within a derivative
        self._attention, self._cudnn = may_use_attention(module), on_cudnn(module, self.device)

    def in_dtype(self, dtype: torch.dtype) -> Network:
        """The same network and the same walked parameters in another floating-point type; this one is used up."""
        names = "|".join(re.escape(name) for name in self.layout.names)
        return Network(self.module, f"^(?:{names})$", dtype, self.device)

    @property
    def dim(self) -> int:
        """Number of walked parameters D."""
        return self.layout.dim

    def theta(self) -> Tensor:
        """The module's present values as one vector, (D,)."""
        named = dict(self.module.named_parameters())
        return self.layout.join({name: named[name].detach() for name in self.layout.names})

    def outputs(self, theta: Tensor, x: Tree) -> Tensor:
        """Network outputs at one parameter vector: (D,) -> (rows, outputs). Differentiable in theta."""
        return self.call(self.layout.split(theta), x)

    def call(self, parameters: Mapping[str, Tensor], x: Tree) -> Tensor:
        """Network outputs for named parameters. A mapping is passed by name, a tuple by position."""
        if self._casts is None:
            try:
                outputs, self._casts = self._call(parameters, x, False), False
                return outputs
            except RuntimeError:
                with suppress(RuntimeError):
                    outputs, self._casts = self._call(parameters, x, True), True
                    return outputs
                raise
        return self._call(parameters, x, self._casts)

    def _call(self, parameters: Mapping[str, Tensor], x: Tree, casts: bool) -> Tensor:
        args, kwargs = ((), x) if isinstance(x, dict) else (x, {}) if isinstance(x, tuple) else ((x,), {})
        buffers = self._buffers
        if self._writes is not False:  # a module that counts its calls, say: every call begins with the stored state
            buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        attention = plain_attention() if self._attention else nullcontext()
        with attention, AsDouble() if casts else nullcontext(), without_cudnn() if self._cudnn else nullcontext():
            values = {**self._fixed, **buffers, **parameters}
            values |= {name: values[first] for name, first in self._also.items()}
            # Not with tie_weights: torch then leaves a layer that is there under two names with the given values.
            outputs = functional_call(self.module, values, args, kwargs, tie_weights=False)
        if self._writes is None:
            self._writes = any(buffer._version for buffer in buffers.values())
        return outputs

    def outputs_many(self, theta: Tensor, x: Tree, chunk: int | None = None) -> Tensor:
        """Network outputs at many parameter vectors: (W, D) -> (W, rows, outputs); `chunk` of them at once."""
        if not self.batches(x):
            return torch.stack([self.outputs(t, x) for t in theta])
        return self._vmapped(theta, x, chunk)

    def batches(self, x: Tree) -> bool:
        """Whether torch.func can evaluate the network for many parameter vectors at once, and differentiate it twice.

        It cannot where control flow depends on values, or where functions have derivatives of their own. Such networks
        are evaluated one after the other by plain autograd. Tried once, on the first two rows of x; plain chains of
        layers need not be tried, and torch loads its compiler for it, which takes two seconds of every process.
        """
        if self._batches is None and parse_chain(self.module, self.dim) is not None:
            self._batches = True
        if self._batches is None:
            few, theta = take_rows(x, slice(0, 2)), self.theta()

            def loss(t: Tensor) -> Tensor:
                return self.outputs(t, few).square().sum()

            both = theta.expand(3, -1).clone()  # not as many as rows, which would hide that torch confuses the two
            try:
                vmap(lambda v: jvp(grad(loss), (theta,), (v,))[1], randomness="error")(both)
                outputs, pull = vjp(lambda t: self.outputs(t, few), theta)  # pyright: ignore[reportAssignmentType]
                vmap(lambda c: pull(c)[0])(outputs.expand(3, *outputs.shape).clone())
                self._inside = not self._vmaps(both, few)
                self._vmapped(both, few)
                self._batches = True
            except Exception as error:  # noqa: BLE001 - whatever the user's code raises there, the plain form may work
                log.info("Evaluated one by one: torch.func refuses the network (%s).", type(error).__name__)
                self._batches = False
        return self._batches

    def twice(self, x: Tree) -> bool:
        """Whether plain autograd differentiates the gradient once more. Tried once, on the first two rows of x."""
        if self._twice is None:
            self._twice = differentiates_twice(self, self.theta(), take_rows(x, slice(0, 2)))
            if not self._twice:
                log.info("Curvature by differences: the gradient of the network cannot be differentiated.")
        return self._twice

    def elements(self, x: Tree) -> int:
        """Elements of all layers' outputs for one row of one parameter vector: what a backward pass holds."""
        if self._elements is None:
            self._elements = self._count(take_rows(x, slice(0, 1)))
        return self._elements

    def _count(self, x: Tree) -> int:
        total = 0

        def count(module: nn.Module, args: tuple, output: object) -> None:
            nonlocal total
            parts = output if isinstance(output, tuple) else (output,)  # recurrent layers give their last state too
            total += sum(part.numel() for part in parts if isinstance(part, Tensor))

        hooks = [m.register_forward_hook(count) for m in self.module.modules() if not any(m.children())]
        try:
            with torch.no_grad():
                self.outputs(self.theta(), x)
        finally:
            for hook in hooks:
                hook.remove()
        return total

    def _vmaps(self, theta: Tensor, x: Tree) -> bool:
        try:
            vmap(lambda t: self.outputs(t, x), randomness="error")(theta)
        except RuntimeError:
            return False
        return True

    def _vmapped(self, theta: Tensor, x: Tree, chunk: int | None = None) -> Tensor:
        # Recurrent layers have no batching rule of their own; within a derivative torch takes them apart first.
        inside = self._inside

        def one(t: Tensor) -> Tensor:
            return vjp(lambda u: self.outputs(u, x), t)[0] if inside else self.outputs(t, x)  # pyright: ignore[reportReturnType]

        return vmap(one, chunk_size=chunk, randomness="error")(theta)

    def state_dict(self, theta: Tensor) -> dict[str, Tensor]:
        """Complete state for `load_state_dict`, with theta (D,) in place of the selected parameters."""
        walked = self.layout.split(theta.detach())
        shared = {id(p): walked[n] for n, p in self.module.named_parameters() if n in walked}
        state: dict[str, Tensor] = self.module.state_dict(keep_vars=True)
        return {name: shared.get(id(value), value).detach().contiguous() for name, value in state.items()}


def _other_names(module: nn.Module) -> dict[str, str]:
    """Further names of parameters and buffers that are tied between layers -> the first name of each.

    A layer that is there twice is one layer: it has one name here, the first.
    """
    first: dict[int, str] = {}
    others: dict[str, str] = {}
    for place, layer in module.named_modules():
        for name, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            full = f"{place}.{name}" if place else name
            if first.setdefault(id(tensor), full) != full:
                others[full] = first[id(tensor)]
    return others
