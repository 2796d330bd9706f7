"""The only place where names of a configuration become functions and objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from pipeline.bayes.batched import BatchedChain
from pipeline.bayes.curvature import Curvature
from pipeline.bayes.halving import Halving
from pipeline.bayes.kernels import nll_gradient, plan_form
from pipeline.bayes.likelihood import Bernoulli, Categorical, Gaussian, Heteroscedastic, Likelihood
from pipeline.bayes.params import Network
from pipeline.bayes.target import Potential, prior_precision
from pipeline.bayes.trees import slice_rows, to_tensors
from pipeline.bayes.walk import drift_direction
from pipeline.config import Config, likelihood_kind
from pipeline.data import Rows
from pipeline.data.schema import DataSchema
from pipeline.errors import InputError
from pipeline.models import build_module, calibrate_batchnorm, load_weights
from pipeline.plan import WalkPlan, stream
from pipeline.run import Run

WIDE = 2_000_000
"""Above this many parameters the MAP estimate is computed in float32 instead of float64."""

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Problem:
    """One start: its target, its MAP estimate and what was measured there."""

    network: Network
    likelihood: Likelihood
    potential: Potential
    """Over the training rows."""
    theta_star: Tensor
    """(D,)."""
    curvature: Curvature
    info: dict[str, Any]
    """`map.json`."""

    @property
    def precision(self) -> Tensor:
        """Prior precision of each parameter, (D,)."""
        return self.potential.precision


def device_of(config: Config) -> str:
    """Where tensors live: the accelerator if actors are given a share of one."""
    return "cuda" if config.cluster.gpus_per_actor > 0 and torch.cuda.is_available() else "cpu"


def likelihood_of(config: Config, schema: DataSchema, noise_std: float | None) -> Likelihood:
    """The likelihood that the configuration names.

    Raises:
        InputError: bernoulli with other than two classes.
    """
    kind = likelihood_kind(config)
    if kind == "bernoulli" and len(schema.classes) != 2:
        raise InputError(
            f"likelihood.kind: bernoulli needs two classes, the data have {len(schema.classes)}. Use categorical."
        )
    if kind == "gaussian":
        return Gaussian(noise_std or 1.0)
    if kind == "heteroscedastic":
        return Heteroscedastic(floor=noise_std**2) if noise_std else Heteroscedastic()
    return Bernoulli() if kind == "bernoulli" else Categorical(len(schema.classes))


def build_network(config: Config, schema: DataSchema, start: int, dtype: torch.dtype, x: Any = None) -> Network:
    """The configured network at its initial weights of one start, or at the weights that were given.

    Args:
        config: The run's configuration.
        schema: What inputs look like.
        start: Number of the initialisation.
        dtype: Floating-point type.
        x: Training inputs; given, the statistics of BatchNorm are set from them unless weights are loaded.
    """
    columns = likelihood_of(config, schema, None).columns
    try:
        module = build_module(config.model, schema, columns, stream(config.seed, "init", start))
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        raise InputError(
            "model: this machine's memory does not hold the network. Use fewer or narrower layers"
        ) from None
    if config.model.weights is not None:
        load_weights(module, config.model.weights)
    elif x is not None:
        calibrate_batchnorm(module, to_tensors(slice_rows(x, 0, 1024), torch.float32))
    return Network(module, config.model.parameters, dtype, device_of(config))


def bare_network(config: Config, schema: DataSchema, start: int, dtype: torch.dtype) -> Network:
    """The configured network for a stored state: the file of `model.weights` need not be there, nor on every node."""
    model = config.model.model_copy(update={"weights": None})
    return build_network(config.model_copy(update={"model": model}), schema, start, dtype)


def targets(rows: Rows, network: Network) -> Tensor:
    """Targets as the likelihood wants them: class numbers, or floating point."""
    y = torch.as_tensor(np.array(rows.y), device=network.device)
    return y if not y.is_floating_point() else y.to(network.dtype)


def build_potential(
    run: Run, network: Network, noise_std: float | None, precision: Any, form: str | None = None, compile: bool = False
) -> Potential:
    """U over the training rows; the form of its gradient is chosen by shapes where it is not given."""
    likelihood = likelihood_of(run.config, run.dataset.schema, noise_std)
    x = to_tensors(run.dataset.train.x, network.dtype, network.device)
    y = targets(run.dataset.train, network)
    form = form or plan_form(network, x, len(run.dataset.train.y), 0, False)[0]
    kernel = nll_gradient(network, likelihood, x, y, form=form, compile=compile)
    nll = Halving(kernel.nll) if isinstance(kernel, BatchedChain) else None
    vector = prior_precision(network.layout, precision, network.dtype).to(network.device)
    return Potential(network, likelihood, vector, x, y, Halving(kernel), nll=nll)


MAP_FILES = ("theta.safetensors", "curvature.safetensors", "map.json")
"""Objects of one MAP estimate; the last names the digests of the others and is written last."""


def start_folder(start: int) -> str:
    """Folder of one MAP estimate below the run."""
    return f"map/start={start}"


def _read_file(run: Run, start: int, info: dict[str, Any], name: str) -> bytes:
    """Bytes of a file of a MAP estimate, checked against the digest in its `map.json`."""
    return run.storage.read_checked(f"{start_folder(start)}/{name}", info["files"][name])


def load_network(run: Run, start: int, dtype: torch.dtype) -> tuple[Network, Tensor]:
    """The network with the stored state of a MAP estimate, and theta*, (D,)."""
    network = bare_network(run.config, run.dataset.schema, start, dtype)
    info = run.storage.read_json(f"{start_folder(start)}/map.json")
    state = load(_read_file(run, start, info, "theta.safetensors"))
    network.module.load_state_dict(state)
    return network, network.theta()


def load_problem(run: Run, start: int, plan: WalkPlan | None = None, dtype: torch.dtype | None = None) -> Problem:
    """Everything about one start, after the estimate stage.

    Args:
        run: The run.
        start: Number of the MAP estimate.
        plan: Gives the form of the gradient; None chooses one.
        dtype: Floating-point type; None takes that of the walk.
    """
    dtype = dtype or DTYPES[run.config.walk.dtype]
    info = run.storage.read_json(f"{start_folder(start)}/map.json")
    network, theta = load_network(run, start, dtype)
    form, compiled = (plan.form, plan.compile) if plan else (None, False)
    potential = build_potential(run, network, info["noise_std"], info["prior_precision"], form, compiled)
    tensors = load(_read_file(run, start, info, "curvature.safetensors"))
    curvature = Curvature(
        lambda_max=info["lambda_max"],
        values=tensors["values"].to(theta),
        vectors=tensors["vectors"].to(theta),
        deflated_max=info["deflated_max"],
        residual=info["eigenpair_residual"],
        gamma=info["gamma"],
    )
    return Problem(network, potential.likelihood, potential, theta, curvature, info)


def curvature_bytes(curvature: Curvature, dtype: torch.dtype) -> bytes:
    """Eigenpairs as a safetensors file."""
    return save({"values": curvature.values.cpu(), "vectors": curvature.vectors.to(dtype).cpu().contiguous()})


def drift_of(run: Run, plan: WalkPlan, precision: Tensor, walk: int) -> np.ndarray:
    """Displacement of a whole walk without corrections, (D,) float64: length times direction, or xi / sqrt(alpha)."""
    rng = stream(run.config.seed, "drift", walk)
    root = precision.double().cpu().numpy() ** -0.5
    if plan.tilt == "posterior":
        return rng.standard_normal(plan.dim) * root
    return plan.length * drift_direction(rng, plan.dim, root if plan.drift == "prior" else None)
