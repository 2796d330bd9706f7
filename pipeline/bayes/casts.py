"""Networks that name single precision in their forward, such as ``x.float()``, in double precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class AsDouble(TorchFunctionMode):
    """Inside the block, what asks for single precision by name gets double."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch with its number format exchanged."""
        if func is Tensor.float:
            func = Tensor.double
        return func(*(_double(a) for a in args), **{name: _double(a) for name, a in (kwargs or {}).items()})


def _double(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
