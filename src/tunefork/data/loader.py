"""The recipe's data become what is trained and evaluated on, with everything odd about it said.

    rows -> examples (ingest) -> training and evaluation (split) -> ids (chat) -> sequences (fit)

`survey` goes all the way even where something is wrong, so that one pass finds every fault; it is
what `check` reports. `load_data` is `survey`, and raises if any fault would stop a run.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tunefork.data import audit
from tunefork.data.chat import Renderer
from tunefork.data.convert import add_instruction, default_instruction
from tunefork.data.examine import examine
from tunefork.data.example import Encoded, Example, RowProblem
from tunefork.data.faults import Findings
from tunefork.data.fit import cut, too_long, windows
from tunefork.data.ingest import Ingested, ingest
from tunefork.data.labels import check_labels
from tunefork.data.markup import control_tokens
from tunefork.data.report import BadRow, Report, SplitReport, count_labels, length_quantiles
from tunefork.data.similar import check_repeats
from tunefork.data.split import (
    content_key,
    epoch_order,
    held_out,
    steps,
    subset,
    validation_split,
)
from tunefork.data.template import LABEL_CUE
from tunefork.errors import DataError
from tunefork.recipe import DataSection, FaultSection, Recipe

__all__ = ["Data", "epoch_order", "load_data", "steps", "survey", "validation_split"]


@dataclass(frozen=True, slots=True)
class Data:
    """What a run trains and evaluates on."""

    train: list[Encoded]
    eval: list[Encoded]
    labels: tuple[str, ...] | None
    """Classification: the answers allowed, in order."""
    renderer: Renderer
    format: str
    """One of `recipe.Format`, `auto` resolved."""
    report: Report
    train_examples: list[Example]
    """The examples that `train` was made of, instructions included."""
    eval_examples: list[Example]
    """Those of `eval`: what `Renderer.encode_answer` takes to score another answer. One for each
    of `eval`, in its order, but for plain text."""

    @property
    def section(self) -> DataSection:
        """The recipe's, with the format and the labels that the rows came to."""
        found = {"format": self.format, "labels": self.labels}
        return self.renderer.section.model_copy(update=found)

    def fingerprint(self) -> str:
        """SHA-256 of every sequence, in order, and of the labels: equal only for equal data."""
        digest = hashlib.sha256(repr(self.labels).encode())
        for name, examples in (("train", self.train), ("eval", self.eval)):
            digest.update(f"{name} {len(examples)}".encode())
            for example in examples:
                digest.update(f" {len(example.input_ids)} ".encode())
                digest.update(example.input_ids.tobytes())
                digest.update(example.supervised.tobytes())
        return digest.hexdigest()


@dataclass(slots=True)
class _Split:
    """Training or evaluation examples on their way to sequences."""

    name: str
    location: str
    num_rows: int
    examples: list[Example]
    sequences: list[Encoded] = field(default_factory=list)
    cut: list[RowProblem] = field(default_factory=list)
    dropped: list[RowProblem] = field(default_factory=list)


def load_data(
    recipe: Recipe, tokenizer: Any, *, need_eval: bool = True, is_checked: bool = False
) -> Data:
    """Read, split, render and tokenise the data of `recipe`.

    Without `need_eval` there may be no evaluation examples. With `is_checked`, where this was done
    before, the faults that change nothing (`data.faults`: all but drop) are not looked for again.
    Raises DataError with every fault.
    """
    faults = _only_drops(recipe.data.faults) if is_checked else None
    data = survey(recipe, tokenizer, need_eval=need_eval, faults=faults)
    if data.report.errors:
        raise DataError("\n".join(data.report.errors))
    return data


def _only_drops(faults: FaultSection) -> FaultSection:
    update = {n: "ignore" for n, action in faults if isinstance(action, str) and action != "drop"}
    return faults.model_copy(update=update)


def survey(
    recipe: Recipe,
    tokenizer: Any,
    *,
    need_eval: bool = True,
    faults: FaultSection | None = None,
) -> Data:
    """`load_data` with faults in `report.errors`; raises DataError where nothing can be read.

    `faults` are looked for instead of `data.faults`.
    """
    faults = faults or recipe.data.faults
    section, findings = recipe.data, Findings()
    renderer = Renderer(tokenizer, section)
    rows = ingest(section.train, section, section.format)
    eval_rows = ingest(section.eval, section, rows.format) if section.eval else None
    findings.problems += rows.problems + (eval_rows.problems if eval_rows else [])
    train, held = _split(rows, eval_rows, section)
    train.examples, overlap = audit.separate(train.examples, held.examples, section, findings)
    labels = None
    if rows.format == "classification":
        labels = section.labels or tuple(sorted({e.label or "" for e in rows.examples}))
        check_labels(train.examples, held.examples, labels, faults, findings)
    splits = check_repeats(train.examples, held.examples, faults, findings)
    train.examples, held.examples = examine(*splits, faults, findings, control_tokens(tokenizer))
    limits = (section.max_train_examples, section.max_eval_examples)
    for stream, (split, limit) in enumerate(zip((train, held), limits, strict=True), start=1):
        chosen = subset(len(split.examples), limit, recipe.data_seed, stream)
        split.examples = [split.examples[index] for index in chosen]
        _encode(split, renderer, labels, findings)
        audit.check_lengths(split.name, split.cut, split.dropped, section, findings)
    num_rows = rows.num_rows + (eval_rows.num_rows if eval_rows else 0)
    audit.check_bad_rows(num_rows, section, findings)
    _check_not_empty(train, held, need_eval, findings)
    audit.check_supervision(train.sequences, held.sequences, renderer, findings)
    template = "none" if rows.format == "text" else renderer.template_in_use
    return Data(
        train=train.sequences,
        eval=held.sequences,
        labels=labels,
        renderer=renderer,
        format=rows.format,
        report=_report(rows.format, template, train, held, overlap, findings),
        train_examples=train.examples,
        eval_examples=held.examples,
    )


def _split(
    rows: Ingested, eval_rows: Ingested | None, section: DataSection
) -> tuple[_Split, _Split]:
    if eval_rows is not None:
        train = _Split("train", rows.location, rows.num_rows, rows.examples)
        return train, _Split("eval", eval_rows.location, eval_rows.num_rows, eval_rows.examples)
    is_held = held_out([content_key(example) for example in rows.examples], section.eval_share)
    rest = [e for e, held in zip(rows.examples, is_held, strict=True) if not held]
    cut_off = [e for e, held in zip(rows.examples, is_held, strict=True) if held]
    train = _Split("train", rows.location, rows.num_rows, rest)
    return train, _Split("eval", f"cut off {rows.location}", len(cut_off), cut_off)


def _encode(
    split: _Split,
    renderer: Renderer,
    labels: tuple[str, ...] | None,
    findings: Findings,
) -> None:
    """Fill `split.sequences`, and leave in `split.examples` those that have one."""
    section = renderer.section
    used = []
    for example in split.examples:
        example = instructed(example, renderer, labels)
        encoded = renderer.attempt(example)
        if isinstance(encoded, RowProblem):
            findings.problems.append(encoded)
        elif sequences := _fit(encoded, example, split, section):
            used.append(example)
            split.sequences += sequences
    split.examples = used


def instructed(example: Example, renderer: Renderer, labels: Sequence[str] | None) -> Example:
    """A classifier's example with its instruction; any other, whose `labels` are None, as it is."""
    if labels is None:
        return example
    instruction = renderer.section.instruction or default_instruction(labels)
    cue = LABEL_CUE if renderer.template_in_use == "plain" else ""
    return add_instruction(example, instruction, cue)


def _fit(encoded: Encoded, example: Example, split: _Split, section: DataSection) -> list[Encoded]:
    """Sequences of at most `data.max_length` tokens, or none where the example is left out."""
    if example.text is not None:
        return windows(encoded, section.max_length)
    if len(encoded.input_ids) <= section.max_length:
        return [encoded]
    shorter = cut(encoded, section.max_length) if section.too_long == "cut" else None
    (split.dropped if shorter is None else split.cut).append(too_long(encoded, section.max_length))
    return [] if shorter is None else [shorter]


def _check_not_empty(train: _Split, held: _Split, need_eval: bool, findings: Findings) -> None:
    if findings.errors:  # They say already why nothing is left.
        return
    if not train.sequences:
        findings.errors.append(f"data.train: {train.location} leaves no example to train on")
    if need_eval and not held.sequences:
        findings.errors.append(
            f"data.eval: no example is left to evaluate on ({held.location}); give data.eval, or "
            "a data.eval_share above 0"
        )


def _report(
    format: str, template: str, train: _Split, held: _Split, overlap: int, findings: Findings
) -> Report:
    return Report(
        format=format,
        template=template,
        train=_figures(train),
        eval=_figures(held),
        overlap=overlap,
        problems=tuple(
            BadRow(source=p.source, what=p.what, kind=p.kind) for p in findings.problems
        ),
        errors=tuple(findings.errors),
        warnings=tuple(findings.warnings),
        faults=tuple(findings.faults),
    )


def _figures(split: _Split) -> SplitReport:
    keys = [content_key(example) for example in split.examples]
    return SplitReport(
        location=split.location,
        num_rows=split.num_rows,
        num_examples=len(split.examples),
        num_sequences=len(split.sequences),
        num_tokens=sum(len(sequence.input_ids) for sequence in split.sequences),
        supervised_tokens=sum(int(sequence.supervised.sum()) for sequence in split.sequences),
        length_quantiles=length_quantiles(split.sequences),
        duplicates=len(keys) - len(set(keys)),
        num_cut=len(split.cut),
        num_dropped=len(split.dropped),
        labels=count_labels(split.sequences),
    )
