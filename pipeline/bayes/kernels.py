"""Gradients of the summed negative log likelihood at many parameter vectors: three forms, and the choice between them.

All forms give the same values up to rounding. `batched` writes the passes of plain chains of layers out as batched
matrix products, `vmap` takes any module, `loop` is the plain reference. Which one runs, and how many walks pass at
once, is decided by shapes and never by timing: batch shapes change rounding, and a run must give the same draws again.
"""

from __future__ import annotations

import logging
import os
import shutil

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from pipeline.bayes.batched import BatchedChain, even_parts
from pipeline.bayes.chain import parse_chain
from pipeline.bayes.likelihood import Likelihood
from pipeline.bayes.params import Network
from pipeline.bayes.target import NllGradient
from pipeline.bayes.trees import Tree, row_count, take_rows
from pipeline.errors import InputError

FORMS = ("batched", "vmap", "loop")

LOOP_FROM = 1 << 20
"""Rows times parameters from which a loop over walks beats vmap on a CPU."""
VMAP_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 28}
"""Most elements between the layers of one chunk of walks under vmap."""

log = logging.getLogger(__name__)


def choose_form(
    module: nn.Module, rows: int, dim: int, device: str | torch.device, compile: bool = False, batches: bool = True
) -> str:
    """The form that measures fastest for this kind of network; a rule of shapes, never of timing.

    Args:
        module: The network.
        rows: Data rows in one gradient.
        dim: Number of walked parameters.
        device: Where it is computed.
        compile: Whether the form may be compiled.
        batches: Whether torch.func takes the network; see `Network.batches`.
    """
    if not batches:
        return "loop"
    if parse_chain(module, dim) is not None:
        return "batched"
    # One gradient of a larger network keeps a CPU core busy, and vmap's batching costs it more than it saves.
    alone = torch.device(device).type == "cpu" and rows * dim > LOOP_FROM
    return "loop" if alone and not compile else "vmap"


def compile_pays(evaluations: int, rows: int, dim: int) -> bool:
    """Whether `vmap` under torch.compile repays its compile time; arithmetic on the planned work, never timing.

    About 6 * rows * dim operations a gradient at 20 Gflop/s in eager mode, of which compiling saves two fifths, against
    a minute for the compiler.
    """
    return evaluations * (6.0 * rows * dim / 20e9) * 0.4 > 60


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
        return _Vmap(network, likelihood, x, y, compile and _compiler_found())
    if form == "loop":
        return _Loop(network, likelihood, x, y)
    raise InputError(f"walk.form must be one of {', '.join(FORMS)}, got '{form}'.")


class _General:
    """What the forms for any module share: the NLL of one parameter vector."""

    def __init__(self, network: Network, likelihood: Likelihood, x: Tree, y: Tensor):
        self.network, self.likelihood, self.x, self.y = network, likelihood, x, y

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


class _Vmap(_General):
    """torch.func over chunks of walks; any module without in-place buffers."""

    def __init__(self, network: Network, likelihood: Likelihood, x: Tree, y: Tensor, compile: bool):
        super().__init__(network, likelihood, x, y)
        self._eager = vmap(grad_and_value(self._nll), in_dims=(0, None, None), randomness="error")
        self._many = torch.compile(self._eager, dynamic=False) if compile else self._eager
        self._activations = _activation_elements(network, x)

    def __call__(self, theta: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, y = self._rows(rows)
        most = VMAP_ELEMENTS["cpu" if theta.device.type == "cpu" else "cuda"] // (
            self._activations * row_count(x) + theta.shape[1]
        )
        chunk = max(4, min(128, most))
        parts = [self._run(theta[a:b], x, y) for a, b in even_parts(len(theta), chunk)]
        return torch.cat([g for g, _ in parts]), torch.cat([v for _, v in parts])

    def _run(self, theta: Tensor, x: Tree, y: Tensor) -> tuple[Tensor, Tensor]:
        if self._many is not self._eager:
            try:
                return self._many(theta, x, y)
            except RuntimeError as error:
                log.warning("torch.compile failed (%s); going on without it.", str(error).partition("\n")[0])
                self._many = self._eager
        return self._eager(theta, x, y)


def _activation_elements(network: Network, x: Tree) -> int:
    """Elements of all layer outputs for one row of one parameter vector."""
    total = 0

    def count(module: nn.Module, args: tuple, output: object) -> None:
        nonlocal total
        total += output.numel() if isinstance(output, Tensor) else 0

    hooks = [m.register_forward_hook(count) for m in network.module.modules() if not any(m.children())]
    try:
        with torch.no_grad():
            network.outputs(network.theta(), take_rows(x, slice(0, 1)))
    finally:
        for hook in hooks:
            hook.remove()
    return total


def _compiler_found() -> bool:
    """Whether there is a C++ compiler that torch.compile can call."""
    command = os.environ.get("CXX", "g++" if shutil.which("g++") else "clang++")
    if shutil.which(command) is None:
        log.warning("walk.compile: no C++ compiler was found; going on without torch.compile.")
        return False
    return True
