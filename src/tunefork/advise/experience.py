"""What the user measured before: comparisons in run folders, and whether they are about this.

A comparison counts for a situation where both are true, and otherwise is only mentioned:

- **size**: the compared model and the situation's differ by less than 1.5 times in parameters. What
  a 135M model shows is not offered for 8B.
- **kind of task**: both are classification (the data has labels), or plain text (every token is
  learnt), or answers of any other kind.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tunefork.advise.amount import is_plain_text
from tunefork.advise.situation import Situation
from tunefork.compare.comparison import SUBJECTS, TRAINED, Comparison
from tunefork.errors import RunFolderError
from tunefork.home import home
from tunefork.page.units import METRIC_NAMES, count_text, figure_text
from tunefork.registry.history import comparison_folders

FILE = "comparison.json"
SIZE_FACTOR = 1.5
"""Models whose sizes differ by less are of one size for the purpose; between the sizes that models
come in (1, 3, 8, 14, 32, 70B) the steps are larger."""
PLAIN_SHARE = 0.99
"""From this supervised share on, data is plain text."""

Kind = Literal["classification", "plain text", "answers"]


@dataclass(frozen=True, slots=True)
class Experience:
    """One comparison, and whether it counts."""

    folder: Path
    comparison: Comparison
    why_not: str | None
    """Why it does not count for the situation; None where it does."""

    @property
    def text(self) -> str:
        """Its figures in a sentence."""
        found, metric = self.comparison, self.comparison.primary_metric
        figures = [
            f"{SUBJECTS[arm]} {figure_text(metric, found.methods[arm].metrics[metric])}"
            for arm in ("base", *TRAINED)
            if arm in found.methods and metric in found.methods[arm].metrics
        ]
        chosen = found.verdict.recommended
        verdict = "" if chosen is None else f"; its verdict: {SUBJECTS[chosen]}"
        return (
            f"{METRIC_NAMES[metric]} of {', '.join(figures)} on {found.model.id} "
            f"({count_text(found.model.parameters)} parameters, "
            f"{found.data.eval_examples:,} evaluation examples){verdict}"
        )


def places(runs: Sequence[Path] = ()) -> list[Path]:
    """Where the user's comparisons may lie: below `runs`, or `runs/`; below the runs of the home;
    and wherever the store knows of one. Raises StoreError where there is a store and it cannot be
    read."""
    below = [*(runs or [Path("runs")]), home() / "runs"]
    return [*(folder for folder in below if folder.is_dir()), *comparison_folders()]


def find(
    folders: Iterable[Path], situation: Situation, params: float | None
) -> tuple[list[Experience], list[str]]:
    """Comparisons below `folders`, the latest first, and what is said of files that are none.

    `params` is the size of the situation's model, None where it is not known.
    """
    found: list[Experience] = []
    faults: list[str] = []
    files = {file.resolve(): file for folder in folders for file in sorted(folder.rglob(FILE))}
    for file in files.values():
        try:
            comparison = Comparison.load(file)
        except RunFolderError as error:
            faults.append(str(error))
            continue
        found.append(Experience(file.parent, comparison, _why_not(comparison, situation, params)))
    return sorted(found, key=lambda e: e.comparison.created, reverse=True), faults


def deciding(experiences: Sequence[Experience]) -> Experience | None:
    """The latest that counts and recommends something."""
    for experience in experiences:
        if experience.why_not is None and experience.comparison.verdict.recommended is not None:
            return experience
    return None


def kind_of(situation: Situation) -> Kind | None:
    """The kind of the situation's task; None where it is not known."""
    if is_plain_text(situation):
        return "plain text"
    if situation.task is None:
        return None
    return "classification" if situation.task == "classification" else "answers"


def _kind_compared(comparison: Comparison) -> Kind:
    if comparison.data.labels is not None:
        return "classification"
    return "plain text" if comparison.data.supervised_share >= PLAIN_SHARE else "answers"


def _why_not(comparison: Comparison, situation: Situation, params: float | None) -> str | None:
    compared = comparison.model.parameters
    kind, kind_compared = kind_of(situation), _kind_compared(comparison)
    if params is None:
        return "the size of your model is not given"
    if not 1 / SIZE_FACTOR < compared / params < SIZE_FACTOR:
        return (
            f"it is about {count_text(compared)} parameters, and what that shows is not offered "
            f"for {count_text(params)}"
        )
    if kind is None:
        return "the task is not given"
    return None if kind == kind_compared else f"it is about {kind_compared}, not {kind}"
