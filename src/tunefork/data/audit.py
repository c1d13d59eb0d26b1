"""The faults that stand between rows and sequences: leaks, bad rows, lengths, wrong supervision.

Each check adds to `Findings`; an error stops a run, a warning does not. What examples say is looked
at in `examine.py`, whether they repeat each other in `similar.py`, their labels in `labels.py`.
"""

from collections import Counter
from collections.abc import Sequence

from tunefork.data.chat import Renderer
from tunefork.data.example import Encoded, Example, RowProblem
from tunefork.data.faults import Fault, Findings, Place, listing
from tunefork.data.split import content_key, prompt_key
from tunefork.recipe import DataSection


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
        Place(source=example.source, what=f"is {trained[key]}")
        for example, key in zip(held, keys, strict=True)
        if key in trained
    ]
    prompts = {prompt_key(example) for example in train if example.messages}
    similar = [
        Place(source=example.source, what="")
        for example, key in zip(held, keys, strict=True)
        if key not in trained and prompt_key(example) in prompts
    ]
    findings.record(Fault.SAME_PROMPT, "warn", similar)
    if similar:
        findings.warnings.append(
            f"{len(similar)} evaluation examples have the prompt of a training example, but "
            "another answer"
        )
    findings.record(Fault.OVERLAP, section.overlap, pairs)
    if not pairs:
        return train, 0
    if section.overlap == "error":
        head = (
            f"data.eval: {len(pairs)} of {len(held)} evaluation examples are training examples "
            "too; remove them, or set data.overlap: drop to leave them out of training:"
        )
        lines = [f"{pair.source} {pair.what}" for pair in pairs]
        findings.errors.append(listing(head, lines))
        return train, len(pairs)
    forbidden = set(keys)
    kept = [example for example in train if content_key(example) not in forbidden]
    findings.warnings.append(
        f"{len(train) - len(kept)} training examples are left out, being evaluation examples too"
    )
    return kept, len(pairs)


def check_bad_rows(num_rows: int, section: DataSection, findings: Findings) -> None:
    """All rows that cannot be used, at once."""
    if not findings.problems:
        return
    empty = [problem for problem in findings.problems if problem.kind == "empty answer"]
    others = [problem for problem in findings.problems if problem.kind != "empty answer"]
    findings.record(Fault.EMPTY_ANSWERS, section.bad_rows, empty)
    kinds = Counter(problem.kind for problem in others)
    findings.record(Fault.BAD_ROWS, section.bad_rows, others, kinds)
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
    findings.record(Fault.TOO_LONG, "cut", cut)
    findings.record(Fault.TOO_LONG, "error" if section.too_long == "error" else "drop", dropped)
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
