"""A report as one HTML page that can be sent, read on a phone and printed.

The page needs no script and no other file: style and figures are in it. Every text is escaped;
model ids, labels and errors may hold markup.
"""

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from tunefork.errors import TuneforkError
from tunefork.registry.run import write_atomically


def render(template: str, **values: Any) -> str:
    """The text of a template file, `tunefork.compare/report.html.j2`, with `style` and `values`."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["bound"] = _bound
    package, _, name = template.partition("/")
    text = files(package).joinpath(name).read_text(encoding="utf-8")
    style = files("tunefork.page").joinpath("style.css").read_text(encoding="utf-8")
    return environment.from_string(text.replace("{{ style }}", style)).render(**values)


def write_page(text: str, path: Path) -> None:
    """Write the page to `path`. Raises TuneforkError where it cannot be written."""
    try:
        write_atomically(path, text)
    except OSError as error:
        raise TuneforkError(
            f"{path}: cannot be written ({error.strerror}); make room or choose another --out"
        ) from error


def _bound(text: str) -> str:
    """`text` with each number bound to its unit, so that no line ends between them."""
    return re.sub(
        r"(?<=\d) (?=%|points?|times|[kMGT]?B\b|s\b|min\b|h\b)", "\N{NO-BREAK SPACE}", text
    )
