"""The faults that only a look at all examples finds: leaks, strange labels, wrong supervision.

Each check adds to `Findings`; an error stops a run, a warning does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tunefork.data.chat import Renderer
from tunefork.data.example import Encoded, Example, RowProblem
from tunefork.data.report import listing
from tunefork.data.split import content_key, prompt_key
from tunefork.recipe import DataSection


@dataclass(slots=True)
class Findings:
    """What is wrong, gathered on the way."""

    problems: list[RowProblem] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def separate(
    train: list[Example], held: Sequence[Example], section: DataSection, findings: Findings
) -> tuple[list[Example], int]:
    """Find the evaluation examples that are trained on too.

    Returns the training examples, less those where `data.overlap` is drop, and how many evaluation
    examples were among them.
    """
    trained = {content_key(example): example.source for example in train}
    keys = [content_key(example) for example in held]
    pairs = [
        f"{example.source} is {trained[key]}"
        for example, key in zip(held, keys, strict=True)
        if key in trained
    ]
    prompts = {prompt_key(example) for example in train if example.messages}
    similar = sum(
        key not in trained and prompt_key(example) in prompts
        for example, key in zip(held, keys, strict=True)
    )
    if similar:
        findings.warnings.append(
            f"{similar} evaluation examples have the prompt of a training example, but another "
            "answer"
        )
    if not pairs:
        return train, 0
    if section.overlap == "error":
        head = (
            f"data.eval: {len(pairs)} of {len(held)} evaluation examples are training examples "
            "too; remove them, or set data.overlap: drop to leave them out of training:"
        )
        findings.errors.append(listing(head, pairs))
        return train, len(pairs)
    forbidden = set(keys)
    kept = [example for example in train if content_key(example) not in forbidden]
    findings.warnings.append(
        f"{len(train) - len(kept)} training examples are left out, being evaluation examples too"
    )
    return kept, len(pairs)


def check_labels(
    train: Sequence[Example], held: Sequence[Example], labels: Sequence[str], findings: Findings
) -> None:
    """Evaluation labels must be allowed ones, and should have been trained on."""
    seen = {example.label for example in train}
    strange = [example.source for example in held if example.label not in labels]
    unseen = [example.source for example in held if example.label not in seen]
    if strange:
        head = (
            f"data.eval: {len(strange)} evaluation examples have a label that no training example "
            "has; add training examples, or name every label in data.labels:"
        )
        findings.errors.append(listing(head, strange))
    elif unseen:
        head = f"{len(unseen)} evaluation examples have a label that is never trained on:"
        findings.warnings.append(listing(head, unseen))
    if len(labels) == 1:
        findings.warnings.append("every example has the same label: there is nothing to learn")


def check_bad_rows(num_rows: int, section: DataSection, findings: Findings) -> None:
    """All rows that cannot be used, at once."""
    if not findings.problems:
        return
    count = f"{len(findings.problems)} of {num_rows} rows cannot be used"
    if section.bad_rows == "error":
        head = f"{count}; mend them, or set data.bad_rows: drop to leave them out:"
        findings.errors.append(listing(head, findings.problems))
    else:
        head = f"{count} and are left out:"
        findings.warnings.append(listing(head, findings.problems))


def check_lengths(
    name: str,
    cut: Sequence[RowProblem],
    dropped: Sequence[RowProblem],
    section: DataSection,
    findings: Findings,
) -> None:
    """What `data.too_long` did to the split `name`, or that it must say what to do."""
    if section.too_long == "error" and dropped:
        head = (
            f"data.{name}: {len(dropped)} rows are too long; raise data.max_length, or set "
            "data.too_long to cut or drop:"
        )
        findings.errors.append(listing(head, dropped))
        return
    if cut:
        findings.warnings.append(listing(f"data.{name}: {len(cut)} rows are cut:", cut))
    if dropped:
        head = f"data.{name}: {len(dropped)} rows are too long and left out:"
        findings.warnings.append(listing(head, dropped))


def check_supervision(
    train: Sequence[Encoded], held: Sequence[Encoded], renderer: Renderer, findings: Findings
) -> None:
    """Some, and for conversations not all, tokens are supervised, and answers know how to end."""
    for name, sequences in (("train", train), ("eval", held)):
        if sequences and not any(sequence.supervised.any() for sequence in sequences):
            findings.errors.append(
                f"data.{name}: no token is supervised; there is nothing to learn"
            )
        if any(sequence.prompt_length for sequence in sequences):
            continue
        if sequences and all(sequence.supervised.all() for sequence in sequences):
            findings.errors.append(
                f"data.{name}: every token is supervised, prompts included; check data.format and "
                "the chat template"
            )
    is_closed = [renderer.is_closed(sequence) for sequence in train if sequence.prompt_length]
    if is_closed and not any(is_closed):
        findings.warnings.append(
            "the chat template ends an answer with no token of its own, so the model cannot learn "
            "to stop; consider data.template: plain"
        )
