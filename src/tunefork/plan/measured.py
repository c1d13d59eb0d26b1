"""Predicted against measured, remembered: every finished run corrects the next plan on its device.

`measurements.jsonl` in TUNEFORK_HOME (default ~/.tunefork) has a line a run: what was predicted and
what it took. A plan for the same device multiplies its time, and its process's memory, by the
median ratio of the last runs there, as far as these can tell (`Factor`). Of runs that were alike
only the last one counts; with three that were not, their spread is the error, but never less than
that of the packaged fit. Runs that were predicted by an older version's fit correct nothing: their
ratios are those of other figures.
"""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from tunefork.home import home

_LAST = 50
"""Runs that count: an older one may be of another driver."""
_ENOUGH = 3
_TIMES_THE_STEP = 4.0
"""A step's time is changed by so many times what any of those runs was off by, and no more: a
slower host is slower in every step, but a short run is mostly its beginning."""


class Measurement(BaseModel):
    """One run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    """As PyTorch or the system names it."""
    case: str
    date: str
    predicted_step_s: float
    measured_step_s: float
    predicted_process_bytes: float
    measured_process_bytes: float
    fit: str = ""
    """Id of the packaged fit that it was predicted by."""


@dataclass(frozen=True, slots=True)
class Factor:
    """What predictions are multiplied by, without being changed by more than runs were off by: a
    small run's ratio is mostly of what every run has, and says nothing of a large one's."""

    ratio: float = 1.0
    most: float = math.inf
    """Of a change, in the predictions' unit."""

    def of(self, predicted: float) -> float:
        """The prediction, corrected."""
        change = (self.ratio - 1) * predicted
        return predicted + math.copysign(min(abs(change), self.most), change)

    def undone(self, corrected: float) -> float:
        """The prediction that `corrected` is of."""
        raw = corrected / self.ratio
        if abs(corrected - raw) <= self.most:
            return raw
        return corrected - math.copysign(self.most, self.ratio - 1)


@dataclass(frozen=True, slots=True)
class Correction:
    """What the device's own runs say of its predictions."""

    runs: int
    time: Factor
    """Of a step's seconds."""
    process: Factor
    """Of the process's bytes."""
    time_error: float | None
    """Largest relative error of the corrected predictions; None for fewer than three runs."""
    process_error: float | None


UNCHANGED = Factor()
NONE = Correction(0, UNCHANGED, UNCHANGED, None, None)


def file() -> Path:
    """Where measurements are kept."""
    return home() / "measurements.jsonl"


def remember(measurement: Measurement) -> None:
    """Append one line; raises OSError where it cannot be written."""
    path = file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(measurement.model_dump_json() + "\n")


def recall(is_device: Callable[[str], bool], fit: str | None = None) -> list[Measurement]:
    """The last measurements on a device, one a case, of those that `fit` had predicted (None: of
    all); damaged lines are passed over."""
    try:
        text = file().read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found: dict[str, Measurement] = {}
    for line in text.splitlines():
        try:
            row = Measurement.model_validate(json.loads(line))
        except (ValidationError, ValueError):
            continue
        if is_device(row.device) and fit in (None, row.fit):
            found.pop(row.case, None)
            found[row.case] = row
    return list(found.values())[-_LAST:]


def correction(rows: Sequence[Measurement]) -> Correction:
    """The median ratios of `rows`, and how far they scatter about them."""
    if not rows:
        return NONE
    times = [row.measured_step_s / row.predicted_step_s for row in rows]
    sizes = [row.measured_process_bytes / row.predicted_process_bytes for row in rows]
    time, process = statistics.median(times), statistics.median(sizes)
    is_enough = len(rows) >= _ENOUGH
    return Correction(
        runs=len(rows),
        time=Factor(
            time, _TIMES_THE_STEP * max(abs(r.measured_step_s - r.predicted_step_s) for r in rows)
        ),
        process=Factor(
            process, max(abs(r.measured_process_bytes - r.predicted_process_bytes) for r in rows)
        ),
        time_error=max(_error(ratio, time) for ratio in times) if is_enough else None,
        process_error=max(_error(ratio, process) for ratio in sizes) if is_enough else None,
    )


def _error(ratio: float, middle: float) -> float:
    return max(ratio / middle, middle / ratio) - 1
