"""Inputs of a network: one array, a tuple of arrays, or a mapping of named arrays, all with rows on the first axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Tree = Any
"""One array, a tuple of arrays, or a dict of named arrays."""


def map_tree(function: Callable[[Any], Any], tree: Tree) -> Tree:
    """Apply a function to every array of the tree and keep its structure."""
    if isinstance(tree, dict):
        return {name: function(leaf) for name, leaf in tree.items()}
    if isinstance(tree, (tuple, list)):
        return tuple(function(leaf) for leaf in tree)
    return function(tree)


def leaves(tree: Tree) -> list[Any]:
    """All arrays of the tree, in its own order."""
    if isinstance(tree, dict):
        return list(tree.values())
    return list(tree) if isinstance(tree, (tuple, list)) else [tree]


def row_count(tree: Tree) -> int:
    """Number of rows."""
    return len(leaves(tree)[0])


def take_rows(tree: Tree, index: Any) -> Tree:
    """Rows by number, mask or slice."""
    return map_tree(lambda leaf: leaf[index], tree)


def slice_rows(tree: Tree, first: int, last: int) -> Tree:
    """Rows first .. last - 1, as views."""
    return take_rows(tree, slice(first, last))


def to_tensors(tree: Tree, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Tree:
    """Tensors on a device. Floating-point arrays take `dtype`; whole numbers (token ids, masks) stay what they are."""

    def convert(leaf: Any) -> Tensor:
        if isinstance(leaf, np.ndarray) and not leaf.flags.writeable:
            leaf = leaf.copy()  # arrays from shared memory are read-only, which torch does not support
        tensor = torch.as_tensor(leaf)
        return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else tensor.dtype)

    return map_tree(convert, tree)
