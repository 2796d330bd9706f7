"""The gradient of many parameter vectors as one compiled graph: for networks whose passes are many small operations."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pipeline.bayes.trees import Tree, leaves

BACKEND = "inductor"
"""What compiles the graph; torch's other backends serve tests."""

Many = Callable[[Tensor, Tree, Tensor], tuple[Tensor, Tensor]]
"""theta (W, D), inputs, targets -> gradient (W, D), summed NLL (W,)."""

log = logging.getLogger(__name__)


class Compiled:
    """A function of many parameter vectors, traced to one graph for each shape it is called with, and compiled.

    The graph is recorded while the function runs, so that any module will do that torch.func takes: reading its source,
    as torch.compile does by itself, breaks at context managers and silently leaves everything uncompiled. The compiled
    code lies in torch's cache (TORCHINDUCTOR_CACHE_DIR), which the processes of a machine share. What fails to compile
    is said, and evaluated as it is from then on.

    Args:
        function: What to compile.
    """

    def __init__(self, function: Many):
        self._function = function
        self._made: dict[Any, Callable[..., tuple[Tensor, Tensor]]] = {}

    def __call__(self, theta: Tensor, x: Tree, y: Tensor) -> tuple[Tensor, Tensor]:
        """See `Many`."""
        tensors = [theta, *leaves(x), y]
        key = tuple(t.shape for t in tensors)
        if key in self._made:
            return self._made[key](*tensors)
        try:
            graph = self._make(tensors, x)
            found = graph(*tensors)  # compiles
            self._made[key] = graph
            return found
        except (RuntimeError, NotImplementedError) as error:
            log.warning("walk.compile: torch.compile failed (%s); going on without it.", str(error).partition("\n")[0])
            self._made[key] = self._flat(x)
            return self._made[key](*tensors)

    def _make(self, tensors: list[Tensor], x: Tree) -> Callable[..., tuple[Tensor, Tensor]]:
        graph = make_fx(self._flat(x))(*tensors)
        return torch.compile(graph, dynamic=False, fullgraph=True, backend=BACKEND)

    def _flat(self, like: Tree) -> Callable[..., tuple[Tensor, Tensor]]:
        """The function with the tensors of the inputs one by one."""

        def flat(theta: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
            parts, y = rest[:-1], rest[-1]
            if isinstance(like, dict):
                return self._function(theta, dict(zip(like, parts, strict=True)), y)
            return self._function(theta, tuple(parts) if isinstance(like, tuple) else parts[0], y)

        return flat


def compiler_found() -> bool:
    """Whether there is a C++ compiler that torch.compile can call."""
    command = os.environ.get("CXX", "g++" if shutil.which("g++") else "clang++")
    if shutil.which(command) is None:
        log.warning("walk.compile: no C++ compiler was found; going on without torch.compile.")
        return False
    return True
