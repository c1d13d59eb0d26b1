"""What was found in the data: figures, and what is wrong with them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tunefork.data.example import Encoded, RowProblem

MOST_LISTED = 20
"""Rows named in one error message; the report names all of them."""

_QUANTILES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


@dataclass(frozen=True, slots=True)
class SplitReport:
    """Figures of the training or of the evaluation examples."""

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

    @property
    def supervised_share(self) -> float:
        """Share of the tokens that are supervised, 0 to 1."""
        return self.supervised_tokens / self.num_tokens if self.num_tokens else 0.0

    @property
    def majority_share(self) -> float | None:
        """Accuracy of always answering the most frequent label."""
        return max(self.labels.values()) / sum(self.labels.values()) if self.labels else None


@dataclass(frozen=True, slots=True)
class Report:
    """All that `tunefork data check` says. Only `errors` stop a run."""

    format: str
    template: str
    """`chat`, `plain`, or `none` for plain text."""
    train: SplitReport
    eval: SplitReport
    overlap: int
    """Evaluation examples that are also training examples."""
    problems: tuple[RowProblem, ...]
    """Every row that cannot be used."""
    errors: tuple[str, ...]
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """As plain values for JSON, derived shares included."""
        fields = asdict(self)
        for name, split in (("train", self.train), ("eval", self.eval)):
            fields[name]["supervised_share"] = split.supervised_share
            fields[name]["majority_share"] = split.majority_share
        return fields


def length_quantiles(sequences: Sequence[Encoded]) -> dict[str, int]:
    """`SplitReport.length_quantiles` of `sequences`; each value is the length of one of them."""
    if not sequences:
        return {}
    lengths = [len(sequence.input_ids) for sequence in sequences]
    values = np.quantile(lengths, list(_QUANTILES.values()), method="higher")
    return dict(zip(_QUANTILES, values.astype(int).tolist(), strict=True))


def count_labels(sequences: Sequence[Encoded]) -> dict[str, int]:
    """`SplitReport.labels` of `sequences`."""
    labels = sorted(sequence.label for sequence in sequences if sequence.label is not None)
    return dict(Counter(labels).most_common())


def listing(head: str, lines: Sequence[object]) -> str:
    """`head` and the first of `lines`, each on a line of its own."""
    shown = [f"\n  {line}" for line in lines[:MOST_LISTED]]
    more = len(lines) - len(shown)
    return head + "".join(shown) + (f"\n  ... and {more} more" if more else "")
