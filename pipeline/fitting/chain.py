"""Fit the learned steps of the residual kind: least squares from sums, one mark after the other."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.bayes.deformation.chain import Chain, Gains, State, Vector
from pipeline.bayes.deformation.ridge import Moments, fit_core
from pipeline.fitting.job import Team
from pipeline.fitting.reading import Points, Walks

SHRINKS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidates for the penalty of gains relative to the square of a part; held-out walks choose."""
BLIND_SHRINK = 1e-2
"""Taken where no walk is held out."""
ROUNDING = 1e-6
"""Share of squares below which a difference of sums is not trusted."""
DOUBLE = 1 << 23
"""Elements up to which sums are taken in double precision."""
SAVED_OFTEN = 1 << 26
"""Numbers in a basis above which only the finished chain is saved, not every mark."""
STATE_BYTES = 256 << 20
"""Most bytes of states that are kept from mark to mark; beyond it they are computed again."""


@dataclass
class Seen:
    """What is held of this worker's walks at one mark: coordinates in the basis, never positions."""

    held: Tensor
    """(w,) bool."""
    inputs: Tensor
    """Of the remainder, (w, p): see `Chain.seen`."""
    target: Tensor
    """U'(offset - v), (w, k)."""
    left: Tensor
    """Of that, what the chain leaves, (w, k)."""


@dataclass
class Fitted:
    """What a fit of the chain found out."""

    seen: Seen | None = None
    """Of the selected mark."""
    squares: list[list[float]] = field(default_factory=list)
    """Over held-out walks of all workers, at each mark: of offset - v, of that in the basis, of what the chain leaves
    outside of the basis, and inside."""

    def error(self, mark: int, inside: float | None = None) -> float | None:
        """Held-out squared error relative to that of the free displacement; `inside`: another one in the basis."""
        full, target, outside, left = self.squares[mark]
        return (outside + (left if inside is None else inside * target)) / full if full > 0 else None


@dataclass
class Sums:
    """Normal equations of a combination of m vectors: one for each direction of the basis, one for the rest."""

    inner: Tensor
    """(k, m, m), float64."""
    cross: Tensor
    """(k, m), float64."""
    outer: Tensor
    """(m, m), float64."""
    outer_cross: Tensor
    """(m,), float64."""
    squares: Tensor
    """Of the target inside and outside, (2,), float64."""

    @classmethod
    def zeros(cls, parts: int, rank: int) -> Sums:
        """Without rows."""
        shapes = ((rank, parts, parts), (rank, parts), (parts, parts), (parts,), (2,))
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(self, parts: list[Vector], target: Vector, take: Tensor) -> None:
        """Take in rows."""
        inside = torch.stack([p.inside[take].double() for p in [*parts, target]])
        products = torch.einsum("awk,bwk->kab", inside, inside)
        flat = torch.stack([p.full[take].reshape(-1) for p in [*parts, target]])
        flat = flat.double() if flat.numel() < DOUBLE else flat
        rest = (flat @ flat.T).double() - products.sum(0)
        self.inner += products[:, :-1, :-1]
        self.cross += products[:, :-1, -1]
        self.outer += rest[:-1, :-1]
        self.outer_cross += rest[:-1, -1]
        self.squares += torch.stack([products[:, -1, -1].sum(), rest[-1, -1]])

    def tensors(self) -> list[Tensor]:
        """To be added up over workers in place."""
        return [self.inner, self.cross, self.outer, self.outer_cross, self.squares]

    def solve(self, shrink: float) -> tuple[Tensor, Tensor]:
        """Gains inside (m, k) and outside (m,), float64."""
        # What lies outside is a difference of sums: where little does, it is rounding.
        floor = torch.diag((self.outer.diagonal().clamp_min(0) + self.inner.diagonal(dim1=1, dim2=2).sum(0)) * ROUNDING)
        outside = _solve((self.outer + floor)[None], self.outer_cross[None], shrink)[0]
        return _solve(self.inner, self.cross, shrink).T, outside

    def error(self, inside: Tensor, outside: Tensor) -> float:
        """Squared error of gains on these rows."""
        g = inside.T
        fit = torch.einsum("ka,kab,kb->", g, self.inner, g) - 2 * (g * self.cross).sum()
        return float(self.squares.sum() + fit + outside @ self.outer @ outside - 2 * outside @ self.outer_cross)


def _solve(inner: Tensor, cross: Tensor, shrink: float) -> Tensor:
    scale = inner.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt() + 1e-150
    unit = inner / scale[:, :, None] / scale[:, None, :]
    unit = unit + torch.eye(unit.shape[1], dtype=unit.dtype) * shrink
    return torch.linalg.solve(unit, (cross / scale)[..., None])[..., 0] / scale


def gains_of(team: Team, train: Sums, held: Sums, like: Tensor) -> Gains:
    """Solve with the penalty that is best on held-out walks."""
    for sums in (train, held):
        team.sum(sums.tensors())
    shrinks = SHRINKS if float(held.squares.sum()) > 0 else (BLIND_SHRINK,)
    solutions = [train.solve(shrink) for shrink in shrinks]
    inside, outside = min(solutions, key=lambda gains: held.error(*gains))
    return Gains(inside.to(like).contiguous(), outside.to(like))


class States:
    """Where the training walks have come at the last mark: kept where they fit, else computed again."""

    def __init__(self, chain: Chain, walks: int):
        self._chain, self._kept = chain, None
        if walks * chain.basis.shape[1] * 2 * chain.basis.element_size() <= STATE_BYTES:
            self._kept = chain.basis.new_zeros(2, walks, chain.basis.shape[1])

    def before(self, points: Points, mark: int) -> tuple[Vector, State | None]:
        """Directions, and their states at the mark before."""
        chain, direction = self._chain, self._chain.vector(points.direction)
        if not mark:
            return direction, None
        if self._kept is not None:
            point, gradient = (chain.vector(part) for part in self._kept[:, points.place])
            return direction, State(point, gradient)
        return direction, chain.states(direction, chain.marks[mark - 1])[1]

    def keep(self, points: Points, state: State) -> None:
        """Remember states of a mark; called after the last use of those before."""
        if self._kept is not None:
            self._kept[0, points.place], self._kept[1, points.place] = state.point.full, state.gradient.full


@torch.no_grad()
def fit_chain(team: Team, walks: Walks, chain: Chain, selected: int, squares: list[list[float]]) -> Fitted:
    """Fill the chain in the order of the radius; marks with `squares` are fitted already. Saves after each mark."""
    found, states = Fitted(squares=squares), States(chain, len(walks.walk))
    small = chain.basis.numel() <= SAVED_OFTEN
    for mark in range(len(chain.marks)):
        known = mark < len(squares)
        if not known:
            _fit_guess(team, walks, chain, states, mark)
        if not known or mark == selected:
            seen = _fit_point(team, walks, chain, states, found, mark, known)
            found.seen = seen if mark == selected else found.seen
        if not known and (small or mark + 1 == len(chain.marks)):
            team.save(mark, dict(chain.to_tensors()), {"step": 0, "curve": [], "squares": squares})
        for points in walks.at(mark) if mark == selected or mark + 1 < len(chain.marks) else ():
            direction, before = states.before(points, mark)
            state = chain.step(direction, before, mark)
            if mark == selected and found.seen is not None:
                found.seen.inputs[points.place] = chain.seen(state, direction.inside)
            if mark + 1 < len(chain.marks):
                states.keep(points, state)
    return found


def _fit_guess(team: Team, walks: Walks, chain: Chain, states: States, mark: int) -> None:
    sums = [Sums.zeros(1 if mark == 0 else 3, len(chain.basis)) for _ in range(2)]
    for points in walks.at(mark):
        direction, state = states.before(points, mark)
        parts, held = chain.parts(direction, state, mark), walks.held[points.place]
        for part, take in zip(sums, (~held, held), strict=True):
            part.add(parts, chain.vector(points.offset), take)
    chain.before.append(gains_of(team, sums[0], sums[1], chain.basis))


def _fit_point(team: Team, walks: Walks, chain: Chain, states: States, found: Fitted, mark: int, known: bool) -> Seen:
    """Gains and linear correction of the point at a mark, from one look; `known` ones are only applied."""
    count, k = len(walks.walk), len(chain.basis)
    m = 3 if mark == 0 else 5
    sums = [Sums.zeros(m, k) for _ in range(2)]
    inside = chain.basis.new_zeros(m, count, k)
    target, drift = chain.basis.new_zeros(count, k), chain.basis.new_zeros(count, k)
    full = torch.zeros(2, dtype=torch.float64)
    for points in walks.at(mark):
        direction, state = states.before(points, mark)
        parts = chain.parts(direction, state, mark)
        guess = chain.before[mark].combine(parts, chain.basis)
        parts = chain.looked(parts, guess, state)
        offset, held = chain.vector(points.offset), walks.held[points.place]
        for part, take in zip(sums, (~held, held), strict=True):
            part.add(parts, offset, take)
        inside[:, points.place] = torch.stack([part.inside for part in parts])
        target[points.place], drift[points.place] = offset.inside, direction.inside
        rest = offset - direction * chain.marks[mark]
        full += torch.stack([rest.full[held].square().sum(), rest.inside[held].square().sum()]).double()
    if not known:
        chain.after.append(gains_of(team, sums[0], sums[1], chain.basis))
    point = torch.einsum("mwk,mk->wk", inside, chain.after[mark].inside)
    inputs = _inputs(chain, drift, point, inside[-2])
    if not known:
        core = _core(team, walks.held, inputs, target - point)
        chain.cores.append(core.to(chain.basis).contiguous())
    point = point + inputs @ chain.cores[mark]
    left = target - point
    if not known:
        zero = sums[1].squares.new_zeros(m, k)
        outside = sums[1].error(zero, chain.after[mark].outside.double()) - float(sums[1].squares[0])
        rest = left[walks.held].double().square().sum()[None]
        team.sum([full, rest])
        found.squares.append([*full.tolist(), max(outside, 0.0), float(rest)])
    free = drift * chain.marks[mark]
    told = chain.basis.new_zeros(count, 2 + 4 * k)  # filled when the states go on
    return Seen(walks.held, told, target - free, left)


def _inputs(chain: Chain, drift: Tensor, point: Tensor, gradient: Tensor) -> Tensor:
    """See `State.inputs`."""
    blank = point.new_empty(0, chain.basis.shape[1])
    return State(Vector(blank, point), Vector(blank, gradient)).inputs(drift)


def _core(team: Team, held: Tensor, inputs: Tensor, left: Tensor) -> Tensor:
    """Ridge weights with the penalty that is best on held-out walks; zero where none helps."""
    moments = []
    for chosen in (~held, held):
        moments.append(Moments.of(inputs[chosen], left[chosen]))
        team.sum(moments[-1].tensors())
    core = fit_core(*moments)
    helps = core.error is None or core.error < 1.0
    return core.weights if helps else torch.zeros_like(core.weights)
