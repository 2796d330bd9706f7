"""Trained weights from safetensors files. Pickles are refused: reading one runs code."""

from __future__ import annotations

from collections import defaultdict
from typing import cast

import fsspec
import torch
from fsspec.core import OpenFile
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from pipeline.errors import InputError, few
from pipeline.own_code import cause

_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_WRAPPERS = ("module.", "_orig_mod.")
_CONVERT = "safetensors.torch.save_model(network, 'weights.safetensors')"


def load_weights(module: nn.Module, uri: str) -> None:
    """Load a complete state dict from a .safetensors file (path or URI) into `module`.

    Tied weights may be stored once. Counters of BatchNorm may be absent. Raises InputError that names what is missing,
    unexpected, of another shape or not finite; the module is then as it was.
    """
    state = _read(uri)
    expected = {name: value for name, value in module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    state = _without_wrapper(state, expected)
    _check_names(state, expected, uri)
    for name, value in state.items():
        if value.shape != expected[name].shape:
            raise InputError(
                f"model.weights: {uri}: {name} has shape {tuple(value.shape)}, not {tuple(expected[name].shape)}"
            )
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise InputError(f"model.weights: {uri}: {name} holds values that are not finite")
    module.load_state_dict(state, strict=False)


def _read(uri: str) -> dict[str, Tensor]:
    if uri.lower().endswith(_PICKLES):
        raise InputError(f"model.weights: {uri} is a pickle, which may run code; save it once with {_CONVERT}")
    try:
        with cast(OpenFile, fsspec.open(uri, "rb")) as file:
            data = file.read()
    except FileNotFoundError as error:
        raise InputError(f"model.weights: {uri}: no such file") from error
    except IsADirectoryError as error:
        raise InputError(f"model.weights: {uri} is a folder; name a .safetensors file in it") from error
    except Exception as error:
        raise InputError(f"model.weights: {uri} cannot be read: {cause(error)}") from error
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(
            f"model.weights: {uri} is no safetensors file ({cause(error)}); save it with {_CONVERT}"
        ) from error


def _without_wrapper(state: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that the network has, where the file was saved from a compiled or data-parallel wrapper of it."""
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in state) and not any(name.startswith(prefix) for name in expected):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
        elif all(name.startswith(prefix) for name in expected) and not any(name.startswith(prefix) for name in state):
            state = {prefix + name: value for name, value in state.items()}
    return state


def _check_names(state: dict[str, Tensor], expected: dict[str, Tensor], uri: str) -> None:
    tied: dict[int, list[str]] = defaultdict(list)
    for name, value in expected.items():
        tied[id(value)].append(name)
    unexpected = sorted(set(state) - set(expected))
    missing = [
        name
        for name, value in expected.items()
        if name not in state
        and not name.endswith("num_batches_tracked")
        and not any(other in state for other in tied[id(value)])
    ]
    problems = [f"lacks {few(missing)}"] if missing else []
    problems += [f"has {few(unexpected)}, which the network has not"] if unexpected else []
    if problems:
        raise InputError(f"model.weights: {uri} {' and '.join(problems)}")
