"""Data sources, splits and scaling. What other packages use is named here."""

from pipeline.data.arrays import Inputs, Rows
from pipeline.data.load import Dataset, load_dataset, load_inputs
from pipeline.data.schema import DataSchema

__all__ = ["DataSchema", "Dataset", "Inputs", "Rows", "load_dataset", "load_inputs"]
