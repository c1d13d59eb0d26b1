"""Everything about a recipe that can be found wrong before its model's weights are loaded.

Training may take hours, so that what would fail after it is looked for here: the method on the
model's layers, the data, every metric's needs, the general text, and whether the model has a place
and a vector for each token that it will be given.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tunefork.data.loader import Data, load_data
from tunefork.errors import ModelError, RecipeError
from tunefork.evaluate.evaluate import Plan, pad_id, plan_evaluation
from tunefork.export import servers
from tunefork.model.build import check_method
from tunefork.model.device import pick_device, pick_dtype
from tunefork.model.load import load_skeleton, load_tokenizer
from tunefork.plan.gate import refuse_what_cannot_fit
from tunefork.plan.plan import BY_DEFINITION
from tunefork.recipe import Method, Recipe
from tunefork.registry.peft_format import adapter_settings
from tunefork.train.method import plan_steps
from tunefork.train.release import check_one_pass
from tunefork.train.trackers import check_trackers


def check_recipe(
    recipe: Recipe,
    methods: Sequence[Method],
    say: Callable[[str], None],
    *,
    ignore_plan: bool = False,
    skeleton: PreTrainedModel | None = None,
    tokenizer: Any = None,
) -> Data:
    """The data of `recipe`, which can be trained by `methods`; `say` gets a line a warning.

    Its model's `skeleton` and `tokenizer` are given by who has many recipes of one model. Raises
    BadInputError, also where the plan says that a method cannot fit in this machine's memory;
    `ignore_plan` leaves that out.
    """
    check_trackers(recipe.train.trackers)
    skeleton = load_skeleton(recipe.model) if skeleton is None else skeleton
    for method in methods:
        try:
            _check_method(skeleton, recipe, method)
        except ModelError as error:
            others = f"; or leave {method} out of compare.methods" if len(methods) > 1 else ""
            raise ModelError(f"method {method}: {error}{others}") from error
    tokenizer = load_tokenizer(recipe.model) if tokenizer is None else tokenizer
    data = load_data(recipe, tokenizer)
    for warning in data.report.warnings:
        head, *places = warning.splitlines()
        first = f" {places[0].strip()}, ...; `tunefork data check` says more" if places else ""
        say(f"warning: {head}{first}")
    if Method.FULL in methods and recipe.full.gradient_release:
        for seed in {recipe.train.seed, *(recipe.compare.seeds if len(methods) > 1 else ())}:
            check_one_pass(
                data.train,
                plan_steps(recipe, len(data.train), seed=seed),
                micro_batch_tokens=recipe.train.micro_batch_tokens,
                packing=recipe.train.packing,
            )
    plan = plan_evaluation(recipe, data, tokenizer)
    check_tokens(skeleton, recipe, data, plan, tokenizer, say)
    by_definition = recipe.train.precision == "int8" and pick_device().type == "cpu"
    if by_definition and set(methods) != {Method.FULL}:
        say(f"warning: {BY_DEFINITION}")
    if not ignore_plan:
        refuse_what_cannot_fit(recipe, methods, data.train, say)
    return data


def _check_method(skeleton: PreTrainedModel, recipe: Recipe, method: Method) -> None:
    check_method(skeleton, method, recipe.lora, adds_tokens=bool(recipe.model.add_tokens))
    if method is not Method.FULL:
        check_servers(recipe)
    if method is not Method.FULL or recipe.full.weights != "bf16":
        return
    precision = recipe.train.precision
    if pick_dtype(precision, pick_device()) != torch.bfloat16:
        comes_to = "" if precision == "fp32" else ", which is fp32 on this machine"
        raise RecipeError(
            f"full.weights: bf16 cannot be had with train.precision: {precision}{comes_to}; set "
            "train.precision: bf16, or full.weights: fp32"
        )


def check_servers(recipe: Recipe) -> None:
    """Raise RecipeError where a server of `lora.serve_with` would not take the adapter."""
    for name in recipe.lora.serve_with:
        if found := servers.complaints(adapter_settings(recipe.lora), name):
            raise RecipeError(f"lora.serve_with: {'; '.join(found)}; or leave {name} out")


def check_tokens(
    model: PreTrainedModel,
    recipe: Recipe,
    data: Data,
    plan: Plan,
    tokenizer: Any,
    say: Callable[[str], None],
) -> None:
    """Raise ModelError for ids or positions that `model`, maybe on the meta device, lacks.

    Sequences longer than a context without learned positions (rotary, ALiBi) only get a warning:
    the model computes something for them, but was not trained to.
    """
    sequences = [*data.train, *data.eval]
    highest = max(int(example.input_ids.max()) for example in [*sequences, *plan.passages])
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    if max(highest, pad_id(tokenizer)) >= vocabulary:
        raise ModelError(
            f"model.id: {recipe.model.id}: its tokenizer gives the id "
            f"{max(highest, pad_id(tokenizer))}, but the model's vocabulary ends at "
            f"{vocabulary - 1}; give a model with the tokenizer that belongs to it"
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return
    if _has_learned_positions(model, context):
        for wanted, length in _lengths(recipe, data, plan):
            if length > context:
                raise ModelError(
                    f"{wanted}: makes sequences of up to {length} tokens, but {recipe.model.id} "
                    f"has learned {context} positions and cannot be given more; lower it"
                )
    longer = [n for example in sequences if (n := len(example.input_ids)) > context]
    if longer:
        say(
            f"warning: data.max_length: {len(longer)} of {len(sequences)} examples are longer than "
            f"the {context} tokens that {recipe.model.id} was made for (up to {max(longer)}); "
            "expect worse answers there, or lower it"
        )


def _has_learned_positions(model: PreTrainedModel, context: int) -> bool:
    """Whether `model` has a table with a row for each position; OPT's has two more."""
    tokens = model.get_input_embeddings()
    return any(
        isinstance(module, nn.Embedding)
        and module is not tokens
        and context <= module.num_embeddings <= context + 2
        for module in model.modules()
    )


def _lengths(recipe: Recipe, data: Data, plan: Plan) -> list[tuple[str, int]]:
    """(field, the longest sequence that it may lead to), tokens."""
    lengths = [("data.max_length", recipe.data.max_length)]
    if plan.answers is not None:
        prompt = max(example.prompt_length for example in data.eval)
        longest = max(len(answer) for answer in plan.answers)
        lengths.append(("data.max_length (an evaluation prompt with a label)", prompt + longest))
    if plan.generated:
        prompt = max(example.prompt_length for example in plan.generated)
        lengths.append(("evaluate.max_new_tokens", prompt + recipe.evaluate.max_new_tokens))
    return lengths
