"""The table of data faults: what each means, what decides about it, and what to do next.

A check adds to `Findings`, whatever it checks; nothing in them holds a row's text, only where it
is and what kind of thing was found. An error stops a run, a warning does not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

from tunefork.data.example import RowProblem
from tunefork.recipe import FaultSection

MOST_LISTED = 20
"""Rows named in one error message; the report names all rows that cannot be used."""
MOST_WARNED = 3
"""Rows named in one warning about a fault."""


class Fault(StrEnum):
    """Everything that can be wrong with data, by the name that recipe and report give it."""

    BAD_ROWS = "bad_rows"
    EMPTY_ANSWERS = "empty_answers"
    TOO_LONG = "too_long"
    OVERLAP = "overlap"
    SAME_PROMPT = "same_prompt"
    NEAR_OVERLAP = "near_overlap"
    DUPLICATES = "duplicates"
    NEAR_DUPLICATES = "near_duplicates"
    CONTRADICTIONS = "contradictions"
    ROLES = "roles"
    MARKUP = "markup"
    UNICODE = "unicode"
    SECRETS = "secrets"
    EMAILS = "emails"
    UNKNOWN_LABELS = "unknown_labels"
    UNSEEN_LABELS = "unseen_labels"
    SIMILAR_LABELS = "similar_labels"
    IMBALANCE = "imbalance"
    FEW_EVAL = "few_eval"


@dataclass(frozen=True, slots=True)
class Kind:
    """One row of the table."""

    meaning: str
    """Plural, to follow a count: `3 training examples repeat an earlier one`."""
    remedy: str
    setting: str | None
    """The recipe's field that decides about it; None where nothing does."""
    only_classification: bool = False


FAULTS: dict[Fault, Kind] = {
    Fault.BAD_ROWS: Kind("rows cannot be used", "mend them", "data.bad_rows"),
    Fault.EMPTY_ANSWERS: Kind("rows have an empty answer", "answer them", "data.bad_rows"),
    Fault.TOO_LONG: Kind("rows are over data.max_length", "raise data.max_length", "data.too_long"),
    Fault.OVERLAP: Kind(
        "evaluation examples are training examples too", "remove them", "data.overlap"
    ),
    Fault.SAME_PROMPT: Kind(
        "evaluation examples have the prompt of a training example, but another answer",
        "see which of the answers is right",
        None,
    ),
    Fault.NEAR_OVERLAP: Kind(
        "evaluation examples are nearly training examples: their score tells of memory",
        "split by what they have in common (their source, customer or template)",
        "data.faults.near_overlap",
    ),
    Fault.DUPLICATES: Kind(
        "examples repeat an earlier one, and count as often as they stand there",
        "remove them",
        "data.faults.duplicates",
    ),
    Fault.NEAR_DUPLICATES: Kind(
        "training examples are nearly an earlier one",
        "see whether they add anything",
        "data.faults.near_duplicates",
    ),
    Fault.CONTRADICTIONS: Kind(
        "training examples give a text another label than an earlier one",
        "settle on one label for each text",
        "data.faults.contradictions",
        only_classification=True,
    ),
    Fault.ROLES: Kind(
        "conversations have turns in an order that no chat has",
        "mend the order of the turns",
        "data.faults.roles",
    ),
    Fault.MARKUP: Kind(
        "examples hold control tokens as text: a turn would end there, and another begin",
        "take them out, or write them otherwise",
        "data.faults.markup",
    ),
    Fault.UNICODE: Kind(
        "examples hold text that was broken on its way",
        "export them again as UTF-8",
        "data.faults.unicode",
    ),
    Fault.SECRETS: Kind(
        "examples hold what looks like a secret",
        "remove it from the data, and revoke it: it has been copied",
        "data.faults.secrets",
    ),
    Fault.EMAILS: Kind(
        "examples hold an e-mail address",
        "replace addresses by a placeholder, if their owners have not agreed",
        "data.faults.emails",
    ),
    Fault.UNKNOWN_LABELS: Kind(
        "evaluation examples have a label that no training example has",
        "add training examples, or name every label in data.labels",
        None,
        only_classification=True,
    ),
    Fault.UNSEEN_LABELS: Kind(
        "evaluation examples have a label that is never trained on",
        "add training examples of it",
        "data.faults.unseen_labels",
        only_classification=True,
    ),
    Fault.SIMILAR_LABELS: Kind(
        "examples have a label that differs from another only in case, space or composition",
        "write each label in one way",
        "data.faults.similar_labels",
        only_classification=True,
    ),
    Fault.IMBALANCE: Kind(
        "labels have few training examples beside the most frequent label",
        "add examples of rare labels, and judge by macro_f1",
        "data.faults.imbalance",
        only_classification=True,
    ),
    Fault.FEW_EVAL: Kind(
        "labels have too few evaluation examples to tell how well they do",
        "add evaluation examples of them",
        "data.faults.few_eval",
        only_classification=True,
    ),
}
ONLY_CLASSIFICATION = {fault.value for fault, kind in FAULTS.items() if kind.only_classification}
ONLY_CLASSIFICATION |= {"imbalance_ratio", "min_eval_per_label"}
"""Names of `recipe.FaultSection` that mean nothing to other data."""


class Place(BaseModel):
    """Where a fault is. Never what the row says."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    source: str
    """`file:line`."""
    what: str
    """The kind of what was found there and its length, or the row that it is like."""

    def __str__(self) -> str:
        return f"{self.source}: {self.what}" if self.what else self.source


class FaultReport(BaseModel):
    """One fault that was looked for and found."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    fault: Fault
    """Its name."""
    severity: Literal["error", "warn", "drop", "cut"]
    """What the recipe makes of it: the run is refused, goes on, or goes on without those rows (or
    their ends)."""
    setting: str | None
    """The recipe's field that decides; null where nothing does."""
    count: int
    """How many, of what `meaning` says."""
    meaning: str
    """What is wrong; reads on from `count`."""
    remedy: str
    """What to do next."""
    kinds: dict[str, int]
    """How often each kind was found, where a fault has several; a row can hold several."""
    places: tuple[Place, ...]
    """The first 20."""


@dataclass(slots=True)
class Findings:
    """What is wrong, gathered on the way."""

    problems: list[RowProblem] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    faults: list[FaultReport] = field(default_factory=list)

    def record(
        self,
        fault: Fault,
        severity: str,
        places: Sequence[Place | RowProblem],
        kinds: Mapping[str, int] | None = None,
    ) -> None:
        """Put a fault that is at `places` into the report's table; nothing where there is none."""
        if not places:
            return
        kind = FAULTS[fault]
        fields = {
            "fault": fault,
            "severity": severity,
            "setting": kind.setting,
            "count": len(places),
            "meaning": kind.meaning,
            "remedy": kind.remedy,
            "kinds": dict(kinds or {}),
            "places": [{"source": p.source, "what": p.what} for p in places[:MOST_LISTED]],
        }
        self.faults.append(FaultReport.model_validate(fields))

    def add(
        self,
        fault: Fault,
        severity: str,
        places: Sequence[Place],
        *,
        kinds: Mapping[str, int] | None = None,
        num_dropped: int = 0,
    ) -> None:
        """`record` it, and say it as an error or a warning."""
        if not places:
            return
        self.record(fault, severity, places, kinds)
        kind = FAULTS[fault]
        found = f"{len(places):,} {kind.meaning}"
        if severity == "error":
            choices = get_args(FaultSection.model_fields[fault.value].annotation)
            others = ", ".join(choice for choice in choices if choice != "error")
            head = f"data: {found}; {kind.remedy}, or set {kind.setting} to one of {others}:"
            self.errors.append(listing(head, places))
        elif severity == "drop":
            rows = "row is" if num_dropped == 1 else "rows are"
            head = f"{found}: {num_dropped:,} {rows} left out:"
            self.warnings.append(listing(head, places, MOST_WARNED))
        else:
            self.warnings.append(listing(f"{found}; {kind.remedy}:", places, MOST_WARNED))


def listing(head: str, lines: Sequence[object], most: int = MOST_LISTED) -> str:
    """`head` and the first `most` of `lines`, each on a line of its own."""
    shown = [f"\n  {line}" for line in lines[:most]]
    more = len(lines) - len(shown)
    return head + "".join(shown) + (f"\n  ... and {more} more" if more else "")
