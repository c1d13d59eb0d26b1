"""`report.html` of a sweep: the recommendation first, then every figure behind it, one file."""

from pathlib import Path

import yaml

from tunefork.page.html import render, write_page
from tunefork.page.units import bytes_text
from tunefork.sweep.figures import drawings
from tunefork.sweep.result import SweepResult
from tunefork.sweep.summary import findings, headline, notes
from tunefork.sweep.table import failed_lines, rank_rows, ranked_rows, rate_rows

TEMPLATE = "tunefork.sweep/report.html.j2"


def write_report(result: SweepResult, path: Path) -> None:
    """Write the page to `path`. Raises TuneforkError where it cannot be written."""
    write_page(report_html(result), path)


def report_html(result: SweepResult) -> str:
    """The page as text; the same sweep gives the same text."""
    rates = None if result.rate_effect is None else rate_rows(result.rate_effect)
    return render(
        TEMPLATE,
        result=result,
        headline=headline(result),
        origin=(
            f"{len(result.variants)} variants of {result.model_id} by {result.method}, swept on "
            f"{result.created[:10]} by tunefork {result.tunefork_version}"
        ),
        findings=findings(result),
        ranked=ranked_rows(result),
        ranks=rank_rows(result),
        rates=rates,
        drawings=drawings(result),
        failed=failed_lines(result),
        notes=list(notes(result)),
        machine=_machine(result),
        recipe=yaml.safe_dump(result.recipe, sort_keys=False, allow_unicode=True),
    )


def _machine(result: SweepResult) -> list[tuple[str, str]]:
    rows = [("Device", str(result.device["name"]))]
    if result.peak_memory_bytes is not None:
        rows.append(("Peak memory, training", bytes_text(result.peak_memory_bytes)))
    rows.append(("Training examples", f"{result.train_examples:,}"))
    rows.append(("Validation examples", f"{result.validation_examples:,}"))
    rows.append(("Evaluation examples", f"{result.eval_examples:,}"))
    return rows + [(name, version) for name, version in result.versions.items()]
