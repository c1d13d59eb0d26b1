"""`tunefork plan`: LoRA, QLoRA and full fine-tuning side by side, before anything is loaded.

From a recipe (`plan_recipe`) or from numbers (`plan_numbers`). No GPU and no weights are needed:
the model is its configuration, traced on the meta device (`plan.step`).
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tunefork.data.example import Encoded
from tunefork.data.loader import load_data
from tunefork.model.load import load_tokenizer, new_ids
from tunefork.plan.auto import fastest_that_fits, keeping_least
from tunefork.plan.batches import Batches, Work, batches_of_data, batches_of_numbers
from tunefork.plan.built import Build
from tunefork.plan.case import Case
from tunefork.plan.catalogue import Catalogue, Machine, load_catalogue
from tunefork.plan.device import Target, dtype_for, target_of
from tunefork.plan.fits import minor
from tunefork.plan.method import plan_method
from tunefork.plan.option import next_option
from tunefork.plan.schema import MachinePlan, Plan, WorkPlan
from tunefork.plan.shape import config_for, count_params
from tunefork.recipe import (
    CheckpointingChoice,
    Compile,
    FullSection,
    LoraSection,
    Method,
    ModelSection,
    Recipe,
)
from tunefork.train.engine import compiles
from tunefork.train.precision import WORTH_CHECKING, gate

__all__ = ["Work", "plan_examples", "plan_numbers", "plan_recipe"]

_SEVERAL = (
    "tunefork trains on one GPU: a plan for several is for a run that shards its weights (FSDP) by "
    "another tool, and no measured run stands behind it"
)
_SELECTIVE = (
    "what selective checkpointing keeps is the compiler's choice: {methods} is planned as torch "
    "{torch} would have it on this machine, and a run elsewhere may take twice as much"
)
_MAY_BE_INT8 = (
    "{method} is planned in bf16; train.precision: auto will try int8 when the run begins, and "
    "take it if two batches agree (--set train.precision=int8 plans that)"
)
BY_DEFINITION = (
    "train.precision: int8 on a CPU computes what defines a GPU's products, to compare them with: "
    "it takes many times as long as a plan says, and more memory; set bf16"
)
_NEVER_TIMED = (
    "tunefork's int8 products were never timed on {gpu}; here they are planned at bf16's rate"
)


def plan_numbers(
    *,
    model: ModelSection | float,
    work: Work,
    lora: LoraSection,
    full: FullSection,
    methods: Sequence[Method],
    machine: Machine,
    checkpointing: CheckpointingChoice = "full",
    precision: str = "bf16",
    compile: Compile = "auto",
    micro_batch_tokens: int | None = None,
    catalogue: Catalogue | None = None,
    has_details: bool = True,
) -> Plan:
    """Plan from a model, or its number of parameters, and how much is to be trained.

    `micro_batch_tokens` is `train.micro_batch_tokens`, by default what a recipe would have.
    Without `has_details` the next option is left out, and where a method fits the largest batch
    and sequence too: of many machines only one is then looked at closely.

    Raises ModelError where the model's configuration cannot be read.
    """
    batches = batches_of_numbers(work, micro_batch_tokens=micro_batch_tokens)
    return _plan(
        name=model.id if isinstance(model, ModelSection) else f"{model / 1e9:.3g}B parameters",
        config=config_for(model),
        batches=batches,
        work=_work(work, batches),
        forms=Forms(lora, full, checkpointing, precision, compile),
        methods=methods,
        target=target_of(machine),
        catalogue=catalogue,
        has_details=has_details,
    )


def plan_recipe(
    recipe: Recipe,
    *,
    target: Target,
    methods: Sequence[Method],
    work: Work | None = None,
    catalogue: Catalogue | None = None,
) -> Plan:
    """Plan a recipe on `target`; `work` stands for its data where that is not at hand.

    Raises BadInputError as reading the recipe's model and data does.
    """
    if work is None:
        data = load_data(recipe, load_tokenizer(recipe.model), need_eval=False).train
        return plan_examples(recipe, data, target=target, methods=methods, catalogue=catalogue)
    batches = batches_of_numbers(
        work,
        micro_batch_tokens=recipe.train.micro_batch_tokens,
        packing=recipe.train.packing,
    )
    return _plan_batches(recipe, work, batches, target, methods, catalogue)


def plan_examples(
    recipe: Recipe,
    examples: Sequence[Encoded],
    *,
    target: Target,
    methods: Sequence[Method],
    catalogue: Catalogue | None = None,
    has_details: bool = True,
) -> Plan:
    """Plan a recipe whose training examples are at hand; `has_details` as in `plan_numbers`."""
    work = Work(
        examples=len(examples),
        tokens=sum(len(example.input_ids) for example in examples),
        supervised_tokens=sum(int(example.supervised.sum()) for example in examples),
        epochs=recipe.train.epochs,
        max_length=max(len(example.input_ids) for example in examples),
        batch_size=recipe.train.batch_size,
    )
    batches = batches_of_data(examples, recipe, seed=recipe.train.seed)
    return _plan_batches(recipe, work, batches, target, methods, catalogue, has_details)


def _plan_batches(
    recipe: Recipe,
    work: Work,
    batches: Batches,
    target: Target,
    methods: Sequence[Method],
    catalogue: Catalogue | None,
    has_details: bool = True,
) -> Plan:
    return _plan(
        name=recipe.model.id,
        config=config_for(recipe.model),
        batches=batches,
        work=_work(work, batches),
        forms=Forms(
            recipe.lora,
            recipe.full,
            recipe.train.activation_checkpointing,
            recipe.train.precision,
            recipe.train.compile,
            new_ids(recipe.model),
        ),
        methods=methods,
        target=target,
        catalogue=catalogue,
        has_details=has_details,
    )


@dataclass(frozen=True, slots=True)
class Forms:
    """How the methods are built."""

    lora: LoraSection
    full: FullSection
    checkpointing: CheckpointingChoice
    precision: str
    compile: Compile
    new_ids: tuple[int, ...] = ()
    """Of the tokens that the recipe adds."""


@contextmanager
def _without_collections() -> Iterator[None]:
    """Leave the garbage collector out: each of its rounds goes through the libraries' whole heap,
    a tenth of a plan's time, and finds little."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@_without_collections()
def _plan(
    *,
    name: str,
    config: Any,
    batches: Batches,
    work: WorkPlan,
    forms: Forms,
    methods: Sequence[Method],
    target: Target,
    catalogue: Catalogue | None,
    has_details: bool = True,
) -> Plan:
    total = count_params(config)
    machines = [Machine(gpu, 1) for gpu in (catalogue or load_catalogue()).gpus]
    planned = {}
    for method in methods:
        made = Build(
            method=method,
            lora=forms.lora,
            full=forms.full,
            dtype=dtype_for(target, forms.precision),
            checkpointing="none" if forms.checkpointing == "auto" else forms.checkpointing,
            device=target.kind,
            wants_int8=forms.precision == "int8",
            is_compiled=compiles(forms.compile, target.kind, batches.num_steps),
            new_ids=forms.new_ids,
        )
        case = Case(config, total, made, target)
        at_most = None
        if forms.checkpointing == "auto":
            case = fastest_that_fits(case, batches.largest)
            if has_details or not case.fits(batches.largest):
                at_most = keeping_least(case, batches.largest)
        found = plan_method(case, batches, has_limits=has_details, at_most=at_most)
        if has_details and not found.fits:
            option = next_option(case, batches, machines)
            found = found.model_copy(update={"next_option": option})
        planned[method.value] = found
    notes = [target.note, work.note]
    if target.count > 1:
        notes.append(_SEVERAL)
    selective = [n for n, m in planned.items() if m.activation_checkpointing == "selective"]
    if selective and not target.is_here:
        said = _SELECTIVE.format(methods=" and ".join(selective), torch=minor(torch.__version__))
        notes.append(said)
    is_timed = target.kind != "cuda" or target.rates.int8_ops is not None
    if forms.precision == "int8" and not is_timed and set(methods) != {Method.FULL}:
        notes.append(_NEVER_TIMED.format(gpu=target.id))
    if forms.precision == "int8" and target.kind == "cpu" and set(methods) != {Method.FULL}:
        notes.append(BY_DEFINITION)
    notes += [
        _MAY_BE_INT8.format(method=method)
        for method in methods
        if _may_choose_int8(forms, method, config.model_type, total, target, batches.num_steps)
    ]
    return Plan(
        model=name,
        total_params=total,
        machine=MachinePlan(
            gpu=target.id,
            count=target.count,
            memory_bytes=target.memory_bytes,
            usd_per_hour=target.usd_per_hour,
            note=target.note,
        ),
        work=work,
        methods=planned,
        notes=notes,
    )


def _may_choose_int8(
    forms: Forms, method: Method, family: str, num_params: int, target: Target, num_steps: int
) -> bool:
    """Whether a run will try int8 when it begins (`train/precision.py`), which nobody knows yet."""
    is_open = forms.precision == "auto" and method is not Method.FULL and not forms.lora.dora
    can = target.rates.int8_ops is not None and num_steps >= WORTH_CHECKING
    return is_open and can and gate(family, method, num_params) is None


def _work(work: Work, batches: Batches) -> WorkPlan:
    return WorkPlan(
        examples=work.examples,
        tokens=work.tokens,
        supervised_tokens=work.supervised_tokens,
        epochs=work.epochs,
        steps=batches.num_steps,
        batch_size=work.batch_size,
        rows=batches.largest.rows,
        length=batches.largest.length,
        is_masked=batches.largest.is_masked,
        note=batches.note,
    )
