r"""The core of the residual kind: a few learned steps out along the radius, each with one look at the gradient.

A free direction d is carried to the radii $r_1 < \dots < r_M$ (*marks*). At a mark, a guess of the point is made from
the free displacement $v = r_j d$, the last point p and the last gradient; the gradient g of the summed NLL is taken
there, over a fixed sample of training rows; and the point is a combination of v, p, both gradients and a brake. A
combination has one gain for each direction of the basis, and one for all that lies outside of it:

$$\theta_j - \theta^* = \sum_a \left[ s_a (1 - U'U) + U'\,\mathrm{diag}(g_a)\,U \right] x_a + U' W [1, Ud, Up, Ug]$$

The basis holds curvature directions, so that the gains act as step sizes. The number of looks is fixed: nothing is
iterated until it converges. The brake is the step from p to the guess times $n / (n + \gamma)$, n the rise of the NLL:
walks that have left the fiber are held back by their guard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Look = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Points (n, D) -> gradient of the summed NLL less that at theta* (n, D), and the rise of the NLL (n,)."""


@dataclass
class Vector:
    """Displacements as they are and in the basis."""

    full: Tensor
    """(n, D)."""
    inside: Tensor
    """(n, k)."""

    def __mul__(self, factor: float | Tensor) -> Vector:
        return Vector(self.full * factor, self.inside * factor)

    def __sub__(self, other: Vector) -> Vector:
        return Vector(self.full - other.full, self.inside - other.inside)


@dataclass(frozen=True)
class Gains:
    """Coefficients of a combination of m vectors."""

    inside: Tensor
    """For each direction of the basis, (m, k)."""
    outside: Tensor
    """For the rest, (m,)."""

    def combine(self, parts: Sequence[Vector], basis: Tensor) -> Vector:
        """The combination."""
        scales = self.outside.tolist()
        full, plain = parts[0].full * scales[0], parts[0].inside * scales[0]
        inside = parts[0].inside * self.inside[0]
        for scale, gain, part in zip(scales[1:], self.inside[1:], parts[1:], strict=True):
            full.add_(part.full, alpha=scale)
            plain.add_(part.inside, alpha=scale)
            inside.addcmul_(part.inside, gain)
        return Vector(full.addmm_(inside - plain, basis), inside)


@dataclass
class State:
    """Where directions have come at a mark."""

    point: Vector
    """Offset from theta*."""
    gradient: Vector
    """Of the NLL at the guess."""

    def inputs(self, inside: Tensor) -> Tensor:
        """[1, U d sqrt(D), U p, U g] for directions with coordinates `inside`, (n, 1 + 3 k)."""
        scaled = inside * self.point.full.shape[1] ** 0.5
        return torch.cat([inside.new_ones(len(inside), 1), scaled, self.point.inside, self.gradient.inside], dim=1)


@dataclass
class Chain:
    """Learned steps. `before`, `after` and `cores` are filled in the order of the marks while it is fitted."""

    theta_star: Tensor
    """(D,)."""
    basis: Tensor
    """Orthonormal rows U, (k, D)."""
    marks: list[float]
    """Radii, rising."""
    gamma: float
    """Effective number of parameters."""
    look: Look
    captured: float = 1.0
    """Share of the squares of what slopes leave that lies in the basis."""
    before: list[Gains] = field(default_factory=list)
    """For the guess at each mark, of [v] or [v, p, g]."""
    after: list[Gains] = field(default_factory=list)
    """For the point at each mark, of the same, the new gradient and the brake."""
    cores: list[Tensor] = field(default_factory=list)
    """Linear correction at each mark, (1 + 3 k, k)."""

    def vector(self, full: Tensor) -> Vector:
        """With its coordinates in the basis."""
        return Vector(full, full @ self.basis.T)

    def parts(self, direction: Vector, state: State | None, mark: int) -> list[Vector]:
        """What a guess is made of."""
        free = direction * self.marks[mark]
        return [free] if state is None else [free, state.point, state.gradient]

    def looked(self, parts: list[Vector], guess: Vector, state: State | None) -> list[Vector]:
        """What a point is made of: one look at the gradient."""
        gradient, rise = self.look(guess.full + self.theta_star)
        rise = rise.clamp_min(0)
        brake = (rise / (rise + self.gamma)).nan_to_num(1.0).to(guess.full)[:, None]
        step = guess if state is None else guess - state.point
        return [*parts, self.vector(gradient), step * brake]

    def finish(self, parts: list[Vector], direction: Vector, mark: int) -> State:
        """The point at a mark."""
        gradient = parts[-2]
        point = self.after[mark].combine(parts, self.basis)
        if len(self.cores) > mark:
            shift = State(point, gradient).inputs(direction.inside) @ self.cores[mark]
            point = Vector(point.full.addmm_(shift, self.basis), point.inside + shift)
        return State(point, gradient)

    def step(self, direction: Vector, state: State | None, mark: int) -> State:
        """From one mark to the next."""
        parts = self.parts(direction, state, mark)
        guess = self.before[mark].combine(parts, self.basis)
        return self.finish(self.looked(parts, guess, state), direction, mark)

    def seen(self, state: State, inside: Tensor) -> Tensor:
        """What the remainder is told, (n, 2 + 4 k): the inputs of the state, and one more look, at the point itself."""
        gradient, rise = self.look(state.point.full + self.theta_star)
        level = (rise.clamp_min(0) / self.gamma).log1p().nan_to_num(0.0, 0.0).to(inside)
        return torch.cat([state.inputs(inside), gradient @ self.basis.T, level[:, None]], dim=1)

    def states(self, direction: Vector, radius: float) -> tuple[State | None, State]:
        """States at the marks below and at or above a radius."""
        last, state = None, self.step(direction, None, 0)
        for mark in range(1, self.above(radius) + 1):
            last, state = state, self.step(direction, state, mark)
        return last, state

    def above(self, radius: float) -> int:
        """First mark that does not lie below a radius."""
        return next((j for j, mark in enumerate(self.marks) if mark >= radius * (1 - 1e-6)), len(self.marks) - 1)

    def share(self, radius: float) -> float:
        """How far a radius lies between the mark below and the one above it, in (0, 1]."""
        upper = self.above(radius)
        below = self.marks[upper - 1] if upper else 0.0
        share = (radius - below) / (self.marks[upper] - below)
        return 1.0 if share > 1 - 1e-6 else share

    def offset(self, states: tuple[State | None, State], radius: float) -> Tensor:
        """Displacement from theta* at a radius, straight between marks, (n, D)."""
        share, (last, state) = self.share(radius), states
        if share == 1.0:
            return state.point.full
        full = state.point.full * share
        return full if last is None else full.add_(last.point.full, alpha=1 - share)

    def to_tensors(self) -> dict[str, Tensor]:
        """For a safetensors file."""
        tensors = {f"chain.core.{j}": core.contiguous() for j, core in enumerate(self.cores)}
        for name, gains in (("before", self.before), ("after", self.after)):
            for j, gain in enumerate(gains):
                tensors[f"chain.{name}.{j}.inside"] = gain.inside.contiguous()
                tensors[f"chain.{name}.{j}.outside"] = gain.outside.contiguous()
        return tensors | {
            "chain.theta_star": self.theta_star,
            "chain.basis": self.basis,
            "chain.marks": torch.tensor(self.marks, dtype=torch.float64),
            "chain.gamma": torch.tensor([self.gamma, self.captured], dtype=torch.float64),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], look: Look) -> Chain:
        """Inverse of `to_tensors`, also where only the first marks are fitted; the look comes from network and data."""
        # Views into a file lie anywhere in memory, and products of matrices round by alignment: a fit that goes on from
        # a checkpoint would end with other bits.
        tensors = {name: tensor.clone() for name, tensor in tensors.items() if name.startswith("chain.")}

        def gains(name: str) -> list[Gains]:
            count = sum(key.startswith(f"chain.{name}.") and key.endswith(".inside") for key in tensors)
            keys = [f"chain.{name}.{j}" for j in range(count)]
            return [Gains(tensors[f"{key}.inside"], tensors[f"{key}.outside"]) for key in keys]

        count = sum(key.startswith("chain.core.") for key in tensors)
        return cls(
            theta_star=tensors["chain.theta_star"],
            basis=tensors["chain.basis"],
            marks=tensors["chain.marks"].tolist(),
            gamma=float(tensors["chain.gamma"][0]),
            look=look,
            captured=float(tensors["chain.gamma"][1]),
            before=gains("before"),
            after=gains("after"),
            cores=[tensors[f"chain.core.{j}"] for j in range(count)],
        )
