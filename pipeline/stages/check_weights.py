"""Before a MAP estimate: weights that were given are tried, and a person is told where it will take minutes."""

from __future__ import annotations

import torch

from pipeline.bayes.minimise import allowed_fall, certify
from pipeline.bayes.params import Network
from pipeline.bayes.target import prior_precision
from pipeline.build import WIDE, build_network, build_potential
from pipeline.errors import InputError
from pipeline.own_network import check_gradient, check_rows, gradient_seconds
from pipeline.progress import Progress
from pipeline.run import Run
from pipeline.stages.scale import noise_of

USUAL = (500, 5000)
"""Gradients over all rows that the estimate of a network takes whose passes are not batched by us."""


def check_weights(run: Run) -> None:
    """Build the network once, and refuse weights that are not at a minimum, before anything is written.

    Raises:
        InputError: The network or its prior cannot be built, or how far off the weights are and the settings that help.
    """
    network = build_network(run.config, run.dataset.schema, 0, torch.float64)
    _try_rows(run, network)
    if run.config.prior.precision != "auto":
        prior_precision(network.layout, run.config.prior.precision, network.dtype)
    if run.config.model.weights is None or run.config.map.polish:
        return
    if network.dim > WIDE:
        network = network.in_dtype(torch.float32)
    precision = run.config.prior.precision
    if precision == "auto":
        raise InputError(
            "prior.precision: auto needs map.polish: true with model.weights, since the minimum moves with it."
        )
    theta = network.theta()
    noise = noise_of(run, network, theta)
    minimum = certify(build_potential(run, network, noise, precision), theta)
    allowed = allowed_fall(run.config.map.tolerance, min(network.dim, len(run.dataset.train.y)))
    if minimum.grad_norm > run.config.map.tolerance and not minimum.decrement <= allowed:
        raise InputError(
            f"model.weights {run.config.model.weights} are not at a minimum of U: gradient norm "
            f"{minimum.grad_norm:.3g} (map.tolerance {run.config.map.tolerance:g}), and U can still fall by "
            f"about {minimum.decrement:.3g} nats (allowed {allowed:.3g}). Set map.polish: true to go on to "
            "the minimum, or state the prior.precision and likelihood that they were trained with."
        )


def _try_rows(run: Run, network: Network) -> None:
    """Let a user's own network meet rows of every split, before anything is written."""
    data = run.dataset
    splits = {"training": data.train.x, "validation": data.validation.x, "test": data.test.x}
    for name, x in (splits | data.ood).items():
        check_rows(network, run.config.model.architecture, x, name)
    check_gradient(network, run.config.model.architecture, data.train.x)


def say_duration(run: Run, progress: Progress) -> None:
    """Prepare a person for minutes without a word, where the gradients of a user's own network are slow."""
    own = run.config.model.architecture.startswith("python:")
    if not own or (run.config.model.weights is not None and not run.config.map.polish):
        return
    rows = len(run.dataset.train.y)
    network = build_network(run.config, run.dataset.schema, 0, torch.float64)
    seconds = rows * gradient_seconds(network, run.dataset.train.x)
    if seconds * USUAL[0] > 30:
        low, high = (seconds * count / 60 for count in USUAL)
        progress.note(
            f"MAP estimate: a gradient over {rows:,} rows takes about {seconds:.2g} s here, and {USUAL[0]:,} to "
            f"{USUAL[1]:,} are usual: {low:.2g} to {high:.2g} minutes for each start."
        )
