"""A matplotlib figure as an `<svg>` element that belongs to the HTML page around it.

matplotlib draws with placeholder colours; they are then replaced by the page's CSS variables, so
that one drawing reads on white, on black and on paper. Text stays text in the page's own font
(small files, no outlines). Nothing in the output depends on time, place or chance: the same figure
gives the same bytes.
"""

import io
import re
from html import escape
from typing import Any

from matplotlib.figure import Figure

INK, QUIET, RULE, BAND = "#010101", "#020202", "#030303", "#040404"
COLOURS = {"lora": "#050505", "qlora": "#060606", "full": "#070707"}
"""Of the methods."""
SERIES = ("#080808", "#090909", "#0a0a0a", "#0b0b0b", "#0c0c0c", "#0d0d0d")
"""Of an ordered series (the ranks of a sweep), from low to high."""
VARIABLES = {
    INK: "var(--ink)",
    QUIET: "var(--quiet)",
    RULE: "var(--rule)",
    BAND: "var(--band)",
    **{colour: f"var(--{arm})" for arm, colour in COLOURS.items()},
    **{colour: f"var(--series-{at})" for at, colour in enumerate(SERIES, start=1)},
}
"""Placeholder colour -> the page's variable."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tunefork",
    "font.size": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": QUIET,
    "axes.labelcolor": QUIET,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
}
"""matplotlib settings under which a figure is to be drawn and written."""


def svg_element(figure: Figure, key: str, description: str) -> str:
    """`figure` as an `<svg>` element; its ids begin with `key`, unique in the page.

    `description` says what the figure shows, for who cannot see it. Call under STYLE.
    """
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    svg = stream.getvalue()
    box = re.search(r'viewBox="([^"]+)"', svg)
    assert box is not None, "matplotlib always writes a viewBox"
    svg = svg[svg.index("<svg") :]
    for pattern, put in _CLEANING.items():
        svg = re.sub(pattern, put, svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{key}-", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    start = f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(description)}">'
    return start + svg[svg.index(">") + 1 :].strip()


_CLEANING = {
    r"<metadata>.*?</metadata>": "",
    r"<style.*?</style>": "",  # would hold for the whole page
    r"<!--.*?-->": "",
    r' xmlns(:\w+)?="[^"]*"': "",  # HTML needs none
    r"xlink:href": "href",
    r'<g id="[^"]*"': "<g",  # nothing refers to a group
    r"font: ([\d.]+px) [^;\"]+": r"font-size: \1",  # the page chooses the font
    r"font-family: [^;\"]+;? ?": "",
    r' transform="rotate\(-0 [^"]*"': "",
    r"\n\s*": " ",
}
"""Pattern -> what is put in its place."""
