r"""The core of the residual kind: a few learned steps out along the radius, each looking once at the network's outputs.

A free direction d becomes inputs x = [1, U d, F_1, ..., F_M]. F_j are leading principal components of the change of
the network's outputs on the j-th part of a fixed sample of training inputs, at the point that the inputs before it
predict for the radius $R_j$ (a *mark*). All parts together cost one forward pass over the sample. At a radius r the
coefficients of the walk's residual are linear in the inputs whose marks do not lie beyond r, with weights for each
recorded radius (a *node*) and linear interpolation between nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Probe = Callable[[Tensor, int], Tensor]
"""Parameters (n, D) and the number of a part -> outputs on that part of the sample, flattened, (n, F)."""


@dataclass
class Stretch:
    r"""Free displacement at a radius, each coordinate by its own share: $v \mapsto (1 + \min(r/r_0, 1)\,a) \odot v$."""

    slope: Tensor
    """a, (D,)."""
    radius: float
    """r_0."""

    def place(self, directions: Tensor, radius: float) -> Tensor:
        """Displacement of directions (n, D) at a radius, (n, D)."""
        share = min(radius / self.radius, 1.0)
        return directions * (self.slope * (share * radius) + radius)


@dataclass
class Chain:
    """Learned coefficients. `cores` and `marks` are filled in the order of the radius while it is fitted."""

    theta_star: Tensor
    """(D,)."""
    stretch: Stretch
    basis: Tensor
    """Orthonormal rows U, (k, D)."""
    nodes: list[float]
    """Radii with weights of their own, rising."""
    marks: list[int]
    """Nodes at which the network is looked at, rising; one a part of the sample."""
    probe: Probe
    before: list[Tensor] = field(default_factory=list)
    """Weights that predict the point of a mark from the inputs before it, each (p_j, k)."""
    means: list[Tensor] = field(default_factory=list)
    """Mean change of outputs at each mark, (F,)."""
    components: list[Tensor] = field(default_factory=list)
    """Principal components at each mark, (F, m)."""
    cores: list[Tensor] = field(default_factory=list)
    """Weights of each node, (p, k)."""

    def project(self, directions: Tensor) -> Tensor:
        """First inputs [1, U d sqrt(D)], (n, 1 + k)."""
        inside = directions @ self.basis.T * directions.shape[1] ** 0.5
        return torch.cat([inside.new_ones(len(inside), 1), inside], dim=1)

    def outputs_at_mark(self, directions: Tensor, inputs: Tensor, mark: int) -> Tensor:
        """Change of the outputs at the point that `inputs` predict for a mark, (n, F)."""
        radius = self.nodes[self.marks[mark]]
        point = self.position(directions, inputs @ self.before[mark], radius)
        return self.probe(point, mark) - self.probe(self.theta_star[None], mark)

    def inputs(self, directions: Tensor, radius: float = float("inf")) -> Tensor:
        """Inputs of directions (n, D), as far as the coefficients at `radius` need them, (n, p)."""
        x = self.project(directions)
        last = self._node_above(radius)
        for mark, node in enumerate(self.marks):
            if node > last:
                break
            change = self.outputs_at_mark(directions, x, mark)
            x = torch.cat([x, (change - self.means[mark]) @ self.components[mark]], dim=1)
        return x

    def coefficients(self, inputs: Tensor, radius: float) -> Tensor:
        """Linear part of the residual in the basis, (n, k)."""
        upper = self._node_above(radius)
        high = self._core(inputs, upper)
        below = self.nodes[upper - 1] if upper else 0.0
        share = min(1.0, (radius - below) / (self.nodes[upper] - below))
        if share > 1 - 1e-6:
            return high
        return high * share + (self._core(inputs, upper - 1) * (1 - share) if upper else 0.0)

    def position(self, directions: Tensor, coefficients: Tensor, radius: float) -> Tensor:
        """theta* + stretched displacement + coefficients in the basis, (n, D)."""
        return torch.addmm(self.stretch.place(directions, radius).add_(self.theta_star), coefficients, self.basis)

    def _node_above(self, radius: float) -> int:
        return next((g for g, node in enumerate(self.nodes) if node >= radius * (1 - 1e-6)), len(self.nodes) - 1)

    def _core(self, inputs: Tensor, node: int) -> Tensor:
        weights = self.cores[node]
        return inputs[:, : len(weights)] @ weights

    def to_tensors(self) -> dict[str, Tensor]:
        """For a safetensors file."""
        lists: dict[str, Sequence[Tensor]] = {
            "before": self.before, "means": self.means, "components": self.components, "cores": self.cores,
        }  # fmt: skip
        tensors = {f"chain.{name}.{i}": t.contiguous() for name, parts in lists.items() for i, t in enumerate(parts)}
        return tensors | {
            "chain.theta_star": self.theta_star,
            "chain.slope": self.stretch.slope,
            "chain.stretch_radius": torch.tensor(self.stretch.radius, dtype=torch.float64),
            "chain.basis": self.basis,
            "chain.nodes": torch.tensor(self.nodes, dtype=torch.float64),
            "chain.marks": torch.tensor(self.marks, dtype=torch.int64),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], probe: Probe) -> Chain:
        """Inverse of `to_tensors`; the probe comes from the network and the data."""

        def parts(name: str) -> list[Tensor]:
            count = sum(key.startswith(f"chain.{name}.") for key in tensors)
            return [tensors[f"chain.{name}.{i}"] for i in range(count)]

        return cls(
            theta_star=tensors["chain.theta_star"],
            stretch=Stretch(tensors["chain.slope"], float(tensors["chain.stretch_radius"])),
            basis=tensors["chain.basis"],
            nodes=tensors["chain.nodes"].tolist(),
            marks=tensors["chain.marks"].tolist(),
            probe=probe,
            before=parts("before"),
            means=parts("means"),
            components=parts("components"),
            cores=parts("cores"),
        )
