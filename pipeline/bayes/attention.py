"""Attention that can be differentiated twice, forward and backward, and for many networks at once.

Torch's fused attention kernels have neither second derivatives nor forward-mode ones, so that curvature could not be
computed for any transformer; the plain formula has them all.
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
