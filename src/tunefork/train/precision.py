"""`train.precision: auto` on a GPU: int8 where it is known to train as well, else bf16.

Two things must hold. The gate (benchmarks/int8_gate.py: the same fine-tuning in both, on a real
task and three seeds) was passed for the model's family, method and size: int8_gate.yaml has its
verdicts. And two batches on the user's own model and data agree (`agreement.py`). What was decided,
and why, goes into the run's record; where nothing can be decided, the run is a bf16 one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from tunefork.data.example import Encoded
from tunefork.errors import ModelError, NoMemoryError
from tunefork.model.device import has_timed_int8
from tunefork.model.load import load_skeleton
from tunefork.recipe import Method, Recipe
from tunefork.train.agreement import agree
from tunefork.train.checkpoints import last_setting
from tunefork.train.method import plan_steps
from tunefork.train.precision_choice import PrecisionChoice

FILE = "precision.json"
"""In the run folder: what was decided when the run began."""
_FIELD = "train.precision"
WORTH_CHECKING = 100
"""Optimiser steps from which on the check, which loads the base twice, is worth its time."""


class Verdict(BaseModel):
    """An entry of int8_gate.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    family: str
    """The configuration's model_type."""
    method: Method
    params: tuple[int, int]
    """Sizes that it is taken to hold for, first and last."""
    passed: bool
    pays: bool = True
    """False: it trains as well, and no faster at these sizes."""
    finding: str
    """What was found, for whoever asks why."""


@cache
def verdicts() -> tuple[Verdict, ...]:
    """The gate's, as far as it was run."""
    text = files("tunefork.train").joinpath("int8_gate.yaml").read_text(encoding="utf-8")
    return tuple(Verdict.model_validate(entry) for entry in yaml.safe_load(text))


@dataclass(frozen=True, slots=True)
class Settled:
    """A recipe for a run, and what its `auto` came to; None where nothing was to be decided."""

    recipe: Recipe
    choice: PrecisionChoice | None


def settle_precision(
    recipe: Recipe,
    method: Method,
    examples: Sequence[Encoded],
    *,
    seed: int,
    pad_id: int,
    device: torch.device,
    folder: Path,
    checkpoints: Path,
) -> Settled:
    """`recipe` for the run in `folder` that is about to begin, or to go on from `checkpoints`.

    A run that goes on keeps its precision. Where `auto` comes to bf16 the recipe stays as it is.
    """
    is_open = recipe.train.precision == "auto" and method is not Method.FULL
    if not is_open or device.type != "cuda":
        return Settled(recipe, None)
    begun = last_setting(checkpoints).get(_FIELD)
    if begun not in (None, "fp8"):  # a version before int8 had that; its checkpoints do not count
        choice = _decided(folder) or PrecisionChoice(
            precision="int8" if begun == "int8" else "bf16", why="as the run began"
        )
    else:
        choice = _decide(recipe, method, examples, seed, pad_id, device)
        (folder / FILE).write_text(choice.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if choice.precision == "int8":
        train = recipe.train.model_copy(update={"precision": "int8"})
        recipe = recipe.model_copy(update={"train": train})
    return Settled(recipe, choice)


def _decided(folder: Path) -> PrecisionChoice | None:
    try:
        return PrecisionChoice.model_validate_json((folder / FILE).read_bytes())
    except (OSError, ValidationError):
        return None


def _decide(
    recipe: Recipe,
    method: Method,
    examples: Sequence[Encoded],
    seed: int,
    pad_id: int,
    device: torch.device,
) -> PrecisionChoice:
    why_not = reason_against(recipe, method, device, len(examples), seed)
    if why_not is not None:
        return PrecisionChoice(precision="bf16", why=why_not)
    try:
        found = agree(
            recipe,
            method,
            examples,
            seed=seed,
            pad_id=pad_id,
            device=device,
        )
    except (ModelError, NoMemoryError, torch.OutOfMemoryError) as error:
        first = str(error).partition("\n")[0]
        return PrecisionChoice(precision="bf16", why=f"int8 could not be tried ({first})")
    precision = "int8" if found.agrees else "bf16"
    return PrecisionChoice(precision=precision, why=found.why, agreement=found)  # type: ignore[arg-type]


def reason_against(
    recipe: Recipe, method: Method, device: torch.device, num_examples: int, seed: int
) -> str | None:
    """Why int8 is not even tried, or None."""
    if recipe.lora.dora:
        return "int8 has no form of lora.dora"
    if not has_timed_int8(device):
        return "int8 products were timed on Hopper GPUs alone"
    skeleton = load_skeleton(recipe.model)
    num_params = sum(p.numel() for p in skeleton.parameters())
    why_not = gate(skeleton.config.model_type, method, num_params)
    if why_not is None and len(plan_steps(recipe, num_examples, seed=seed)) < WORTH_CHECKING:
        return f"fewer than {WORTH_CHECKING} steps are not worth trying int8 for"
    return why_not


def gate(family: str, method: Method, num_params: int) -> str | None:
    """Why the gate does not let int8 be chosen for such a model, or None."""
    size = f"{num_params / 1e9:.3g}B"
    for verdict in verdicts():
        least, most = verdict.params
        if (verdict.family, verdict.method) == (family, method) and least <= num_params <= most:
            if verdict.passed and verdict.pays:
                return None
            why = "passed, but int8 is no faster," if verdict.passed else "not passed"
            return f"int8's gate is {why} for {method} of {family}, {size}: {verdict.finding}"
    return f"int8's gate has not been run for {method} of {family}, {size}"
