"""Gradients of the summed negative log likelihood at many parameter vectors: three forms, and the choice between them.

All forms give the same values up to rounding. `batched` writes the passes of plain chains of layers out as batched
matrix products, `vmap` takes any module, `loop` is the plain reference. Which one runs, and how many walks pass at
once, is decided by shapes and never by timing: batch shapes change rounding, and a run must give the same draws again.
"""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from pipeline.bayes.batched import BatchedChain, even_parts
from pipeline.bayes.chain import parse_chain
from pipeline.bayes.compiled import Compiled, compiler_found
from pipeline.bayes.likelihood import Likelihood
from pipeline.bayes.params import Network
from pipeline.bayes.target import NllGradient
from pipeline.bayes.trees import Tree, row_count, take_rows
from pipeline.errors import InputError

FORMS = ("batched", "vmap", "loop")

LOOP_FROM = 1 << 20
"""Rows times parameters, or rows times elements of all layers, from which a loop over walks beats vmap on a CPU."""
VMAP_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 28}
"""Most elements between the layers of one chunk of walks under vmap."""
ROW_ELEMENTS = {"cpu": 1 << 27, "cuda": 1 << 30}
"""Most elements of all layers that a general form holds of one walk for its backward pass; more rows pass in parts."""
FEWEST_COMPILED = 4
"""Walks from which a call is compiled: single points are evaluated once or twice."""

log = logging.getLogger(__name__)


def choose_form(
    module: nn.Module,
    rows: int,
    dim: int,
    device: str | torch.device,
    compile: bool = False,
    batches: bool = True,
    elements: int = 0,
) -> str:
    """The form that measures fastest for this kind of network; a rule of shapes, never of timing.

    Args:
        module: The network.
        rows: Data rows in one gradient.
        dim: Number of walked parameters.
        device: Where it is computed.
        compile: Whether the form may be compiled.
        batches: Whether torch.func takes the network; see `Network.batches`.
        elements: Elements of all layers for one row; see `Network.elements`.
    """
    if not batches:
        return "loop"
    if parse_chain(module, dim) is not None:
        return "batched"
    # One gradient of a larger network keeps a CPU core busy, and vmap's batching costs it more than it saves.
    alone = torch.device(device).type == "cpu" and rows * max(dim, elements) > LOOP_FROM
    return "loop" if alone and not compile else "vmap"


def plan_form(
    network: Network, x: Tree, rows: int, evaluations: int, compile: bool | Literal["auto"]
) -> tuple[str, bool]:
    """The form for planned work, and whether it is compiled.

    Args:
        network: The network.
        x: A few rows of the inputs.
        rows: Data rows in one gradient.
        evaluations: Gradients of single walks that are planned.
        compile: Whether to compile, or "auto": where the work repays it.
    """
    shape = network.module, rows, network.dim, network.device
    elements, batches = network.elements(x), network.batches(x)
    form = choose_form(*shape, batches=batches, elements=elements)
    pays = compile_pays(evaluations, rows, network.dim, elements) if compile == "auto" else compile
    compiled = pays and choose_form(*shape, compile=True, batches=batches, elements=elements) == "vmap"
    if compile is True and not compiled:
        log.info("walk.compile: the form '%s', which suits this network, has nothing to compile.", form)
    return ("vmap" if compiled else form), compiled


def compile_pays(evaluations: int, rows: int, dim: int, elements: int) -> bool:
    """Whether `vmap` under torch.compile repays its compile time; arithmetic on the planned work, never timing.

    Many small operations gain, by a factor of two to three: those of networks below `LOOP_FROM`, at about five
    nanoseconds an element and 20 Gflop/s. Large ones are as fast in a loop. The compiler takes about half a minute.
    """
    if rows * max(dim, elements) > LOOP_FROM:
        return False
    eager = 5e-9 * rows * elements + 6.0 * rows * dim / 20e9
    return evaluations * eager * 0.5 > 60


def nll_gradient(
    network: Network, likelihood: Likelihood, x: Tree, y: Tensor, *, form: str, compile: bool = False
) -> NllGradient:
    """The gradient of the summed NLL of given rows, as a function of many parameter vectors.

    Args:
        network: The network as a function of theta.
        likelihood: Likelihood of a row.
        x: Inputs, rows on the first axis.
        y: Targets, (rows,).
        form: "batched", "vmap" or "loop"; see `choose_form`.
        compile: Compile the form `vmap`. Needs a C++ compiler, and without one it is noted and left out.

    Returns:
        theta (W, D), rows=None -> (W, D), (W,) in nats per unit and nats. `rows` restricts the sum to these data rows.

    Raises:
        InputError: The form is unknown, or "batched" for a network that is not a plain chain of layers.
    """
    if form == "batched":
        chain = parse_chain(network.module, network.layout.dim)
        if chain is None:
            raise InputError(
                "walk.form 'batched' needs an nn.Sequential of Conv2d, pooling, Linear and elementwise "
                "activations with all of its parameters walked. Use 'vmap', or leave the choice out."
            )
        return BatchedChain(chain, likelihood, x, y)
    if form == "vmap":
        return _InParts(_Vmap(network, likelihood, x, y, compile and compiler_found()))
    if form == "loop":
        return _InParts(_Loop(network, likelihood, x, y))
    raise InputError(f"walk.form must be one of {', '.join(FORMS)}, got '{form}'.")


class _General:
    """What the forms for any module share: the NLL of one parameter vector."""

    def __init__(self, network: Network, likelihood: Likelihood, x: Tree, y: Tensor):
        self.network, self.likelihood, self.x, self.y = network, likelihood, x, y
        self.elements = network.elements(x)

    def _rows(self, rows: Tensor | None) -> tuple[Tree, Tensor]:
        return (self.x, self.y) if rows is None else (take_rows(self.x, rows), self.y[rows])

    def _nll(self, theta: Tensor, x: Tree, y: Tensor) -> Tensor:
        return self.likelihood.nll(self.network.outputs(theta, x), y).sum()


class _Loop(_General):
    """One walk after another by autograd: the reference."""

    def __call__(self, theta: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, y = self._rows(rows)
        gradient, nll = torch.empty_like(theta), theta.new_empty(len(theta))
        for i, start in enumerate(theta.detach()):
            leaf = start.clone().requires_grad_(True)
            with torch.enable_grad():
                value = self._nll(leaf, x, y)
                (gradient[i],) = torch.autograd.grad(value, leaf)
            nll[i] = value.detach()
        return gradient, nll


class _Vmap(_Loop):
    """torch.func over chunks of walks; any module without in-place buffers. A single point is faster without it."""

    def __init__(self, network: Network, likelihood: Likelihood, x: Tree, y: Tensor, compile: bool):
        super().__init__(network, likelihood, x, y)
        self._eager = vmap(grad_and_value(self._nll), in_dims=(0, None, None), randomness="error")
        self._compiled = Compiled(self._eager) if compile else None

    def __call__(self, theta: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if len(theta) == 1:
            return super().__call__(theta, rows)
        x, y = self._rows(rows)
        kind = "cpu" if theta.device.type == "cpu" else "cuda"
        most = VMAP_ELEMENTS[kind] // (self.elements * row_count(x) + theta.shape[1])
        bounds = even_parts(len(theta), max(4, min(128, most)))
        if self._compiled is None or len(theta) < FEWEST_COMPILED:
            parts = [self._eager(theta[a:b], x, y) for a, b in bounds]
            return torch.cat([g for g, _ in parts]), torch.cat([v for _, v in parts])
        gradient, nll = torch.empty_like(theta), theta.new_empty(len(theta))
        size = max(b - a for a, b in bounds)
        for _, last in bounds:  # parts of one size, which may overlap: each size is a graph of its own
            part = slice(max(0, last - size), max(size, last))
            gradient[part], nll[part] = self._compiled(theta[part], x, y)
        return gradient, nll


class _InParts:
    """A general form whose rows pass in even parts where one backward pass over all of them would take much memory."""

    def __init__(self, kernel: _Loop):
        self._kernel = kernel

    def __call__(self, theta: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kind = "cpu" if theta.device.type == "cpu" else "cuda"
        count = len(self._kernel.y) if rows is None else len(rows)
        most = max(1, ROW_ELEMENTS[kind] // max(1, self._kernel.elements))
        if count <= most:
            return self._kernel(theta, rows)
        rows = torch.arange(count, device=theta.device) if rows is None else rows
        gradient, nll = torch.zeros_like(theta), theta.new_zeros(len(theta))
        for first, last in even_parts(count, most):
            part, value = self._kernel(theta, rows[first:last])
            gradient += part
            nll += value
        return gradient, nll
