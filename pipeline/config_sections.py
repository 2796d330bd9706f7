"""The sections of a configuration: each setting with meaning, unit and limit. `pipeline.config` joins them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from pipeline import config_values as values

Place = Annotated[str, BeforeValidator(values.place)]
Count = Annotated[int, values.integer(low=1)]
Positive = Annotated[float, values.number(above=0)]
Pattern = Annotated[str, BeforeValidator(values.regular_expression)]
Split = Annotated[float | tuple[int, int] | str | None, BeforeValidator(values.split)]
Widths = Annotated[tuple[Count, ...], values.sequence(lambda item: item)]

ACTIVATIONS = ("tanh", "relu", "gelu", "silu", "softplus", "elu")


class Section(BaseModel):
    """A group of settings that cannot be changed and knows no other names."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)


class DataConfig(Section):
    """What the network learns from."""

    source: Annotated[str, BeforeValidator(values.source)]
    """sklearn:NAME, csv:URI, parquet:URI (a file, or the files in a folder), npz:URI (arrays x, y; or named inputs
    x.NAME, whose whole numbers are token numbers), idx:URI_PREFIX (MNIST files; the rows of train-* come first, those
    of t10k-* after them), or python:MODULE:FUNCTION (a function that returns (x, y), found on PYTHONPATH or in the
    working directory)."""
    target: Annotated[int | str | None, BeforeValidator(values.column)] = None
    """The target column of csv and parquet: its name, or its position (-1 is the last); other columns are features."""
    task: Annotated[Literal["classification", "regression"], values.choice("classification", "regression")] = (
        "classification"
    )
    """What the target is: a class, or a number."""
    validation: Split = 0.15
    """Rows that choose radius and temperature: a fraction, [first, last) rows of the source, or a file of row numbers;
    0 or null: none."""
    test: Split = 0.15
    """Rows of the evaluation, given in the same way. What is left is for training, in the source's order."""
    standardize: bool = True
    """Bring features to mean 0 and standard deviation 1 over the training rows; targets too for regression."""
    train_rows: Annotated[int | None, values.integer(low=2)] = None
    """Use only the first so many training rows; null: all."""
    ood: Annotated[tuple[str, ...], values.sequence(values.source)] = ()
    """Further sources with the same features, from outside the distribution; their targets are ignored."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        kind = self.source.partition(":")[0]
        if kind in ("csv", "parquet") and self.target is None:
            raise ValueError(f"data.target is missing: name the target column of {self.source}")
        if kind not in ("csv", "parquet") and self.target is not None:
            raise ValueError(
                f"data.target is for csv and parquet sources; {kind} sources bring their own. Leave it out"
            )
        parts = [part for part in (self.validation, self.test) if isinstance(part, float)]
        if sum(parts) >= 1:
            raise ValueError(
                f"data.validation and data.test leave nothing for training: {' + '.join(map(str, parts))} >= 1"
            )
        if self.test is None or self.test == 0:
            raise ValueError("data.test must not be empty: the evaluation needs rows. Give a fraction such as 0.15")
        both = (self.validation, self.test)
        if (
            isinstance(both[0], tuple)
            and isinstance(both[1], tuple)
            and max(both[0][0], both[1][0]) < min(both[0][1], both[1][1])
        ):
            raise ValueError(f"data.validation {list(both[0])} and data.test {list(both[1])} overlap")
        return self


class ModelConfig(Section):
    """The network."""

    architecture: Annotated[str, BeforeValidator(values.architecture)] = "mlp"
    """mlp, conv, lenet, resnet (ResNet-18), or python:MODULE:FUNCTION that returns a torch.nn.Module."""
    hidden: Widths = (50,)
    """Units of each hidden layer of mlp, or channels of each layer of conv. lenet and resnet have their own."""
    activation: Annotated[str, values.choice(*ACTIVATIONS)] = "tanh"
    """tanh, relu, gelu, silu, softplus or elu; for the built-in mlp, conv and lenet."""
    weights: Annotated[str | None, BeforeValidator(values.place)] = None
    """URI of a .safetensors file: walk from your own trained network."""
    parameters: Pattern = ".*"
    """Regular expression over parameter names (found anywhere in the name); the others are frozen and stored once."""


class LikelihoodConfig(Section):
    """How targets scatter around what the network says."""

    kind: Annotated[
        Literal["categorical", "bernoulli", "gaussian", "heteroscedastic"] | None,
        values.choice("categorical", "bernoulli", "gaussian", "heteroscedastic"),
    ] = None
    """categorical or bernoulli (one logit, two classes) for classification; gaussian or heteroscedastic (the network
    gives mean and log variance) for regression; null: categorical or gaussian, by data.task."""
    noise_std: Annotated[float | None, values.number(above=0)] = None
    """Noise standard deviation of gaussian, the smallest one of heteroscedastic, in units of the standardised target;
    null: estimated with the MAP."""


class PriorConfig(Section):
    """Independent normal priors around 0."""

    precision: Annotated[float | dict[str, float] | Literal["auto"], BeforeValidator(values.precision)] = 1.0
    """1 / variance of every parameter: one number, regular expression -> number (the first that is found in the name
    counts), or auto: chosen by validation (classification) or marginal likelihood (regression)."""


class MapConfig(Section):
    """The MAP estimate, from which walks begin."""

    starts: Count = 1
    """Independent initialisations; the walks are spread over them."""
    steps: Annotated[int, values.integer(low=0)] = 2000
    """Steps of the first-order optimiser; small networks are finished with L-BFGS."""
    learning_rate: Positive = 0.01
    """Largest learning rate of the first-order optimiser."""
    tolerance: Positive = 1e-3
    """Largest gradient norm of the potential that counts as a minimum, relative to its scale."""
    polish: bool = False
    """With model.weights: go on to the minimum of the stated potential instead of refusing weights that are off it."""
    batch_size: Annotated[int | Literal["full"], values.integer(low=1, words=("full",))] = "full"
    """Training rows of one step, or full: all."""


class WalkConfig(Section):
    """The fiber walk."""

    walks: Count = 512
    """How many."""
    walks_per_shard: Count = 64
    """Walks that advance together. Enters the run id, because batch shape changes rounding."""
    length: Annotated[float | Literal["auto"], values.number(above=0, words=("auto",))] = "auto"
    """Drift of a whole walk, in units of the parameters; auto: a pilot doubles it until validation is past its best."""
    steps: Annotated[int | Literal["auto"], values.integer(low=1, words=("auto",))] = 200
    """Steps of drift and correction."""
    record_every: Count = 10
    """A point is stored every so many steps; divides steps."""
    step_size: Annotated[float | Literal["auto"], values.number(above=0, words=("auto",))] = "auto"
    """Correction step, in squared units a nat; auto: from the largest curvature."""
    corrections: Annotated[int, values.integer(low=0)] = 1
    """Gradient corrections a step; 0: random directions, no fiber."""
    correction: Annotated[str, values.choice("plain", "deflated", "momentum", "deflated-momentum", "auto")] = "auto"
    """plain (the paper's gradient step), deflated (a step size of its own in the stiffest directions), momentum,
    deflated-momentum, or auto."""
    rank: Annotated[int, values.integer(low=0)] = 40
    """Stiff directions of the deflated correction."""
    guard: bool = True
    """Stop a walk's momentum and shorten its step while its fit gets worse; false: never."""
    tilt: Annotated[Literal["none", "posterior"], values.choice("none", "posterior")] = "none"
    """none, or posterior: endpoints are posterior draws where the model is linear and Gaussian."""
    drift: Annotated[Literal["isotropic", "prior"], values.choice("isotropic", "prior")] = "isotropic"
    """isotropic (the paper's), or prior: scaled by the prior standard deviation of each parameter group."""
    batch_size: Annotated[int | Literal["full"], values.integer(low=1, words=("full",))] = "full"
    """Training rows of one gradient, or full: all."""
    dtype: Annotated[Literal["float32", "float64"], values.choice("float32", "float64")] = "float32"
    """Number format of the walk and of the stored points."""
    compile: Annotated[bool | Literal["auto"], BeforeValidator(values.switch)] = "auto"
    """Compile the gradient; auto: when the planned work repays it."""

    @model_validator(mode="after")
    def _check(self) -> WalkConfig:
        if self.steps != "auto" and self.steps % self.record_every:
            fitting = [k for k in range(1, self.steps + 1) if self.steps % k == 0]
            near = min(fitting, key=lambda k: abs(k - self.record_every))
            raise ValueError(
                f"walk.record_every must divide walk.steps = {self.steps}, got {self.record_every}; "
                f"{near} is the nearest that does"
            )
        if self.tilt == "posterior" and self.drift == "prior":
            raise ValueError("walk.drift: prior cannot go with walk.tilt: posterior, which has a drift of its own")
        if self.correction.startswith("deflated") and self.rank < 1:
            raise ValueError(f"walk.rank must be at least 1 with walk.correction: {self.correction}, got {self.rank}")
        return self


class DeformationConfig(Section):
    """The model that turns random directions into points on the fiber."""

    kind: Annotated[str, values.choice("residual", "metric", "gaussian", "none")] = "residual"
    """residual, metric (the paper's autoencoder family), gaussian (the control), or none."""
    rank: Count = 64
    """Directions of the correction's basis (residual), or latent dimensions (metric)."""
    hidden: Widths = (128, 128)
    """Units of each hidden layer."""
    steps: Annotated[int, values.integer(low=0)] = 800
    """Training steps, at most: held-out walks and the potential of draws stop them earlier."""
    likelihood_weight: Annotated[float | Literal["auto"], values.number(low=0, words=("auto",))] = "auto"
    """Weight of the mean potential of decoded random directions."""
    gaussian_share: Annotated[float | Literal["auto"], values.number(low=0, high=1, words=("auto",))] = "auto"
    """Share of draws that a Gaussian of the walks' points gives, which then land as learned ones do; auto: validation
    rows of a classification decide, elsewhere 0. With kind: gaussian all, and none lands."""
    workers: Count = 2
    """Ray Train workers. Enters the run id: the result depends on it. With --serial one process fits as one worker."""


class EvaluationConfig(Section):
    """What the result is held against."""

    draws: Annotated[int, values.integer(low=2)] = 64
    """Draws averaged for a prediction."""
    baselines: Annotated[tuple[str, ...], values.sequence(values.baseline)] = (
        "map",
        "temperature",
        "random",
        "gaussian",
    )
    """Methods beside walk and deformation: map, temperature, random, gaussian, ensemble, ensemble_temperature, laplace,
    laplace_linearised, laplace_torch (that package's opinion, where it is installed), swag."""


class ClusterConfig(Section):
    """Where the run is computed; never changes a number."""

    address: Annotated[str | None, BeforeValidator(values.place)] = None
    """Ray address of a running cluster; null: an embedded one."""
    actors: Annotated[int | Literal["auto"], values.integer(low=1, words=("auto",))] = "auto"
    """Walker actors; auto: as many as fit."""
    cpus_per_actor: Positive = 1.0
    """Processors that one actor takes."""
    gpus_per_actor: Annotated[float, values.number(low=0)] = 0.0
    """Accelerators, or a part of one, that one actor takes."""
    max_restarts: Annotated[int, values.integer(low=0)] = 3
    """How often a shard is tried again after its actor died, and how often the group of training workers."""
