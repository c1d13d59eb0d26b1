"""What the figures of every report share: size, grid and legend. `svg.py` puts them into a page."""

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH_IN = 4.7
"""Width of a figure, inches of 72 points: legible on a phone, and two fit side by side."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure for the page."""

    title: str
    caption: str
    svg: str
    """An `<svg>` element with its own text alternative."""


def make_axes(height: float) -> tuple[Figure, Axes]:
    """A figure of the page's width and `height` inches."""
    figure = Figure(figsize=(WIDTH_IN, height), layout="constrained")
    return figure, figure.add_subplot()


def finish(axes: Axes, x: str, y: str) -> None:
    """Grid, labels, and the legend above the axes, where it hides nothing."""
    axes.grid(axis="y")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(
        frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderpad=0, handlelength=3
    )
