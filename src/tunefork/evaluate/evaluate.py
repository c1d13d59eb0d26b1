"""Everything that a recipe wants measured of one model, as columns that intervals come from."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from transformers import PreTrainedModel

from tunefork.data.example import Encoded
from tunefork.data.isolation import check_packing
from tunefork.data.loader import Data
from tunefork.errors import DataError, RecipeError, TuneforkError
from tunefork.evaluate.forgetting import encode_passages, forgetting_columns
from tunefork.evaluate.generate import generation_columns
from tunefork.evaluate.labels import check_answers, label_columns
from tunefork.evaluate.loss import loss_columns
from tunefork.evaluate.statistics import METRICS, Columns
from tunefork.recipe import Metric, Recipe
from tunefork.train.kernels import attention_kernels

FORGETTING = "forgetting_loss"
_LABELLED = ("accuracy", "macro_f1")
_GENERATED = ("exact_match", "rouge_l")
_REHEARSED_TOKENS = 8
_FEWEST_DOCUMENTS = 20
"""A bootstrap over fewer draws is worth less than one over sequences that are not independent."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured of one model."""

    metrics: tuple[str, ...]
    """Names in `statistics.METRICS`; `forgetting_loss` last, if at all."""
    columns: Columns
    seconds: float
    majority_share: float | None
    """Accuracy of always giving the training data's most frequent label."""


def check_metrics(recipe: Recipe, data: Data) -> tuple[Metric, ...]:
    """The metrics to measure; raises RecipeError for one that the data cannot have."""
    wanted = recipe.evaluate.metrics
    if wanted is None:
        return ("loss", "perplexity", *(_LABELLED if data.labels else ()))
    for metric in wanted:
        if metric in _LABELLED and data.labels is None:
            raise RecipeError(
                f"evaluate.metrics: {metric} needs labels, but the data's format is {data.format}; "
                f"leave it out, or use one of {', '.join(_allowed(data))}"
            )
        if metric in _GENERATED and data.format == "text":
            raise RecipeError(
                f"evaluate.metrics: {metric} needs answers, but the data's format is text; "
                f"use one of {', '.join(_allowed(data))}"
            )
    return wanted


def primary_metric(recipe: Recipe, is_labelled: bool) -> Metric:
    """What a verdict is about."""
    return recipe.compare.primary_metric or ("accuracy" if is_labelled else "loss")


def check_primary_metric(recipe: Recipe, data: Data) -> Metric:
    """`primary_metric`; raises RecipeError where it is not measured."""
    metrics, primary = check_metrics(recipe, data), primary_metric(recipe, data.labels is not None)
    if primary not in metrics:
        raise RecipeError(
            f"compare.primary_metric: {primary} is not measured; evaluate.metrics has "
            f"{', '.join(metrics)} of {', '.join(METRICS)}"
        )
    return primary


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be measured, and everything it takes but the model."""

    metrics: tuple[Metric, ...]
    answers: list[list[int]] | None
    """Token ids of each label's answer, where labels are scored."""
    generated: list[Encoded]
    """The evaluation examples that answers are generated for."""
    passages: list[Encoded]
    """The general text that forgetting is measured on."""


def plan_evaluation(recipe: Recipe, data: Data, tokenizer: Any) -> Plan:
    """What `evaluate` will measure, found wrong here, before anything is trained, if it can be.

    Raises RecipeError for a metric that the data cannot have; DataError where no evaluation example
    has what a metric needs, where labels cannot be scored alike, and for a general text that cannot
    be read.
    """
    metrics = check_metrics(recipe, data)
    answers, generated, passages = None, list[Encoded](), list[Encoded]()
    if data.labels and set(metrics) & set(_LABELLED):
        answers = _answers(data)
        check_answers(data.eval, data.labels, answers)
    if set(metrics) & set(_GENERATED):
        generated = _answered(data)[: recipe.evaluate.max_generated]
    if recipe.evaluate.forgetting is not None:
        passages = encode_passages(tokenizer, recipe.evaluate.forgetting)
    return Plan(metrics, answers, generated, passages)


def evaluate(model: PreTrainedModel, tokenizer: Any, data: Data, recipe: Recipe) -> Evaluation:
    """Measure `model` on the evaluation examples.

    Raises what `plan_evaluation` does, TuneforkError for a figure that is not finite, ModelError
    where `model` cannot be given packed rows but the recipe asks for them.
    """
    start = time.perf_counter()
    plan = plan_evaluation(recipe, data, tokenizer)
    with attention_kernels():
        columns = _measure(model, tokenizer, data, recipe, plan)
    for name, values in columns.items():
        if not bool(np.isfinite(values).all()):
            raise TuneforkError(f"evaluation: {name} is not finite; the model is broken")
    return Evaluation(
        metrics=(*plan.metrics, *((FORGETTING,) if plan.passages else ())),
        columns=columns,
        seconds=time.perf_counter() - start,
        majority_share=_majority_share(data),
    )


def rehearse(model: PreTrainedModel, tokenizer: Any, data: Data, recipe: Recipe) -> float:
    """Evaluate what takes the most memory: one batch of the longest evaluation examples.

    Returns their share of all tokens to be evaluated. Answers are generated to 8 tokens only.
    """
    plan = plan_evaluation(recipe, data, tokenizer)
    lengths = [len(example.input_ids) for example in data.eval]
    chosen, room = list[Encoded](), recipe.train.micro_batch_tokens
    for at in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        chosen.append(data.eval[at])
        room -= lengths[at]
        if room <= 0:
            break
    by_prompt = sorted(plan.generated, key=lambda example: -example.prompt_length)
    few = replace(plan, generated=by_prompt[: len(chosen)], passages=plan.passages[:1])
    section = recipe.evaluate.model_copy(update={"max_new_tokens": _REHEARSED_TOKENS})
    short = recipe.model_copy(update={"evaluate": section})
    with attention_kernels():
        _measure(model, tokenizer, replace(data, eval=chosen), short, few)
    return sum(len(example.input_ids) for example in chosen) / sum(lengths)


def _measure(
    model: PreTrainedModel, tokenizer: Any, data: Data, recipe: Recipe, plan: Plan
) -> Columns:
    packing = recipe.train.packing
    if packing:
        check_packing(model)
    batching: dict[str, Any] = {
        "max_tokens": recipe.train.micro_batch_tokens,
        "pad_id": pad_id(tokenizer),
    }
    if plan.answers is not None and data.labels is not None:
        by_token = recipe.evaluate.label_normalization == "tokens"
        columns = label_columns(
            model, data.eval, data.labels, plan.answers, by_token=by_token, **batching
        )
    else:
        columns = loss_columns(model, data.eval, packing=packing, **batching)
        if data.format == "text":
            columns = _by_document(columns, [example.source for example in data.eval])
    if plan.generated:
        max_new_tokens = recipe.evaluate.max_new_tokens
        columns |= generation_columns(
            model, tokenizer, plan.generated, max_new_tokens=max_new_tokens, **batching
        )
    if plan.passages:
        columns |= forgetting_columns(model, plan.passages, packing=packing, **batching)
    return columns


def pad_id(tokenizer: Any) -> int:
    """An id to pad with; any will do, since padding is masked by position."""
    return 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def save_columns(columns: Columns, file: Path) -> None:
    """Write columns as .npz."""
    with file.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **columns)


def load_columns(file: Path) -> Columns:
    """Read what `save_columns` wrote."""
    with np.load(file, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def _allowed(data: Data) -> list[str]:
    unlabelled = data.labels is None
    return [
        metric
        for metric in get_args(Metric)
        if not (metric in _LABELLED and unlabelled)
        and not (metric in _GENERATED and data.format == "text")
    ]


def _by_document(columns: Columns, sources: Sequence[str]) -> Columns:
    """Sums over each document's sequences, where there are documents enough to draw from.

    Sequences of one document are alike: as independent draws they would give too narrow intervals.
    """
    documents, document = np.unique(sources, return_inverse=True)
    if len(documents) < _FEWEST_DOCUMENTS:
        return columns
    return {name: np.bincount(document, weights=values) for name, values in columns.items()}


def _answered(data: Data) -> list[Encoded]:
    """The evaluation examples with an answer: `data.max_length` may have cut it away."""
    answered = [example for example in data.eval if example.answer is not None]
    if not answered:
        raise DataError(
            f"data.max_length: {data.renderer.section.max_length} cuts the last answer off every "
            "evaluation example, so that no generated answer has a reference; raise it"
        )
    return answered


def _answers(data: Data) -> list[list[int]]:
    """Token ids of each label's answer, as they follow the first evaluation example's prompt."""
    assert data.labels is not None
    first = data.eval_examples[0]
    encoded = [data.renderer.encode_answer(first, label) for label in data.labels]
    return [e.input_ids[e.supervised].tolist() for e in encoded]


def _majority_share(data: Data) -> float | None:
    if data.labels is None:
        return None
    [(majority, _)] = Counter(example.label for example in data.train).most_common(1)
    return sum(example.label == majority for example in data.eval) / len(data.eval)
