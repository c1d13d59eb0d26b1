"""`sweep:`: the variants that train together."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tunefork.recipe.section import (
    PositiveFloat,
    PositiveInt,
    Scaling,
    Schedule,
    Section,
    Seed,
    Share,
    Targets,
)


class HalvingSection(Section):
    """Successive halving: the hopeless stop early, and those waiting take their place (Jamieson and
    Talwalkar 2016, https://arxiv.org/abs/1502.07943). Every variant trains to the first rung, the
    better `keep` of them to the second, and so on; what is left trains to its end. Rungs are
    places in each variant's own schedule: rates are judged before theirs has fallen, which favours
    low ones a little."""

    keep: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Share that goes on from each rung, rounded up."""

    rungs: Annotated[int, Field(ge=1, le=8)] = 2
    """How often variants are dropped. The last rung lies at `keep` of each variant's steps, the one
    before at `keep` of that, and so on: with 0.5 and 2, at a quarter and a half."""

    within: Literal["rank", "all"] = "rank"
    """Who is ranked against whom. `rank`: variants of one rank, so that the best of every rank is
    trained to its end and ranks can be compared. `all`: every variant against every other."""


class SweepSection(Section):
    """`tunefork sweep`: variants of the recipe, trained together over one base. Each list below
    holds the values tried of the recipe field of its name; an empty one varies nothing. Judged by
    `compare.primary_metric` and `compare.margin`."""

    rank: tuple[PositiveInt, ...] = ()
    """`lora.rank`. Alpha stays, which keeps the best learning rate nearly the same."""

    alpha: tuple[PositiveFloat, ...] = ()
    """`lora.alpha`."""

    scaling: tuple[Scaling, ...] = ()
    """`lora.scaling`."""

    targets: tuple[Targets, ...] = ()
    """`lora.targets`, each a keyword or a list of module names."""

    dropout: tuple[Share, ...] = ()
    """`lora.dropout`."""

    learning_rate: tuple[PositiveFloat, ...] = ()
    """`train.learning_rate`."""

    schedule: tuple[Schedule, ...] = ()
    """`train.schedule`."""

    warmup_share: tuple[Share, ...] = ()
    """`train.warmup_share`."""

    weight_decay: tuple[Annotated[float, Field(ge=0.0)], ...] = ()
    """`train.weight_decay`."""

    batch_size: tuple[PositiveInt, ...] = ()
    """`train.batch_size`."""

    epochs: tuple[PositiveFloat, ...] = ()
    """`train.epochs`."""

    max_steps: tuple[PositiveInt, ...] = ()
    """`train.max_steps`."""

    seed: tuple[Seed, ...] = ()
    """`train.seed`: the order of the examples, adapter initialisation and dropout; which examples
    there are stays (`data.seed`). Variants that differ in it alone are one configuration: their
    figures are averaged, and from three on training's variance is in every interval."""

    data: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """`data.train`: other mixtures, judged on the same `data.eval`, which must be given."""

    search: Literal["grid", "random"] = "grid"
    """`grid`: every combination. `random`: `count` of them, each with every seed."""

    count: PositiveInt | None = None
    """`random`: how many combinations."""

    search_seed: Seed = 0
    """`random`: which."""

    halving: HalvingSection | None = None
    """Drop the worse early; null: every variant trains to its end."""

    validation_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the training examples held back to choose by (which variants are dropped, the
    learning rate of each rank), the same for all. Evaluation examples are used for no choice. Where
    `train.validate_every_steps` is set, `train.validation_share` holds instead."""

    together: PositiveInt | None = None
    """Most variants that train at one time; null: as many as the plan says fit in memory."""

    @model_validator(mode="after")
    def _search_is_whole(self) -> Self:
        if (self.search == "random") != (self.count is not None):
            raise ValueError(
                "count: says how many combinations search: random draws; give both, or neither"
            )
        return self
