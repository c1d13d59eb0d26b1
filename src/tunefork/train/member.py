"""One adapter of a group: what it would be told if it were trained alone, and what it tells."""

from collections.abc import Sequence
from dataclasses import dataclass

from tunefork.data.example import Encoded
from tunefork.errors import RecipeError
from tunefork.recipe import LoraSection, Method, Recipe
from tunefork.train.loop import StepRecord
from tunefork.train.method import plan_steps
from tunefork.train.optim import learning_rate_at
from tunefork.train.state import Progress


@dataclass(frozen=True, slots=True)
class Member:
    """An adapter's own run: `train.loop.train`'s arguments, but for what a group shares."""

    name: str
    """Unique in its group."""
    lora: LoraSection
    seed: int
    """Of its A."""
    examples: Sequence[Encoded]
    """Read as its steps come; one that cannot be read fails this member alone."""
    steps: Sequence[Sequence[int]]
    """Of each optimiser step, indices into `examples`."""
    learning_rates: Sequence[float]
    """Of each step."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0


@dataclass(frozen=True, slots=True)
class MemberStep:
    """A member took an optimiser step."""

    name: str
    record: StepRecord


@dataclass(frozen=True, slots=True)
class MemberDone:
    """A member took its last step; it stays readable until it is removed."""

    name: str
    progress: Progress


@dataclass(frozen=True, slots=True)
class MemberFailed:
    """A member was set aside; its weights are those of its last good step."""

    name: str
    step: int
    """That it could not take, from 1."""
    reason: str
    is_lost: bool = False
    """There was no gradient, whatever its learning rate."""


@dataclass(frozen=True, slots=True)
class MemberWarned:
    """A member's loss is far above what it was (`guard.SpikeWatch`); it goes on."""

    name: str
    step: int
    message: str


MemberEvent = MemberStep | MemberDone | MemberFailed | MemberWarned


def member_of(
    recipe: Recipe,
    examples: Sequence[Encoded],
    *,
    name: str,
    learning_rate: float,
    seed: int,
) -> Member:
    """The member that takes the very steps of `train_method` with the same arguments.

    Raises RecipeError for what a recipe may ask of a run that has its pass for itself.
    """
    section = recipe.train
    if recipe.method is Method.FULL:
        raise RecipeError(
            "method: full trains the base itself, which adapters in one pass share; set lora or "
            "qlora"
        )
    if section.on_loss_spike != "warn":
        raise RecipeError(
            f"train.on_loss_spike: {section.on_loss_spike} needs a run of its own; adapters that "
            "train together have warn (a loss that is not finite always ends its own adapter)"
        )
    if recipe.model.add_tokens:
        raise RecipeError(
            "model.add_tokens: their rows would be trained, and adapters in one pass share them; "
            "train this adapter alone (tunefork train)"
        )
    schedule = plan_steps(recipe, len(examples), seed=seed)
    return Member(
        name,
        recipe.lora,
        seed,
        examples,
        schedule,
        [
            learning_rate_at(
                step,
                num_steps=len(schedule),
                peak=learning_rate,
                schedule=section.schedule,
                warmup_share=section.warmup_share,
            )
            for step in range(len(schedule))
        ],
        (section.beta1, section.beta2),
        section.weight_decay,
        section.max_grad_norm,
    )
