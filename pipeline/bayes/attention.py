"""Attention and recurrence that can be differentiated twice, forward and backward, and for many networks at once.

Torch's fused attention kernels have neither second derivatives nor forward-mode ones, so that curvature could not be
computed for any transformer; the plain formula has them all. CuDNN's recurrent layers have no second derivatives, and
no first ones in eval mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

_FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def may_use_attention(module: nn.Module) -> bool:
    """Whether some layer is, or may call, a fused attention kernel: torch's own attention, or anybody else's layer."""
    return any(isinstance(m, _FUSED) or not type(m).__module__.startswith("torch.nn.") for m in module.modules())


@contextmanager
def plain_attention() -> Iterator[None]:
    """Compute attention by its formula inside the block; what was set before is set again after it."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def on_cudnn(module: nn.Module, device: torch.device) -> bool:
    """Whether some layer would run on cuDNN's recurrent kernels."""
    return device.type == "cuda" and any(isinstance(m, nn.RNNBase) for m in module.modules())


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Compute recurrent layers by torch's own kernels inside the block."""
    with torch.backends.cudnn.flags(enabled=False):
        yield
