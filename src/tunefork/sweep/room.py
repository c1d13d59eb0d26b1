"""How many members train at one time: as many as the plan says fit in memory, or as are asked for.

What fits is what fits at the high end of the prediction. Members differ in rank and targets, so
first the largest are counted: so many of any fit. Beyond that each new company is planned.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tunefork.plan.gate import DoesNotFitError
from tunefork.plan.shape import PlanError, config_for, lora_params
from tunefork.plan.together import Together, fits
from tunefork.recipe import Checkpointing, LoraSection, Recipe
from tunefork.sweep.group import Member
from tunefork.train.checkpoints import FOLDER as CHECKPOINTS
from tunefork.train.checkpoints import last_setting

_FIELD = "train.activation_checkpointing"


@dataclass(slots=True)
class Room:
    """What the plan says of the members of one fleet."""

    recipe: Recipe
    """Of the group: the base, and how passes run, checkpointing settled."""
    cap: int | None
    """Most that are asked for."""
    of_any: int | None
    """So many fit, whichever they are; None: no plan can be made, and all are let in."""
    _planned: dict[tuple[str, ...], bool] = field(default_factory=dict)

    def has(self, seated: Sequence[Member], member: Member) -> bool:
        """Whether a member fits beside those that are in."""
        count = len(seated) + 1
        if self.cap is not None and count > self.cap:
            return False
        if self.of_any is None or count <= self.of_any or self.cap is not None:
            return True
        loras = [each.recipe.lora for each in (*seated, member)]
        key = tuple(sorted(lora.model_dump_json() for lora in loras))
        if key not in self._planned:
            self._planned[key] = fits(self.recipe, loras).fits
        return self._planned[key]


def plan_room(
    members: Sequence[Member],
    *,
    cap: int | None,
    say: Callable[[str], None],
    ignore_plan: bool = False,
) -> Room:
    """The room for `members`, and `train.activation_checkpointing` where that is left open.

    A fleet that goes on keeps the kind it began with. Raises DoesNotFitError where not even the
    largest member fits, or not as many as are asked for, unless `ignore_plan`.
    """
    recipe = members[0].recipe
    begun = {last_setting(m.folder / CHECKPOINTS).get(_FIELD) for m in members} - {None}
    loras = [member.recipe.lora for member in members]
    try:
        config = config_for(recipe.model)
        loras.sort(key=lambda lora: -lora_params(config, lora))
        found = fits(recipe, loras[:cap])
    except PlanError as error:
        say(f"warning: {error}; how many adapters fit at one time will show")
        return Room(_settled(recipe, "none"), cap, None)
    kind = found.activation_checkpointing
    if recipe.train.activation_checkpointing == "auto" and begun:
        kind = begun.pop()  # type: ignore[assignment]
    _say(found, loras, cap, kind, say)
    if not ignore_plan and not found.fits and (cap is not None or found.largest == 0):
        raise DoesNotFitError(_refusal(found, loras, cap))
    return Room(_settled(recipe, kind), cap, max(1, found.largest))


def _settled(recipe: Recipe, kind: Checkpointing) -> Recipe:
    if recipe.train.activation_checkpointing != "auto":
        return recipe
    train = recipe.train.model_copy(update={"activation_checkpointing": kind})
    return recipe.model_copy(update={"train": train})


def _say(
    found: Together,
    loras: Sequence[LoraSection],
    cap: int | None,
    kind: str,
    say: Callable[[str], None],
) -> None:
    asked = len(loras[:cap])
    high, has = found.peak_process_bytes.high / 2**30, found.memory_bytes / 2**30
    how = f"predicted to take at most {high:.1f} of {has:.1f} GiB"
    if found.fits:
        what = "adapter" if asked == 1 else "adapters"
        say(f"{asked} {what} at one time, {how} (checkpointing: {kind})")
    else:
        say(
            f"{max(1, found.largest)} of the largest adapters at one time, more of smaller ones: "
            f"{asked} would be {how} (checkpointing: {kind})"
        )


def _refusal(found: Together, loras: Sequence[LoraSection], cap: int | None) -> str:
    high, has = found.peak_process_bytes.high / 2**30, found.memory_bytes / 2**30
    if found.largest == 0:
        return (
            f"not even one adapter of lora.rank {loras[0].rank} fits beside the base in {has:.1f} "
            "GiB; lower train.micro_batch_tokens, use method qlora, or run it all the same with "
            "--ignore-plan"
        )
    return (
        f"--together {cap}: is predicted to take up to {high:.1f} GiB, and this machine has "
        f"{has:.1f}; {found.largest} fit. Leave --together out, or run it all the same with "
        "--ignore-plan"
    )
