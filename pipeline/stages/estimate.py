"""The MAP estimate of every start: find it, certify it, and measure the curvature there."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from pipeline.bayes.chain import parse_chain
from pipeline.bayes.curvature import Curvature, measure, occam
from pipeline.bayes.minimise import QUASI_NEWTON_DIM, Minimum, allowed_fall, certify, first_order, quasi_newton
from pipeline.bayes.params import Network
from pipeline.bayes.target import DIFFERENCED, Potential
from pipeline.build import DTYPES, MAP_FILES, WIDE, build_network, build_potential, curvature_bytes, start_folder
from pipeline.errors import RunError
from pipeline.executor import Executor
from pipeline.plan import stream
from pipeline.progress import Progress
from pipeline.run import Run
from pipeline.scale_free import scale_free, scale_note, shrinkage
from pipeline.stages.check_weights import say_duration
from pipeline.stages.constant import collapse_note
from pipeline.stages.scale import Scale, choose_scale, first_noise

QUASI_NEWTON_STEPS = 3000
"""Of L-BFGS at most; an eighth of it while noise or prior are being chosen, and for potentials that are slow."""
SLOW = 1e8
"""Parameters times rows from which a potential counts as slow."""
TRIAL = 0.2
"""While noise or prior are being chosen, L-BFGS ends when a hundred iterations gain less, in nats."""
POLISHING = 16
"""Rounds of small first-order steps and L-BFGS, at most, for a network with kinks, where L-BFGS alone gets stuck."""
RATES = (1e-1, 1e-2, 1e-3, 1e-4)
"""Their learning rates relative to `map.learning_rate`, in turns."""
BATCHES = {"plain": (1500, 500), "general": (250, 125)}
"""With `map.batch_size: full`, first-order steps still take minibatches above so many rows, of so many. A network that
is no plain chain of layers has gradients that take a time in proportion to the rows, from the first one on."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the first start decides for all: one posterior has one noise and one prior."""

    start: int
    noise_std: float | None = None
    precision: Any = None
    how: str = "as configured"


def estimate(run: Run, executor: Executor, progress: Progress) -> None:
    """Make every MAP estimate that is missing; start 0 first, since it decides noise and prior.

    Raises:
        RunError: A start did not reach a minimum.
    """
    missing = [k for k in range(run.config.map.starts) if not _estimated(run, k)]
    if not missing:
        return
    say_duration(run, progress)
    with progress.bar("MAP estimate", run.config.map.starts, run.config.map.starts - len(missing)) as bar:
        if missing[0] == 0:
            _run_starts(run, executor, progress, bar, [Settings(0)])
            missing = missing[1:]
        first = run.storage.read_json(f"{start_folder(0)}/map.json")
        rest = [Settings(k, first["noise_std"], first["prior_precision"], first["prior_how"]) for k in missing]
        _run_starts(run, executor, progress, bar, rest)


def _estimated(run: Run, start: int) -> bool:
    """Whether every object of a start is there."""
    return all(run.storage.exists(f"{start_folder(start)}/{name}") for name in MAP_FILES)


def _run_starts(run: Run, executor: Executor, progress: Progress, bar: Any, items: list[Settings]) -> None:
    for item, info in executor.stream(estimate_start, run, items):
        bar.advance(1)
        noise = f", noise {info['noise_std']:.3g}" if info["noise_std"] else ""
        progress.note(
            f"MAP {item.start}: U = {info['potential']:.2f} nats, gradient {info['grad_norm']:.1e}, "
            f"largest curvature {info['lambda_max']:.3g}, gamma {info['gamma']:.1f} of {info['dim']} parameters{noise}"
        )
        for warning in (collapse_note(run.config, run.dataset.train.y, info), scale_note(info, info["parameters"])):
            if warning:
                progress.note(warning)


def estimate_start(run: Run, settings: Settings) -> Iterator[dict[str, Any]]:
    """Find, certify and store one start; yields its `map.json`.

    Raises:
        RunError: The point is not a minimum.
    """
    dtype = torch.float64
    network = build_network(run.config, run.dataset.schema, settings.start, dtype, run.dataset.train.x)
    if network.dim > WIDE:
        network = network.in_dtype(torch.float32)
    potential, minimum, noise, precision, how = _fit(run, network, settings)
    rng = stream(run.config.seed, "curvature", settings.start)
    rank = run.config.walk.rank if run.config.walk.correction not in ("plain", "momentum") else 0
    curvature = measure(potential, minimum.theta, rank, rng)
    _refuse_slope(run, settings.start, minimum, curvature)
    info = _describe(run, settings.start, network, minimum, curvature, noise, precision, how)
    if run.config.model.architecture.startswith("python:"):
        free = scale_free(network, potential.x)
        shrunk = shrinkage(network, free["parameters"], network.theta(), minimum.theta)
        info["scale_free"] = {**free, "shrinkage": shrunk} if free["layers"] else None
    folder = start_folder(settings.start)
    theta = save(_untied(network.state_dict(minimum.theta)))
    vectors = curvature_bytes(curvature, DTYPES[run.config.walk.dtype])
    files = dict(zip(MAP_FILES, (theta, vectors), strict=False))
    settled = run.storage.exists(f"{folder}/map.json")
    for name, data in files.items():
        if (
            not run.storage.create(f"{folder}/{name}", data)
            and not settled
            and run.storage.read(f"{folder}/{name}") != data
        ):
            run.storage.replace(f"{folder}/{name}", data)  # left by a writer that died before it vouched for it
    info["files"] = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    run.storage.create_json(f"{folder}/map.json", info)
    yield info


def _fit(run: Run, network: Network, settings: Settings) -> tuple[Potential, Minimum, float | None, Any, str]:
    """Minimise U, and before it choose noise and prior where the configuration leaves them open."""
    config = run.config
    noise = settings.noise_std or config.likelihood.noise_std or first_noise(run)
    precision = settings.precision or (1.0 if config.prior.precision == "auto" else config.prior.precision)
    theta = network.theta()
    if config.model.weights is None:
        theta = _first_steps(run, build_potential(run, network, noise, precision), theta, settings.start)
    point = Scale(theta, noise, precision, settings.how)
    if settings.precision is None:
        point = choose_scale(run, network, point, config.prior.precision == "auto", _descend)
    potential = build_potential(run, network, point.noise_std, point.precision)
    return potential, _descend(run, potential, point.theta, last=True), point.noise_std, point.precision, point.how


def _first_steps(run: Run, potential: Potential, theta: Tensor, start: int) -> Tensor:
    settings, rows = run.config.map, potential.rows
    above, some = BATCHES["plain" if parse_chain(potential.network.module, theta.numel()) else "general"]
    batch = settings.batch_size if settings.batch_size != "full" else (some if rows > above else 0)
    rng = stream(run.config.seed, "map", start)
    return first_order(potential, theta, settings.steps, settings.learning_rate, batch, rng)


def _descend(run: Run, potential: Potential, theta: Tensor, last: bool) -> Minimum:
    """Second-order steps where the network is small enough, then the certificate.

    Networks without batched passes are done when L-BFGS gains little and the certificate holds with a margin of two.
    A minimum at a kink (ReLU) has no vanishing gradient. So the last descent goes on in rounds until the certificate
    holds, or until a whole round lowers U by less than the certificate allows.
    """
    may_move = run.config.model.weights is None or run.config.map.polish
    if not may_move or theta.numel() > QUASI_NEWTON_DIM:
        return certify(potential, theta)
    work, tolerance = theta.numel() * potential.rows, run.config.map.tolerance
    steps = QUASI_NEWTON_STEPS // (1 if last and work <= SLOW else 8)
    enough = TRIAL if not last else 0.0
    if last and work > DIFFERENCED:
        enough = allowed_fall(tolerance, 0.1 * min(theta.numel(), potential.rows))
    general = last and work <= DIFFERENCED and parse_chain(potential.network.module, theta.numel()) is None
    if general:  # their gradients are slow, and the tail of a descent costs most of them for a fall that nobody sees
        enough = allowed_fall(tolerance, 0.01 * min(theta.numel(), potential.rows))
    newton = last and work <= DIFFERENCED and not general
    best = certify(potential, quasi_newton(potential, theta, tolerance, steps, newton=newton, enough=enough))
    if not last or _certified(best, tolerance, 1.0):
        return best
    gamma = occam(potential, best.theta, stream(run.config.seed, "descent"))[0]
    later = enough / 10 if general else enough  # a round is evidence only if it tried
    for round_ in range(POLISHING):
        if _certified(best, tolerance, 0.5 * gamma if general else gamma):
            break
        rate = run.config.map.learning_rate * RATES[round_ % len(RATES)]
        moved = first_order(potential, best.theta, 300, rate, 0, stream(run.config.seed, "polish", round_))
        found = certify(potential, quasi_newton(potential, moved, tolerance, steps, newton=False, enough=later))
        fall = best.potential - found.potential
        if fall > 0:
            best = dataclasses.replace(found, last_fall=fall)
        else:
            best = dataclasses.replace(best, last_fall=0.0)
    return best


def _certified(minimum: Minimum, tolerance: float, gamma: float) -> bool:
    """Whether a point is a minimum: by its gradient, its decrement, or what a whole round of descent still gained."""
    allowed = allowed_fall(tolerance, gamma)
    return minimum.grad_norm <= tolerance or min(minimum.decrement, minimum.last_fall) <= allowed


def _refuse_slope(run: Run, start: int, minimum: Minimum, curvature: Curvature) -> None:
    tolerance = run.config.map.tolerance
    allowed = allowed_fall(tolerance, curvature.gamma)
    if _certified(minimum, tolerance, curvature.gamma):
        return
    raise RunError(
        f"MAP estimate {start} is not at a minimum: gradient norm {minimum.grad_norm:.3g} (map.tolerance "
        f"{tolerance:g}), and U can still fall by about {minimum.decrement:.3g} nats "
        f"(allowed {allowed:.3g}). Raise map.steps (now {run.config.map.steps}), "
        f"change map.learning_rate (now {run.config.map.learning_rate:g}), or raise "
        "map.tolerance if so much does not matter."
    )


def _describe(
    run: Run,
    start: int,
    network: Network,
    minimum: Minimum,
    curvature: Curvature,
    noise: float | None,
    precision: Any,
    how: str,
) -> dict[str, Any]:
    return {
        "start": start,
        "dim": network.dim,
        "parameters": network.layout.to_json(),
        "potential": minimum.potential,
        "nll": minimum.nll,
        "grad_norm": minimum.grad_norm,
        "decrement": minimum.decrement,
        "last_fall": minimum.last_fall if math.isfinite(minimum.last_fall) else None,
        "tolerance": run.config.map.tolerance,
        "lambda_max": curvature.lambda_max,
        "eigenvalues": curvature.values.tolist(),
        "deflated_max": curvature.deflated_max,
        "eigenpair_residual": curvature.residual,
        "gamma": curvature.gamma,
        "noise_std": noise,
        "prior_precision": [list(pair) for pair in precision.items()] if isinstance(precision, dict) else precision,
        "prior_how": how,
    }


def _untied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies, since safetensors refuses tensors that share memory (tied parameters)."""
    return {name: value.detach().cpu().clone() for name, value in state.items()}
