"""Weights without a scale of their own: what they feed is normalised, so that a prior around 0 shrinks them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.bayes.params import Network
from pipeline.bayes.trees import Tree, take_rows
from pipeline.errors import few
from pipeline.own_code import off_stdout

SHRUNK = 1 / 3
"""Root mean square against that at the start below which the prior has shrunk them, and not the data."""
WEAK = 1e-4
"""Prior precision that costs such weights less than a nat for some thousand of them."""
_SAME = 1e-3


def scale_free(network: Network, x: Tree) -> dict[str, list[str]]:
    """Layers that ignore the scale of what they are given, and the walked parameters that lie before them.

    Found by trying every layer on twice its input, not by its name.

    Args:
        network: At the values to try; parameters far below the scale of their start are hard to tell.
        x: Inputs; the first two rows are used.
    """
    found: list[tuple[str, Tensor]] = []

    def hook(name: str) -> Any:
        def look(module: torch.nn.Module, args: Any, output: Any) -> None:
            plain = len(args) == 1 and isinstance(args[0], Tensor) and args[0].is_floating_point()
            if plain and isinstance(output, Tensor) and args[0].requires_grad and _ignores_scale(module, args[0]):
                found.append((name, args[0]))

        return look

    leaf = network.theta().requires_grad_(True)
    modules = [(name, module) for name, module in network.module.named_modules() if not any(module.children())]
    hooks = [module.register_forward_hook(hook(name)) for name, module in modules]
    try:
        with torch.enable_grad(), off_stdout():
            network.outputs(leaf, take_rows(x, slice(0, 2)))
    finally:
        for handle in hooks:
            handle.remove()
    reached = torch.zeros_like(leaf, dtype=torch.bool)
    for _, given in found:
        (slope,) = torch.autograd.grad(given.square().sum(), leaf, retain_graph=True, allow_unused=True)
        reached |= slope != 0 if slope is not None else False
    parts = zip(network.layout.names, reached.split(network.layout.sizes), strict=True)
    return {"layers": [name for name, _ in found], "parameters": [name for name, part in parts if part.any()]}


def _ignores_scale(module: torch.nn.Module, given: Tensor) -> bool:
    with torch.no_grad():
        one, twice, other = (module.forward(value) for value in (given, 2 * given, given.flip(-1) + given.square()))
    size = one.abs().max()
    return bool((one - twice).abs().max() <= _SAME * size and (one - other).abs().max() > 0.1 * size)


def shrinkage(network: Network, names: list[str], start: Tensor, theta: Tensor) -> float:
    """Root mean square of named parameters at theta against that at the start, both (D,)."""
    before, after = network.layout.split(start), network.layout.split(theta)
    squares = [sum(float(at[name].square().sum()) for name in names) for at in (before, after)]
    return (squares[1] / max(squares[0], 1e-300)) ** 0.5


def scale_note(info: dict[str, Any], parameters: list[dict[str, Any]]) -> str | None:
    """What to tell a person whose prior has shrunk weights without a scale; None if it has not.

    Args:
        info: `map.json`.
        parameters: Of `map.json`: names of all walked parameters, in order.
    """
    free = info.get("scale_free")
    if not free or free["shrinkage"] > SHRUNK:
        return None
    names, layers = free["parameters"], free["layers"]
    behind = [entry["name"] for entry in parameters if entry["name"] not in names]
    weak = ", ".join([f"'{name}': 1.0" for name in behind[:4]] + [f"'.*': {WEAK:.1e}"])
    only = f", or walk only what lies behind ({'|'.join(behind[:4])} in model.parameters)" if behind else ""
    return (
        f"Warning: the prior has shrunk weights before {few(layers)} by {1 / max(free['shrinkage'], 1e-9):.0f} times "
        f"({few(names)}). These layers ignore the scale of what they are given, so that only the prior holds it, and "
        f"small weights make the posterior narrow (largest curvature {info['lambda_max']:.1e}). Give them a weak "
        f"prior, prior.precision: {{{weak}}}{only}."
    )
