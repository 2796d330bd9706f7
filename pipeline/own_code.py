"""Python functions of the user, named as ``python:MODULE:FUNCTION``; the one place where such code is imported."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.errors import InputError


def load_function(spec: str, setting: str) -> Callable[..., Any]:
    """Import the function of ``python:MODULE:FUNCTION`` from PYTHONPATH or the working directory.

    Raises InputError in one line with the cause; `setting` is the configuration field that named it.
    """
    _, module_name, function_name = spec.split(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        # Last, so that a file of the user's never hides an installed package. It stays, because what the function
        # returns may be pickled by reference to its module.
        sys.path.append(os.getcwd())
    try:
        with off_stdout():
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        where = "on PYTHONPATH or in the working directory"
        raise InputError(f"{setting}: {spec} does not import ({where}): {cause(error)}") from error
    function = getattr(module, function_name, None)
    if function is None:
        raise InputError(f"{setting}: {spec}: module {module_name} ({module.__file__}) has no {function_name}")
    if not callable(function):
        raise InputError(f"{setting}: {spec} is a {type(function).__name__}, not a function")
    return function


@contextlib.contextmanager
def off_stdout(*, show: bool = False) -> Iterator[None]:
    """Keep what the user's code prints and warns of away from the output, which holds results that programs read.

    With `show` what it printed goes to the standard error once it has succeeded; a refusal stays one line.
    """
    said = io.StringIO()
    with contextlib.redirect_stdout(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    if show:
        sys.stderr.write(said.getvalue())


def cause(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
