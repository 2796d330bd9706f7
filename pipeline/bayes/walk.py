r"""Fiber walks: particles that drift in one fixed direction and are pulled back by the gradient.

$$\theta \leftarrow \theta + \tfrac{L}{T} d, \quad m \leftarrow \mu m - \eta P \nabla U(\theta),
\quad \theta \leftarrow \theta + m$$

With $\mu = 0$ and $P = I$ this is the sampling stage of Reichlin et al. 2025 (arXiv 2512.01500). Deflation ($P$),
momentum ($\mu$), the guard and the tilt are ours. Positions of all walks of a shard are advanced together, in place,
because those of a wide network are large.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pipeline.bayes.curvature import Curvature
from pipeline.bayes.target import Potential
from pipeline.bayes.trees import slice_rows

SMALLEST_STEP = 2.0**-20
"""A walk whose step size was halved below this share of the first one is marked diverged."""
RECOVERY = 1.05
"""Growth of a halved step size at each quiet step."""
REACH = 4.0
"""Longest move of one correction under the guard, in drifts of one step. At rest on the fiber a correction undoes the
stiff part of the drift and is no longer than it; a longer one is a step size too large for the curvature met there."""
JUMP = 10.0
"""A rise this many times above the guard's limit and the last rise is a jump: the walk goes back to its last record."""

Gradient = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Positions (W, D) and step -> gradient of U (W, D), summed NLL (W,)."""
Correction = Callable[[Tensor], Tensor]
"""Gradient (W, D) -> displacement eta P g (W, D)."""


@dataclass(frozen=True)
class WalkKernel:
    """What a step needs and does not change."""

    theta_star: Tensor
    """Where the walks begin, (D,)."""
    nll_star: float
    """Summed NLL there."""
    drift: Tensor
    """Displacement of one step, (W, D), in units of the parameters."""
    steps: int
    """Steps T of a whole walk."""
    gradient: Gradient
    correction: Correction
    corrections: int = 1
    momentum: float = 0.0
    limit: float | None = None
    """Rise of the summed NLL above which the guard acts, in nats; None switches the guard off."""
    tilt: Tensor | None = None
    """Linear tilt b of the potential at the end of the walk, (W, D), in nats per unit."""

    @cached_property
    def drift_length(self) -> Tensor:
        """Length of the drift of one step, (W,)."""
        return self.drift.norm(dim=1)


@dataclass
class WalkState:
    """What the next step needs. Tensors are updated in place."""

    position: Tensor
    """(W, D)."""
    momentum: Tensor | None
    """(W, D)."""
    step_size: Tensor
    """Share of the first step size, (W,), float64."""
    drifts: Tensor
    """Steps that drifted, (W,); fewer than `step` where the guard paused the drift."""
    nll: Tensor
    """Summed NLL at the last evaluation, (W,)."""
    halved: Tensor
    """Went back to the last record since then, (W,)."""
    diverged: Tensor
    """Could not be saved, (W,): stays at its last record."""
    step: int
    anchor: Tensor
    """Position at the last record, (W, D)."""
    anchor_drifts: Tensor
    anchor_nll: Tensor


@dataclass(frozen=True)
class WalkInfo:
    """What a person wants to see of one record; each (W,)."""

    potential: Tensor
    nll: Tensor
    grad_norm: Tensor
    distance: Tensor


def drift_direction(seed: np.random.Generator, dim: int, scale: np.ndarray | None = None) -> np.ndarray:
    """A direction uniform on the unit sphere of R^D, float64; `scale` (D,) stretches it before it is normalised."""
    direction = seed.standard_normal(dim)
    if scale is not None:
        direction *= scale
    return direction / np.linalg.norm(direction)


def plain_correction(step_size: float) -> Correction:
    """Displacement eta g: the paper's gradient step."""
    return lambda gradient: gradient * step_size


def deflated_correction(curvature: Curvature, fraction: float) -> Correction:
    r"""Displacement $\frac{c}{\lambda_\perp}(g - QQ'g) + Q \frac{c}{\lambda} Q'g$: a step for each stiff direction.

    $\lambda_\perp$ is the larger of the last eigenvalue kept and the certified maximum of the rest.
    """
    values, vectors = curvature.values, curvature.vectors
    rest = max(curvature.deflated_max, float(values[-1]))
    extra = fraction / values - fraction / rest

    def displace(gradient: Tensor) -> Tensor:
        return torch.addmm(gradient, (gradient @ vectors.T) * extra, vectors, beta=fraction / rest)

    return displace


def minibatch_gradient(
    potential: Potential, theta_star: Tensor, size: int, stream_of_step: Callable[[int], np.random.Generator]
) -> Gradient:
    r"""Gradient on one random batch for all walks, with a control variate that makes it exact at theta*.

    $\frac{N}{B}[g_B(\theta) - g_B(\theta^*)] + g(\theta^*) + \alpha\theta$, where g is the gradient of the NLL.
    """
    scale = potential.rows / size
    star, star_nll = potential.nll_gradient(theta_star[None])

    def gradient(position: Tensor, step: int) -> tuple[Tensor, Tensor]:
        index = stream_of_step(step).choice(potential.rows, size, replace=False)
        rows = torch.as_tensor(index, device=position.device)
        here, nll = potential.nll_gradient(position, rows)
        there, there_nll = potential.nll_gradient(theta_star[None], rows)
        estimate = (here - there).mul_(scale).add_(star)
        return torch.addcmul(estimate, potential.precision, position), (nll - there_nll) * scale + star_nll

    return gradient


def tilt_vector(potential: Potential, theta_star: Tensor, xi: Tensor, noise: Tensor) -> Tensor:
    r"""A tilt with the covariance of the Gauss-Newton matrix: $b = J'\Lambda^{1/2}\epsilon + \sqrt\alpha\,\xi$, (D,).

    Args:
        potential: The target.
        theta_star: Where it is linearised, (D,).
        xi: Standard normal, (D,); the same that makes the drift xi / sqrt(alpha).
        noise: Standard normal, (rows, columns of the output).
    """

    def pull(first: int, last: int) -> Tensor:
        leaf = theta_star.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            outputs = potential.network.outputs(leaf, slice_rows(potential.x, first, last))
        root = potential.likelihood.curvature_root(outputs.detach(), noise[first:last])
        return torch.autograd.grad(outputs, leaf, root)[0]

    size = potential.row_batch
    data = sum((pull(b, b + size) for b in range(0, potential.rows, size)), torch.zeros_like(theta_star))
    return data + potential.precision.sqrt() * xi


def init(kernel: WalkKernel) -> WalkState:
    """All walks at theta*, at rest."""
    walks, device = len(kernel.drift), kernel.drift.device
    position = kernel.theta_star.expand(walks, -1).clone()
    nll = torch.full((walks,), kernel.nll_star, dtype=torch.float64, device=device)
    zeros = torch.zeros(walks, dtype=torch.int64, device=device)
    no = torch.zeros(walks, dtype=torch.bool, device=device)
    return WalkState(
        position=position,
        momentum=torch.zeros_like(position) if kernel.momentum else None,
        step_size=torch.ones(walks, dtype=torch.float64, device=device),
        drifts=zeros,
        nll=nll,
        halved=no,
        diverged=no.clone(),
        step=0,
        anchor=position.clone(),
        anchor_drifts=zeros.clone(),
        anchor_nll=nll.clone(),
    )


def advance(kernel: WalkKernel, state: WalkState) -> None:
    """One step of every walk: drift, then correct. Updates the state in place.

    The guard (when `kernel.limit` is set): a walk that lies above the limit does not drift; if it still rose since the
    last evaluation, its momentum is zeroed and its step size halved. No correction moves a walk further than `REACH`
    drifts; one that would is shortened, and the step size halved. A walk that jumped or is not finite goes back to its
    last record with half the step size.
    """
    moving = ~state.diverged & (state.drifts < kernel.steps)
    if kernel.limit is not None:
        moving &= state.nll - kernel.nll_star <= kernel.limit
    state.position.addcmul_(kernel.drift, moving[:, None].to(kernel.drift.dtype))
    state.drifts = state.drifts + moving
    for _ in range(kernel.corrections):
        gradient, nll = kernel.gradient(state.position, state.step)
        if kernel.tilt is not None:
            share = (state.drifts / kernel.steps).to(gradient.dtype)
            gradient = gradient - kernel.tilt * share[:, None]
        nll = nll.double()
        lost = _lost(kernel, state, nll)
        _control_step_size(kernel, state, nll)
        if bool(lost.any()):
            _go_back(state, lost, nll)
            gradient[lost] = 0
        state.nll = nll
        change = kernel.correction(gradient)
        change *= state.step_size.to(change.dtype)[:, None]
        if state.momentum is None:
            state.position -= _within_reach(kernel, state, change)
        else:
            state.momentum.mul_(kernel.momentum).sub_(change)
            state.position += _within_reach(kernel, state, state.momentum)
    state.step += 1


def _within_reach(kernel: WalkKernel, state: WalkState, move: Tensor) -> Tensor:
    """Shorten moves that no drift explains, in place, and halve their step size: a kick leaves the fiber for good."""
    if kernel.limit is None:
        return move
    length, reach = move.norm(dim=1), REACH * kernel.drift_length
    state.step_size = torch.where(length > reach, state.step_size * 0.5, state.step_size)
    return move.mul_((reach / length).clamp_max(1.0)[:, None])


def set_anchor(state: WalkState, nll: Tensor) -> None:
    """Make the present point the one to go back to; `nll` (W,) is exact there. Called at every record."""
    state.nll = nll.double()
    state.anchor, state.anchor_drifts, state.anchor_nll = (
        state.position.clone(),
        state.drifts.clone(),
        state.nll.clone(),
    )
    state.halved = torch.zeros_like(state.halved)


def secure(state: WalkState, potential: Tensor) -> bool:
    """Put walks that are not finite back to their last record, before a record is made.

    A record that is not finite would be a point of no return: it is what a walk goes back to.

    Args:
        state: The walks.
        potential: U, or the NLL, of every walk, (W,).

    Returns:
        Whether a walk went back, so that what was measured of it no longer holds.
    """
    lost = ~(torch.isfinite(state.position.sum(dim=1)) & torch.isfinite(potential))
    if not bool(lost.any()):
        return False
    _go_back(state, lost, state.nll)
    return True


def _lost(kernel: WalkKernel, state: WalkState, nll: Tensor) -> Tensor:
    lost = ~torch.isfinite(nll)
    if kernel.limit is not None:
        rise, before = nll - kernel.nll_star, (state.nll - kernel.nll_star).clamp_min(0)
        lost |= rise > JUMP * (kernel.limit + before)
    return lost | state.diverged


def _control_step_size(kernel: WalkKernel, state: WalkState, nll: Tensor) -> None:
    if kernel.limit is None:
        return
    # A walk that was above the limit did not drift: only its correction can have raised it further.
    above = kernel.nll_star + kernel.limit
    worse = (nll > state.nll) & (state.nll > above)
    quiet = (state.step_size * RECOVERY).clamp_max(1.0)
    state.step_size = torch.where(worse, state.step_size * 0.5, quiet)
    if state.momentum is not None:
        state.momentum.mul_((~worse)[:, None])


def _go_back(state: WalkState, lost: Tensor, nll: Tensor) -> None:
    """Back to the last record at half the step size; below the smallest one, diverged. Mends nll in place."""
    state.position[lost] = state.anchor[lost]
    if state.momentum is not None:
        state.momentum[lost] = 0
    state.drifts[lost] = state.anchor_drifts[lost]
    nll[lost] = state.anchor_nll[lost]
    fresh = lost & ~state.diverged
    state.step_size[fresh] *= 0.5
    state.halved |= fresh
    state.diverged |= lost & (state.step_size < SMALLEST_STEP)
