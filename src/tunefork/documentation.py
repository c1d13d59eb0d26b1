"""The reference pages that are generated: docs/recipe.md, docs/comparison.md, docs/advice.md,
docs/data_report.md, docs/serving_settings.md.

`python -m tunefork.documentation docs` writes them; tests/test_documentation.py fails when a
schema has changed and its page has not.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from tunefork.advise.page import advice_markdown
from tunefork.compare.comparison import comparison_markdown
from tunefork.data.report import report_markdown
from tunefork.recipe import Recipe
from tunefork.schema_markdown import schema_markdown
from tunefork.serve.settings import ServeSettings


def recipe_markdown() -> str:
    """The text of docs/recipe.md."""
    return schema_markdown(
        Recipe,
        "The recipe",
        "One YAML file says what a run is. Only `model` and `data.train` must be given.\n"
        "`--set section.key=value` beats the file. Unknown keys are errors.\n\n"
        "Generated from `src/tunefork/recipe/` by `python -m tunefork.documentation docs`.",
    )


def settings_markdown() -> str:
    """The text of docs/serving_settings.md."""
    return schema_markdown(
        ServeSettings,
        "The server's settings",
        "One YAML file (`tunefork serve --config FILE`), `--set section.key=value` over it, and\n"
        "flags over both. Only `base` must be given. Unknown keys are errors.\n\n"
        "Generated from `src/tunefork/serve/` by `python -m tunefork.documentation docs`.",
    )


PAGES: dict[str, Callable[[], str]] = {
    "recipe.md": recipe_markdown,
    "comparison.md": comparison_markdown,
    "advice.md": advice_markdown,
    "data_report.md": report_markdown,
    "serving_settings.md": settings_markdown,
}
"""File name under docs/ -> what makes its text."""


def write_pages(folder: Path) -> None:
    """Write every generated page into `folder`."""
    for name, text in PAGES.items():
        (folder / name).write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    write_pages(Path(sys.argv[1]))
