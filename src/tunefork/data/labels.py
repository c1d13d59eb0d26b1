"""The labels of a classification: known, trained on, told apart, and enough of each."""

from collections import Counter
from collections.abc import Sequence

from tunefork.data.example import Example
from tunefork.data.faults import FAULTS, Fault, Findings, Place, listing
from tunefork.data.unicode import plain_form
from tunefork.recipe import FaultSection


def check_labels(
    train: Sequence[Example],
    held: Sequence[Example],
    labels: Sequence[str],
    faults: FaultSection,
    findings: Findings,
) -> None:
    """Evaluation labels must be allowed ones, and should have been trained on; and so on."""
    counts = Counter(example.label or "" for example in train)
    strange = [Place(source=e.source, what="") for e in held if e.label not in labels]
    unseen = [Place(source=e.source, what="") for e in held if e.label not in counts]
    if strange:
        findings.record(Fault.UNKNOWN_LABELS, "error", strange)
        kind = FAULTS[Fault.UNKNOWN_LABELS]
        head = f"data.eval: {len(strange)} {kind.meaning}; {kind.remedy}:"
        findings.errors.append(listing(head, strange))
    elif faults.unseen_labels != "ignore":
        findings.add(Fault.UNSEEN_LABELS, faults.unseen_labels, unseen)
    if len(labels) == 1:
        findings.warnings.append("every example has the same label: there is nothing to learn")
    first = {example.label or "": example.source for example in reversed([*train, *held])}
    if faults.similar_labels != "ignore":
        _check_similar(first, faults, findings)
    if faults.imbalance != "ignore" and counts:
        _check_balance(counts, labels, first, faults, findings)
    if faults.few_eval != "ignore" and held:
        _check_evaluation(counts, held, first, faults, findings)


def _check_similar(first: dict[str, str], faults: FaultSection, findings: Findings) -> None:
    """Whoever writes `Fox ` and `fox` means one label; a model is trained to tell them apart."""
    forms: dict[str, list[str]] = {}
    for label in sorted(first):
        forms.setdefault(plain_form(label), []).append(label)
    places = [
        Place(source=first[label], what=f"its label is nearly that of {first[others[0]]}")
        for others in forms.values()
        for label in others[1:]
    ]
    findings.add(Fault.SIMILAR_LABELS, faults.similar_labels, places)


def _check_balance(
    counts: Counter[str],
    labels: Sequence[str],
    first: dict[str, str],
    faults: FaultSection,
    findings: Findings,
) -> None:
    """Labels of `data.labels` that no row has are the rarest of all."""
    most = max(counts.values())
    places = [
        Place(
            source=first.get(label, f"data.labels[{index}]"),
            what=f"its label has {counts[label]:,} training examples, the most frequent {most:,}",
        )
        for index, label in enumerate(labels)
        if counts[label] * faults.imbalance_ratio < most
    ]
    findings.add(Fault.IMBALANCE, faults.imbalance, places)


def _check_evaluation(
    counts: Counter[str],
    held: Sequence[Example],
    first: dict[str, str],
    faults: FaultSection,
    findings: Findings,
) -> None:
    evaluated = Counter(example.label or "" for example in held)
    places = [
        Place(source=first[label], what=f"evaluation examples of its label: {evaluated[label]}")
        for label in sorted(counts)
        if evaluated[label] < faults.min_eval_per_label
    ]
    findings.add(Fault.FEW_EVAL, faults.few_eval, places)
