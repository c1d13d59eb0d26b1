"""The sweep as Markdown, for a repository or an issue (`--markdown FILE`)."""

from tunefork.page.units import bytes_text
from tunefork.sweep.result import SweepResult
from tunefork.sweep.summary import findings, headline, notes
from tunefork.sweep.table import Rows, failed_lines, rank_rows, ranked_rows, rate_rows


def sweep_markdown(result: SweepResult, command: str | None = None) -> str:
    """The page's text; the same sweep gives the same text."""
    parts = [
        f"# A sweep of {result.model_id}",
        _origin(result),
        *([f"    {command}"] if command else []),
        f"**{headline(result)}.**",
        "\n".join(f"- {line}" for line in findings(result)),
        "## Every configuration",
        _table(*ranked_rows(result)),
    ]
    heads, rows = rank_rows(result)
    if rows:
        parts += ["## Each rank at its best setting", _table(heads, rows)]
    if result.rate_effect is not None:
        parts += [
            "## Validation loss by rank (rows) and learning rate",
            _table(*rate_rows(result.rate_effect)),
        ]
    if failed := failed_lines(result):
        parts += ["## Failed", "\n".join(f"- {line}" for line in failed)]
    parts += ["## How it was measured", "\n".join(f"- {line}" for line in notes(result))]
    return "\n\n".join(parts) + "\n"


def _origin(result: SweepResult) -> str:
    memory = result.device.get("memory_bytes")
    device = str(result.device["name"]) + (f", {bytes_text(float(memory))}" if memory else "")
    return (
        f"{len(result.variants)} variants by {result.method} on {result.train_examples:,} training "
        f"examples; {device}; {result.created[:10]}; tunefork {result.tunefork_version}, torch "
        f"{result.versions.get('torch', '?')}."
    )


def _table(heads: list[str], rows: Rows) -> str:
    lines = [_line(heads), "|".join(["", *["---"] * len(heads), ""])]
    return "\n".join(lines + [_line(row) for row in rows])


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
