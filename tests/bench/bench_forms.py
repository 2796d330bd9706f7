"""Networks that no chain of layers describes: gradients a second in a loop, under vmap, and under compiled vmap.

    python tests/bench/bench_forms.py [--only norm ...] [--json PATH]

One process with one thread; the implementations take turns, and each number is the best of the rounds on the
processor's clock. "chosen" is what the product takes without and with compiling.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from pipeline.bayes.kernels import nll_gradient, plan_form
from pipeline.bayes.likelihood import Categorical
from pipeline.bayes.params import Network

console = Console(width=140)
FOREVER = 10**12
"""Planned gradients that repay any compiler."""


class Transformer(nn.Module):
    """Token ids -> classes."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, batch_first=True, dropout=0.0)
        self.embed, self.last = nn.Embedding(50, width), nn.Linear(width, 3)
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(self.body(self.embed(tokens)).mean(1))


class Residual(nn.Module):
    """A convolution with BatchNorm around which its input is led."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def normed(inputs: int, width: int) -> nn.Sequential:
    """Two hidden layers with LayerNorm."""
    hidden = [nn.Linear(inputs, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width)]
    return nn.Sequential(*hidden, nn.GELU(), nn.Linear(width, 3))


def residual(channels: int) -> nn.Sequential:
    """A small ResNet: a first convolution, two residual blocks with pooling between, the mean over the image."""
    first = [nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2)]
    rest = [Residual(channels), nn.MaxPool2d(2), Residual(channels), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*first, *rest, nn.Linear(channels, 3))


CASES: dict[str, tuple[str, Callable[[], nn.Module], tuple[int, ...], int]] = {
    "norm": ("LayerNorm MLP 20-32-32-3, 300 rows", lambda: normed(20, 32), (300, 20), 16),
    "norm-wide": ("LayerNorm MLP 100-128-128-3, 1000 rows", lambda: normed(100, 128), (1000, 100), 8),
    "transformer": ("transformer, width 16, 1 layer, 200 x 12", lambda: Transformer(16, 1), (200, 12), 8),
    "transformer-wide": ("transformer, width 64, 2 layers, 200 x 24", lambda: Transformer(64, 2), (200, 24), 4),
    "resnet-small": ("ResNet, 8 channels, 100 of 8 x 8", lambda: residual(8), (100, 1, 8, 8), 8),
    "resnet": ("ResNet, 8 channels, 300 of 28 x 28", lambda: residual(8), (300, 1, 28, 28), 4),
}
"""Title, network, shape of the inputs, walks."""


def measure(key: str, rounds: int) -> dict[str, Any]:
    """Rates of all forms, what is chosen, and the seconds of the compiler."""
    title, build, shape, walks = CASES[key]
    draw = torch.Generator().manual_seed(0)
    tokens = key.startswith("transformer")
    x = torch.randint(0, 50, shape, generator=draw) if tokens else torch.randn(shape, generator=draw)
    network = Network(build())
    y = torch.randint(0, 3, (len(x),), generator=draw)
    theta = network.theta() + 0.02 * torch.randn(walks, network.dim, generator=draw)
    plain = plan_form(network, x, len(x), FOREVER, False)[0]
    chosen = plan_form(network, x, len(x), FOREVER, "auto")
    forms = {"loop": ("loop", False), "vmap": ("vmap", False), "compiled": ("vmap", True)}
    kernels, first, rates = {}, {}, dict.fromkeys(forms, 0.0)
    for name, (form, compiled) in forms.items():
        kernels[name] = nll_gradient(network, Categorical(3), x, y, form=form, compile=compiled)
        began = time.perf_counter()
        kernels[name](theta)
        first[name] = time.perf_counter() - began
    for _ in range(rounds):
        for name, kernel in kernels.items():
            began, calls = time.process_time(), 0
            while calls == 0 or time.process_time() - began < 0.15:
                kernel(theta)
                calls += 1
            rates[name] = max(rates[name], walks * calls / (time.process_time() - began))
    names = plain, "compiled" if chosen[1] else chosen[0]
    return {
        "case": key,
        "title": title,
        "parameters": network.dim,
        "walks": walks,
        "first": first,
        **rates,
        "chosen": names,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(CASES), action="append")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=str)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the compiler about its own insides
    told = {"system": platform.platform(), "torch": torch.__version__, "load": os.getloadavg()}
    table = Table("", "parameters", "loop", "vmap", "compiled", "first call", "chosen", title="Gradients a second")
    rows = []
    for key in arguments.only or CASES:
        row = measure(key, arguments.rounds)
        rows.append(row)
        numbers = [f"{row[name]:,.0f}" for name in ("loop", "vmap", "compiled")]
        chosen = " or ".join(dict.fromkeys(row["chosen"]))
        table.add_row(row["title"], f"{row['parameters']:,}", *numbers, f"{row['first']['compiled']:.0f} s", chosen)
    console.print(table)
    console.print(f"torch {told['torch']}, one thread; {told['system']}; load {told['load'][0]:.1f}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"settings": told, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
