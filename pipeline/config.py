"""The configuration of a run. Everything but `storage` and `cluster` fixes the numbers and enters the run id."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, ValidationError, model_validator

from pipeline import config_values as values
from pipeline.config_file import apply_overrides, explain, flatten, read_mapping
from pipeline.config_sections import (
    ClusterConfig,
    DataConfig,
    DeformationConfig,
    EvaluationConfig,
    LikelihoodConfig,
    MapConfig,
    ModelConfig,
    Place,
    PriorConfig,
    Section,
    WalkConfig,
)
from pipeline.errors import InputError

__all__ = ["Config", "DataConfig", "ModelConfig", "config_difference", "likelihood_kind", "load_config", "parse_config"]
_LIKELIHOODS = {"classification": ("categorical", "bernoulli"), "regression": ("gaussian", "heteroscedastic")}
_SHIPPED = "python:pipeline.data.synthetic:"


class Config(Section):
    """A complete run."""

    name: Annotated[str, BeforeValidator(values.safe_name)]
    """First part of the run id, and a folder name."""
    seed: Annotated[int, values.integer(low=0, high=2**63 - 1)] = 0
    """Fixes every random number."""
    data: DataConfig
    model: ModelConfig = ModelConfig()
    likelihood: LikelihoodConfig = LikelihoodConfig()
    prior: PriorConfig = PriorConfig()
    map: MapConfig = MapConfig()
    walk: WalkConfig = WalkConfig()
    deformation: DeformationConfig = DeformationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    storage: Place = "./runs"
    """Folder or URI (s3://bucket/prefix) that holds runs. Credentials come from the environment."""
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        fitting = _LIKELIHOODS[self.data.task]
        if self.likelihood.kind is not None and self.likelihood.kind not in fitting:
            raise ValueError(
                f"likelihood.kind must be {' or '.join(fitting)} with data.task: {self.data.task}, "
                f"got '{self.likelihood.kind}'"
            )
        if self.likelihood.noise_std is not None and self.data.task != "regression":
            raise ValueError(f"likelihood.noise_std is for regressions; leave it out with {likelihood_kind(self)}")
        if self.map.starts > self.walk.walks:
            raise ValueError(f"walk.walks must be at least map.starts = {self.map.starts}, got {self.walk.walks}")
        of_points = self.deformation.kind == "metric" and self.deformation.gaussian_share not in ("auto", 0)
        least = 2 * self.map.starts if self.deformation.kind in ("residual", "gaussian") or of_points else 1
        if self.walk.walks < least:
            raise ValueError(
                f"walk.walks must be at least {least}, two a start, with deformation.kind: "
                f"{self.deformation.kind}{' and a deformation.gaussian_share' if of_points else ''}, got "
                f"{self.walk.walks}; or set deformation.kind: none"
            )
        if self.map.starts > 1 and self.model.weights is not None:
            raise ValueError(f"map.starts must be 1 with model.weights (one network is given), got {self.map.starts}")
        ensembles = [name for name in self.evaluation.baselines if name.startswith("ensemble")]
        if ensembles and self.map.starts < 2:
            raise ValueError(
                f"evaluation.baselines: {ensembles[0]} needs map.starts of at least 2, got {self.map.starts}"
            )
        classes = self.data.task == "classification"
        if self.prior.precision == "auto" and classes and self.data.validation in (None, 0.0):
            raise ValueError("prior.precision: auto needs validation rows, and data.validation gives none")
        return self

    @property
    def run_id(self) -> str:
        """Name and eight hexadecimal digits of the hash of all that fixes the numbers."""
        settings = self.model_dump(mode="json", exclude={"storage", "cluster"})
        if isinstance(self.prior.precision, dict):  # the first expression found counts, so that their order does too
            settings["prior"]["precision"] = list(self.prior.precision.items())
        text = json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @property
    def own_code(self) -> tuple[str, ...]:
        """Settings that run the user's own Python code, as ``setting: value``; our own generators are left out."""
        named = [("data.source", self.data.source), ("model.architecture", self.model.architecture)]
        named += [("data.ood", source) for source in self.data.ood]
        return tuple(
            f"{setting}: {value}"
            for setting, value in named
            if value.startswith("python:") and not value.startswith(_SHIPPED)
        )

    def to_yaml(self) -> str:
        """Every setting, defaults included, as YAML that `load_config` reads back to an equal configuration."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def parse_config(mapping: Mapping[str, Any]) -> Config:
    """Check a mapping of settings. Raises InputError that names field, value and limit."""
    try:
        return Config.model_validate(dict(mapping))
    except ValidationError as error:
        raise InputError(explain(error, Config)) from None


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file, with ``a.b=value`` overrides. Raises InputError."""
    return parse_config(apply_overrides(read_mapping(path), overrides))


def likelihood_kind(config: Config) -> str:
    """The likelihood of a run, with its default resolved by the task."""
    return config.likelihood.kind or _LIKELIHOODS[config.data.task][0]


def config_difference(first: Config, second: Config) -> list[str]:
    """Settings that differ, each as ``walk.steps: 200 -> 100``."""
    before, after = flatten(first.model_dump(mode="json")), flatten(second.model_dump(mode="json"))
    keys = list(dict.fromkeys([*before, *after]))
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys if before.get(key) != after.get(key)]
