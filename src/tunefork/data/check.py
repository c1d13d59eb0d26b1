"""`tunefork data check`: what a run would find in its data, before any model is loaded.

It is the loader's own survey, so that what is checked is what will be trained on, with one
difference: `data.max_train_examples` and `data.max_eval_examples` are lifted, because a bad row
outside today's subset is still a bad row.
"""

from typing import Any

from tunefork.data.faults import FaultReport
from tunefork.data.loader import survey
from tunefork.data.report import Report, SplitReport
from tunefork.recipe import Recipe


def check(recipe: Recipe, tokenizer: Any) -> Report:
    """Survey the data of `recipe`; faults are in the report's `errors` and not raised.

    Raises DataError only where a location cannot be read at all or the recipe does not suit it.
    """
    lifted = {"max_train_examples": None, "max_eval_examples": None}
    section = recipe.data.model_copy(update=lifted)
    return survey(recipe.model_copy(update={"data": section}), tokenizer).report


def render_report(report: Report) -> str:
    """The report as plain text. Every row that cannot be used is named, however many."""
    lines = [f"format {report.format}, template {report.template}"]
    lines += _describe("training", report.train) + _describe("evaluation", report.eval)
    lines += _table(report)
    lines += [f"evaluation examples that are training examples too: {report.overlap}"]
    lines += [f"rows that cannot be used: {len(report.problems)}"]
    lines += [f"  {problem}" for problem in report.problems]
    lines += [f"warning: {warning}" for warning in report.warnings]
    lines += [f"error: {error}" for error in report.errors]
    return "\n".join(lines)


def _table(report: Report) -> list[str]:
    """A line for each fault that was found, the gravest first."""
    if not report.faults:
        return ["faults: none found"]
    gravest = sorted(report.faults, key=lambda found: found.severity != "error")
    lines = ["faults found:"]
    for found in gravest:
        lines.append(f"  {found.severity:<6}{found.fault:<16}{found.count:>8,}  {_kinds(found)}")
    return lines


def _kinds(found: FaultReport) -> str:
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in found.kinds.items())
    decided = f"({found.setting})" if found.setting else ""
    return "  ".join(part for part in (kinds, decided) if part)


def _describe(name: str, split: SplitReport) -> list[str]:
    lengths = ", ".join(f"{quantile} {value}" for quantile, value in split.length_quantiles.items())
    lines = [
        f"{name}: {split.location}",
        f"  rows {split.num_rows:,}, used {split.num_examples:,}, sequences "
        f"{split.num_sequences:,}, duplicates {split.duplicates:,}, cut {split.num_cut:,}, "
        f"too long and left out {split.num_dropped:,}",
        f"  tokens {split.num_tokens:,}, supervised {split.supervised_tokens:,} "
        f"({split.supervised_share:.1%})",
        f"  tokens of a sequence: {lengths or 'none'}",
    ]
    if split.labels:
        counts = ", ".join(f"{label} {count:,}" for label, count in split.labels.items())
        right = f"{split.majority_share:.1%}"
        lines += [f"  labels: {counts}", f"  right by always answering the most frequent: {right}"]
    return lines
