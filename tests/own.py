"""Networks and data as a user brings them, for runs from a configuration: ``python:tests.own:NAME``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def table() -> tuple[np.ndarray, np.ndarray]:
    """Two overlapping classes in six columns, (160, 6)."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(160, 6))
    return x, (x[:, 0] * x[:, 1] + 0.5 * x[:, 2] + 0.7 * rng.normal(size=160) > 0).astype(int)


def images() -> tuple[np.ndarray, np.ndarray]:
    """Handwritten digits 0 to 3, (160, 1, 8, 8)."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    chosen = np.flatnonzero(digits.target < 4)[:160]
    return (digits.images[chosen, None] / 16).astype(np.float32), digits.target[chosen]


def tokens() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Sentences of up to six tokens, with a mask, which hold token 5 more or less often."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 160)
    ids = np.where(rng.random((160, 6)) < 0.1 + 0.3 * y[:, None], 5, rng.integers(1, 12, (160, 6)))
    mask = np.arange(6) < rng.integers(3, 7, (160, 1))
    return {"ids": np.where(mask, ids, 0), "mask": mask}, y


def sequences() -> tuple[np.ndarray, np.ndarray]:
    """Noisy waves of two frequencies, (160, 8, 1)."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 160)
    wave = np.sin(np.arange(8) * (0.6 + 0.5 * y[:, None]) + rng.uniform(0, 6, (160, 1)))
    return (wave + 0.4 * rng.normal(size=(160, 8)))[..., None].astype(np.float32), y


class Two(nn.Module):
    """A backbone and a head; the backbone may be frozen."""

    def __init__(self, *, frozen: bool = False) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 10), nn.ReLU())
        self.head = nn.Linear(10, 2)
        self.backbone.requires_grad_(not frozen)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and what the head saw."""
        hidden = self.backbone(x)
        return self.head(hidden), hidden


def mlp() -> nn.Module:
    """Backbone and head."""
    return Two()


def frozen() -> nn.Module:
    """Backbone without requires_grad."""
    return Two(frozen=True)


def conv() -> nn.Module:
    """A conv net with BatchNorm."""
    first = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, nn.Flatten(), nn.Dropout(0.2), nn.Linear(36, 4))


class Attention(nn.Module):
    """A transformer encoder over token numbers with a mask; named inputs, named outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8, padding_idx=0)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 1)
        self.head = nn.Linear(8, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Logits of the mean over the tokens that the mask shows."""
        hidden = self.encoder(self.table(ids), src_key_padding_mask=~mask)
        shown = mask[..., None].to(hidden.dtype)
        return {"logits": self.head((hidden * shown).sum(1) / shown.sum(1))}


def transformer() -> nn.Module:
    """A small transformer classifier."""
    return Attention()


class Recurrent(nn.Module):
    """Recurrent layers, read at the last step."""

    def __init__(self, cell: nn.RNNBase) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(cell.hidden_size * (1 + cell.bidirectional), 2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.cell(x)[0][:, -1])


def recurrent() -> nn.Module:
    """A small recurrent classifier."""
    return Recurrent(nn.LSTM(1, 4, batch_first=True, bidirectional=True))


def stacked() -> nn.Module:
    """Two GRU layers."""
    return Recurrent(nn.GRU(1, 3, num_layers=2, batch_first=True, dropout=0.1))


def plain_recurrent() -> nn.Module:
    """The oldest kind."""
    return Recurrent(nn.RNN(1, 4, batch_first=True))


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        return slopes[0] * (1 - ctx.saved_tensors[0].tanh().square())


class Opaque(nn.Module):
    """A network with an operation that has a gradient of its own, which cannot be differentiated again."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(8, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(_Once.apply(self.inner(x.flatten(1))))


def opaque() -> nn.Module:
    """As many have it who write their own kernels."""
    return Opaque()


class Detached(nn.Module):
    """The backbone runs without gradients, though its parameters ask for them."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Sequential(nn.Linear(6, 10), nn.ReLU()), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        with torch.no_grad():
            hidden = self.backbone(x)
        return self.head(hidden)


def detached() -> nn.Module:
    """No walk can hold its backbone."""
    return Detached()


def trained(network: nn.Module, x: Tensor, y: Tensor, decay: float) -> nn.Module:
    """A network after a plain training loop of a mean loss with weight decay."""
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=decay)
    for _ in range(300):
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(x)[0], y).backward()
        optimiser.step()
    return network


class Twice(nn.Module):
    """One layer under two names, one weight in two layers, and buffers that both share."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.middle, self.tied = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 2)
        self.again, self.second_norm, self.tied.weight = self.middle, self.norm, self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.norm(self.middle(torch.tanh(self.inner(x))))
        return self.head(torch.tanh(self.tied(torch.tanh(self.second_norm(self.again(x))))))


class Single(nn.Module):
    """A network that asks for single precision by name, as many do for images of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(torch.tanh(self.inner(x.float())).to(torch.float32))
