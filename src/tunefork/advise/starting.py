"""The recipe to start from: a mapping that is a valid recipe, and the same as a commented file."""

from typing import Any

import yaml

from tunefork.advise.advice import Reason
from tunefork.advise.facts import Facts
from tunefork.advise.rules import Answer
from tunefork.recipe import CompareSection, Method, Recipe, TrainSection
from tunefork.recipe_file import parse

ALPHA = 32.0
TARGETS = "all-linear"
CHECKPOINT_FROM = 1e9
"""Parameters from which activations are recomputed: memory is what is short."""
GRID_STEP = 3.0
MICRO_BATCH = TrainSection().micro_batch_tokens
DATA_FILES: dict[Answer, str] = {
    "continued_pretraining": "documents.jsonl",
    "distillation": "teacher_outputs.jsonl",
}
"""Names that say what the file must hold; `train.jsonl` otherwise."""


def recipe_fields(
    facts: Facts, answer: Answer, method: Method, model: str, given: Recipe | None
) -> dict[str, Any]:
    """The recipe that the advice starts from, over `given` where the situation named one.

    Only what differs from a recipe's defaults is in it. Raises RecipeError where it is none,
    which would be a fault of ours or of `given`.
    """
    amount = facts.amount
    base = {} if given is None else given.model_dump(mode="json", exclude_defaults=True)
    data: dict[str, Any] = {
        "train": DATA_FILES.get(answer, "train.jsonl"),
        "max_length": _max_length(facts, method),
    } | base.get("data", {})
    if amount.is_plain_text:
        data.setdefault("format", "text")
    if "max_length" not in base.get("data", {}) and given is not None:
        data["max_length"] = given.data.max_length
    given_train = {k: v for k, v in base.get("train", {}).items() if k != "learning_rate"}
    train: dict[str, Any] = given_train | {
        "epochs": amount.epochs,
        "batch_size": amount.batch_size,
        "micro_batch_tokens": _micro_batch_tokens(facts, method, data["max_length"]),
        "activation_checkpointing": "full" if facts.params >= CHECKPOINT_FROM else "none",
    }
    fields: dict[str, Any] = base | {
        "model": base.get("model", {"id": model}),
        "data": data,
        "method": method.value,
        "lora": base.get("lora", {}) | {"rank": facts.rank, "alpha": ALPHA, "targets": TARGETS},
        "full": facts.estimates.full.model_dump(mode="json"),
        "train": train,
        "compare": _compared(facts, method, base.get("compare", {})),
    }
    parse(fields, where="advised recipe")
    return fields


def _max_length(facts: Facts, method: Method) -> int:
    """That of the data, or what fits."""
    placed = facts.best(method)
    return (placed and placed.shorter) or facts.amount.max_length


def _micro_batch_tokens(facts: Facts, method: Method, max_length: int) -> int:
    """The default, a whole sequence at least, and no more than what fits."""
    placed = facts.best(method)
    most = None if placed is None else placed.smaller_tokens
    return max(max_length, MICRO_BATCH if most is None else min(MICRO_BATCH, most))


def _compared(facts: Facts, method: Method, given: dict[str, Any]) -> dict[str, Any]:
    """What `tunefork compare` tries: every method that fits where the advised one is trained.

    A grid's middle is the rate to start from, and what `tunefork train` takes. Grids of `given`
    stay.
    """
    placed = facts.best(method) or facts.estimates.here(method)
    methods, price = [method], {}
    if placed is not None:
        machine, estimates = placed.machine, facts.estimates
        methods = [m for m in Method if m is method or estimates.on(machine, m).fits]
        price = {"usd_per_hour": round(machine.gpu.usd_per_hour * machine.count, 4)}
    trials = given.get("search_trials", CompareSection().search_trials)
    grids = {m.value: _grid(facts.learning_rate(m), trials) for m in methods}
    return {
        **given,
        "methods": [m.value for m in methods],
        **price,
        "learning_rates": grids | given.get("learning_rates", {}),
    }


def _grid(middle: float, trials: int) -> list[float]:
    """Rates a factor of three apart, as many as are searched and an odd number, round `middle`."""
    half = trials // 2
    return [float(f"{middle * GRID_STEP**at:.2g}") for at in range(-half, half + 1)]


def recipe_yaml(fields: dict[str, Any], headline: str, reasons: list[Reason]) -> str:
    """`fields` as a file that says where it comes from."""
    lines = [f"# {headline}", "# Written by tunefork advise; rates, rank and batch are where to"]
    lines += ["# start from. `tunefork data check` first, then `tunefork compare` measures it."]
    lines += [f"# - {reason.text} ({reason.source})" for reason in reasons[:3]]
    if fields["model"]["id"].startswith(PLACEHOLDER):
        lines.append("# Put your model and your files in the places of these names.")
    return "\n".join(lines) + "\n" + yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


PLACEHOLDER = "OWNER/MODEL"
"""Stands for a model that was not named."""
