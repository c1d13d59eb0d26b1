"""The trials of one rung of the learning-rate search, trained in one pass over one base.

They differ in the rate alone, so that each ends as it would by itself, to float tolerance (on a GPU
but for a rounding of the base's product: `train/together.py`), and the base is loaded once for the
whole search. A recipe that a group cannot train, or whose trials do not fit in memory side by side,
is searched one trial after the other (`search.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tunefork.data.example import Encoded
from tunefork.data.loader import Data
from tunefork.errors import BadInputError, NoGradientError, RecipeError
from tunefork.evaluate.loss import loss_columns
from tunefork.model.device import pick_device
from tunefork.plan.together import fits
from tunefork.recipe import Method, Recipe
from tunefork.sweep.bank import BankGroup
from tunefork.sweep.group import Member
from tunefork.sweep.halving import mean_loss
from tunefork.sweep.members import refuse
from tunefork.train.interrupt import Interrupt
from tunefork.train.method import plan_steps
from tunefork.train.progress import TrainProgress


def may_train_together(recipe: Recipe, method: Method, num_trials: int) -> bool:
    """Whether a group can train the trials of `recipe` by `method`, and holds all of them."""
    if method is Method.FULL or num_trials < 2:
        return False
    if recipe.lora.dropout > 0:  # drawn for all tokens of a pass: other numbers than alone
        return False
    try:
        refuse(recipe.model_copy(update={"method": method}))
        return fits(recipe.model_copy(update={"method": method}), [recipe.lora] * num_trials).fits
    except (RecipeError, BadInputError):
        return False


@dataclass(slots=True)
class SearchGroup:
    """All trials of one search, rung after rung over one base."""

    recipe: Recipe
    """By the method that is searched, checkpointing settled."""
    data: Data
    examples: Sequence[Encoded]
    """The longest trial's; a shorter one takes the first of them."""
    validation: Sequence[Encoded]
    tokenizer: object
    pad_id: int
    _group: BankGroup | None = field(default=None)

    def losses(self, rates: Sequence[float], rung: int, count: int) -> dict[float, float | None]:
        """Validation loss of each rate, trained on the first `count` examples; None: diverged."""
        members = {self._member(rate, rung, count).name: rate for rate in rates}
        found: dict[float, float | None] = dict.fromkeys(rates)
        group = self._opened([self._member(rate, rung, count) for rate in rates])
        left = self._train(group, members, count)
        for name in left:
            with group.only(name) as model:
                columns = loss_columns(
                    model,
                    self.validation,
                    max_tokens=self.recipe.train.micro_batch_tokens,
                    packing=self.recipe.train.packing,
                    pad_id=self.pad_id,
                )
            found[members[name]] = mean_loss([columns])
        for name in left:
            group.remove(name)
        return found

    def _train(self, group: BankGroup, members: dict[str, float], count: int) -> list[str]:
        """Names of those that came to their end. Raises KeyboardInterrupt, NoGradientError."""
        train = self.recipe.train
        num_steps = len(plan_steps(self.recipe, count, seed=train.seed))
        label = f"{self.recipe.method}: search {', '.join(f'{r:g}' for r in members.values())}"
        left, ended = dict.fromkeys(members), list[str]()
        with (
            Interrupt() as interrupt,
            interrupt.at_once(),  # nothing of a rung is kept but its end
            TrainProgress(
                label, num_steps=num_steps, device=pick_device(), every_s=train.log_every_s
            ) as progress,
        ):
            while left:
                for each in group.step():
                    if isinstance(each.error, NoGradientError):
                        raise each.error
                    if each.error is not None:
                        del left[each.name]
                    elif each.record is not None:
                        if each.name == next(iter(left)):
                            progress.on_step(each.record)
                        if each.record.step == num_steps:
                            ended.append(each.name)
                left = {name: None for name in left if name not in ended}
        return ended

    def _opened(self, members: Sequence[Member]) -> BankGroup:
        if self._group is None:
            self._group = BankGroup(self.recipe, members, self.tokenizer)
        for member in members:
            self._group.add(member, None)
        return self._group

    def _member(self, rate: float, rung: int, count: int) -> Member:
        train = self.recipe.train.model_copy(update={"learning_rate": rate})
        recipe = self.recipe.model_copy(update={"train": train})
        return Member(
            name=f"{rate!r} in rung {rung}",
            recipe=recipe,
            folder=Path(),
            data=self.data,
            examples=self.examples[:count],
            validation=(),
            num_steps=len(plan_steps(recipe, count, seed=train.seed)),
        )
