"""The example configuration that `fiberwalk init` writes."""

from __future__ import annotations

import os

from pipeline.config_values import safe_name
from pipeline.errors import InputError

EXAMPLE = """\
# A complete run. Settings that are left out have sensible defaults; walk and deformation tune themselves.
#   fiberwalk plan {name}.yaml      what it costs, without running
#   fiberwalk run {name}.yaml       all stages; run it again after an interruption and it goes on
name: {name}
seed: 0
data:
  source: sklearn:breast_cancer   # or csv:my.csv, parquet:URI, npz:URI, python:module:function ...
  # target: label                 # csv and parquet: the column to predict
  task: classification            # or regression
  validation: 0.15                # chooses the radius and the temperature
  test: 0.15                      # is only looked at in the evaluation
model:
  architecture: mlp               # mlp, conv, lenet, resnet, or your own: python:module:function
  hidden: [50]
  # weights: my.safetensors       # walk from your own trained network
prior: {{precision: 1.0}}           # the L2 penalty that the network was trained with, or auto
walk: {{walks: 256}}
storage: ./runs                   # or s3://bucket/prefix, with credentials in the environment
"""


def write_example(name: str) -> str:
    """Write NAME.yaml to the working directory; returns its path.

    Raises:
        InputError: The name cannot be a run's name, or the file exists.
    """
    try:
        safe_name(name)
    except ValueError as error:
        raise InputError(f"name: '{name}' {error}") from None
    path = f"{name}.yaml"
    if os.path.exists(path):
        raise InputError(f"{path} exists already. Choose another name, or delete it first.")
    with open(path, "x", encoding="utf-8") as file:
        file.write(EXAMPLE.format(name=name))
    return path
