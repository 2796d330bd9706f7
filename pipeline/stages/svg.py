"""Matplotlib figures as inline SVG whose colours are CSS variables, so that one figure serves light, dark and print."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib

# Colours that no figure uses otherwise; each becomes a CSS variable of the page.
INK, MUTED, GRID = "#101112", "#202122", "#303132"
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)"}
_SERIES = {f"#4{number:x}5{number:x}6{number:x}": f"var(--c{number})" for number in range(1, 13)}
SERIES = list(_SERIES)
METHOD_COLOURS = {
    "walk": SERIES[0],
    "map": SERIES[1],
    "deformation": SERIES[2],
    "temperature": SERIES[3],
    "random": SERIES[4],
    "gaussian": SERIES[5],
    "ensemble": SERIES[6],
    "ensemble_temperature": SERIES[7],
    "laplace": SERIES[8],
    "laplace_linearised": SERIES[9],
    "laplace_torch": SERIES[9],
    "swag": SERIES[10],
    "walk_temperature": SERIES[11],
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "font.family": "sans-serif",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "savefig.transparent": True,
}


@dataclass(frozen=True)
class Figure:
    """One figure of the report."""

    name: str
    title: str
    svg: str
    caption: str


class Canvas:
    """Axes to draw on, and where the finished SVG appears."""

    def __init__(self, figure: Any, axes: Any):
        self.figure, self.axes, self.svg = figure, axes, ""


@contextmanager
def drawing(
    name: str, alt: str, rows: int = 1, columns: int = 1, size: tuple[float, float] = (4.7, 3.1)
) -> Iterator[Canvas]:
    """Draw on fresh axes; at the end `canvas.svg` holds the figure with its text alternative."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Drawing

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Drawing(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        canvas = Canvas(figure, figure.subplots(rows, columns, squeeze=False))
        yield canvas
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, dpi=160)
        canvas.svg = _inline(buffer.getvalue(), name, alt)


def _inline(svg: str, name: str, alt: str) -> str:
    """Strip what a page does not need, make ids unique, and put variables in place of colours."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    body = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", body)
    for colour, variable in {**_VARIABLES, **_SERIES}.items():
        body = body.replace(colour, variable)
    body = re.sub(r"font: ([^;\"]*?)'[^\"]*?sans-serif", r"font: \1sans-serif", body)
    head = re.match(r"<svg[^>]*>", body)
    assert head is not None
    box = re.search(r'viewBox="[^"]*"', head.group(0))
    opening = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{box.group(0) if box else ""} role="img" aria-label="{html.escape(alt, quote=True)}">'
    )
    return opening + body[head.end() :]
