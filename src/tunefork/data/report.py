"""What was found in the data: figures, and what is wrong with them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, computed_field

from tunefork.data.example import Encoded
from tunefork.data.faults import FaultReport
from tunefork.data.secrets import find_emails, find_secrets
from tunefork.schema_markdown import schema_markdown

_QUANTILES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


class SplitReport(BaseModel):
    """Figures of the training or of the evaluation examples."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    location: str
    num_rows: int
    """Rows read; for evaluation examples cut off the training file, the examples cut off."""
    num_examples: int
    """Rows, or texts, that are used."""
    num_sequences: int
    """Examples, texts being split into sequences of `data.max_length`."""
    num_tokens: int
    supervised_tokens: int
    length_quantiles: dict[str, int]
    """Tokens of a sequence: min, p50, p90, p99, max. Empty without sequences."""
    duplicates: int
    """Examples that repeat an earlier one, white space aside."""
    num_cut: int
    num_dropped: int
    """Left out because over `data.max_length`, or because nothing supervised was left by a cut."""
    labels: dict[str, int]
    """Classification: examples of each label, the most frequent first."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def supervised_share(self) -> float:
        """Share of the tokens that are supervised, 0 to 1."""
        return self.supervised_tokens / self.num_tokens if self.num_tokens else 0.0

    @computed_field  # type: ignore[prop-decorator]
    @property
    def majority_share(self) -> float | None:
        """Accuracy of always answering the most frequent label."""
        return max(self.labels.values()) / sum(self.labels.values()) if self.labels else None


class BadRow(BaseModel):
    """A row that cannot be used. Nothing here holds what it says."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    source: str
    """`file:line`."""
    what: str
    """Why it cannot be used."""
    kind: str
    """`empty answer`, `wrong roles`, `broken unicode` or `unreadable or incomplete`."""

    def __str__(self) -> str:
        return f"{self.source}: {self.what}"


class Report(BaseModel):
    """All that `tunefork data check` says. Only `errors` stop a run."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    format: str
    """One of `data.format`, `auto` resolved."""
    template: str
    """`chat`, `plain`, or `none` for plain text."""
    train: SplitReport
    eval: SplitReport
    overlap: int
    """Evaluation examples that are also training examples."""
    problems: tuple[BadRow, ...]
    """Every row that cannot be used."""
    errors: tuple[str, ...]
    """Each stops a run; `tunefork data check` ends with exit status 2."""
    warnings: tuple[str, ...]
    faults: tuple[FaultReport, ...] = ()
    """Each fault that was found: in table form what `errors` and `warnings` say in words.
    `too_long` has an entry for each split."""

    def as_dict(self) -> dict[str, Any]:
        """As plain values for JSON, derived shares included."""
        return self.model_dump(mode="json")


def report_markdown() -> str:
    """The text of docs/data_report.md."""
    return schema_markdown(
        Report,
        "The data report",
        "What `tunefork data check RECIPE --json` prints. Beside the fields below a split has\n"
        "`supervised_share` (of its tokens, 0 to 1) and `majority_share` (accuracy of always\n"
        "answering the most frequent label, or null). No field holds a row's text, but for the\n"
        "labels of a classification.\n\n"
        "Generated from `src/tunefork/data/report.py` by `python -m tunefork.documentation docs`.",
    )


def length_quantiles(sequences: Sequence[Encoded]) -> dict[str, int]:
    """`SplitReport.length_quantiles` of `sequences`; each value is the length of one of them."""
    if not sequences:
        return {}
    lengths = [len(sequence.input_ids) for sequence in sequences]
    values = np.quantile(lengths, list(_QUANTILES.values()), method="higher")
    return dict(zip(_QUANTILES, values.astype(int).tolist(), strict=True))


def count_labels(sequences: Sequence[Encoded]) -> dict[str, int]:
    """`SplitReport.labels` of `sequences`; a secret or an address in a label's place is masked."""
    labels = sorted(sequence.label for sequence in sequences if sequence.label is not None)
    counts: dict[str, int] = {}
    for number, (label, count) in enumerate(Counter(labels).most_common(), start=1):
        kinds = [kind for kind, _ in (*find_secrets(label), *find_emails(label))]
        counts[f"<{', '.join(kinds)}, label {number}>" if kinds else label] = count
    return counts
