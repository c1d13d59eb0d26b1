"""The cheapest change that would make a method fit: what costs no quality first, then what may."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from tunefork.plan.batches import Batches
from tunefork.plan.built import Build
from tunefork.plan.case import Case
from tunefork.plan.catalogue import Machine
from tunefork.plan.device import target_of
from tunefork.plan.method import largest_length, largest_rows_tokens
from tunefork.recipe import Checkpointing, FullSection, Method

_LENGTH_STEP = 64
"""Lengths proposed are multiples of so many tokens."""


def next_option(case: Case, batches: Batches, machines: Sequence[Machine]) -> str:
    """In words, with the recipe's keys; `machines` are those of the catalogue."""
    smallest = _AS_IT_IS, case
    for words, changed in changes(case, is_one_pass=batches.passes_per_step <= 1.0):
        if changed.fits(batches.largest):
            return words
        if changed.made.releases:  # a step of several passes cannot be
            continue
        tokens = largest_rows_tokens(changed, batches.largest)
        if tokens is not None:
            return _and(f"train.micro_batch_tokens: {tokens}", words)
        smallest = words, changed
    larger = _larger_machine(case, batches, machines)
    words, changed = smallest
    length = largest_length(changed, batches.largest)
    if length is not None and length >= _LENGTH_STEP:
        length = length // _LENGTH_STEP * _LENGTH_STEP
        rows = f"train.micro_batch_tokens: {length} and data.max_length: {length}"
        return _and(rows, words) + (f", or with {larger}" if larger else "")
    return larger or (
        "no machine of the catalogue holds it, not even eight GPUs: shorter sequences "
        "(data.max_length), or a smaller model"
    )


def _and(first: str, words: str) -> str:
    return first if words == _AS_IT_IS else f"{first} and {words}"


_AS_IT_IS = "as it is"
_COSTS: dict[Checkpointing, str] = {
    "full": "about a quarter slower",
    "offload": "the same, and what is kept waits in host memory",
}


def _further(made: Build) -> Sequence[Checkpointing]:
    """Kinds of checkpointing that keep less on the device than the one that is taken."""
    kinds: tuple[Checkpointing, ...] = ("none", "selective", "full", "offload")
    further = kinds[max(2, kinds.index(made.checkpointing) + 1) :]
    return further if made.device == "cuda" else further[:-1]


def _gains_by_int8(case: Case) -> bool:
    """Whether the base could be kept in eight bits a weight, for int8 products."""
    made, rates = case.made, case.target.rates
    is_lora = made.method is Method.LORA and made.dtype == torch.bfloat16 and not made.lora.dora
    is_even = case.config.get_text_config().hidden_size % 16 == 0
    return is_lora and is_even and rates.int8_ops is not None and not made.wants_int8


def changes(case: Case, *, is_one_pass: bool) -> Iterator[tuple[str, Case]]:
    """Smaller and smaller forms of the case, with the words for each, the cheapest first.

    `is_one_pass`: every step of the run is one micro-batch.
    """
    yield _AS_IT_IS, case
    words: list[str] = []
    made = case.made
    if _gains_by_int8(case):
        made = replace(made, wants_int8=True)
        words.append("train.precision: int8")
        yield " and ".join(words), replace(case, made=made)
    for checkpointing in _further(made):
        made = replace(made, checkpointing=checkpointing)
        words = [word for word in words if "checkpointing" not in word]
        words.append(f"train.activation_checkpointing: {checkpointing} ({_COSTS[checkpointing]})")
        yield " and ".join(words), replace(case, made=made)
    if is_one_pass:
        yield from _released(words, replace(case, made=made))
    is_bf16 = made.dtype == torch.bfloat16
    if made.method is Method.FULL and made.full.weights == "fp32" and is_bf16:
        made = replace(made, full=_with(made.full, weights="bf16"))
        words.append("full.weights: bf16")
        yield " and ".join(words), replace(case, made=made)
        if is_one_pass:
            yield from _released(words, replace(case, made=made))
    if made.method is Method.FULL and made.full.optimizer != "adamw_8bit":
        made = replace(made, full=_with(made.full, optimizer="adamw_8bit"))
        words.append("full.optimizer: adamw_8bit")
        yield " and ".join(words), replace(case, made=made)
        if is_one_pass:
            yield from _released(words, replace(case, made=made))
    if made.method is Method.LORA:
        made = replace(made, method=Method.QLORA)
        words.append("method: qlora")
        yield " and ".join(words), replace(case, made=made)


def _released(words: Sequence[str], case: Case) -> Iterator[tuple[str, Case]]:
    """`case` with gradient release, for full fine-tuning that is without."""
    made = case.made
    if made.method is Method.FULL and not made.releases:
        said = "full.gradient_release: true with train.max_grad_norm: null (no clipping)"
        released = replace(made, full=_with(made.full, gradient_release=True))
        yield " and ".join([*words, said]), replace(case, made=released)


def _with(full: FullSection, **changed: object) -> FullSection:
    return FullSection(**{**full.model_dump(), **changed})


def _larger_machine(case: Case, batches: Batches, machines: Sequence[Machine]) -> str | None:
    """The cheapest machine by the hour that holds the case as it is, with checkpointing; several
    GPUs, which take another tool, only where no single one does."""
    made = replace(case.made, checkpointing="full")
    by_price = sorted(
        (target_of(Machine(machine.gpu, count)) for machine in machines for count in (1, 2, 4, 8)),
        key=lambda target: (target.count > 1, target.usd_per_hour or 0.0, target.count),
    )
    for target in by_price:
        if replace(case, made=made, target=target).fits(batches.largest):
            several = "its weights sharded over " if target.count > 1 else ""
            return (
                f"{several}{target.count} x {target.id} (${target.usd_per_hour:.2f} an hour) and "
                "train.activation_checkpointing: full"
            )
    return None
