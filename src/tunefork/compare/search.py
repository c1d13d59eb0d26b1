"""A learning rate for one method, by successive halving on a validation split.

Sharing one rate between LoRA and full fine-tuning is the usual way to make full look worse than it
is (LlamaFactory#5938), so each method gets its own, from as many trials. Every rate of the grid
trains on half of the search's examples; the better half of the rates (rounded up) trains again, on
all of them, each with its own complete schedule; the lowest validation loss wins (Jamieson and
Talwalkar 2016, https://arxiv.org/abs/1502.07943, with two rungs). The validation split is cut from
the training data; the evaluation data plays no part.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict

from tunefork.compare.search_together import SearchGroup, may_train_together
from tunefork.data.example import Encoded
from tunefork.data.loader import epoch_order, load_data, validation_split
from tunefork.errors import DivergedError, NoGradientError
from tunefork.evaluate.evaluate import pad_id
from tunefork.evaluate.loss import loss_columns
from tunefork.model.device import pick_device, pick_dtype
from tunefork.model.load import load_tokenizer
from tunefork.plan.auto import settle
from tunefork.recipe import Method, Recipe
from tunefork.registry.run import write_atomically
from tunefork.train.method import load_for_training, plan_steps, train_method
from tunefork.train.progress import TrainProgress

RESULT = "search.json"


class Trial(BaseModel):
    """One rate tried."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    learning_rate: float
    rung: int
    """From 1."""
    examples: int
    """Trained on."""
    validation_loss: float | None
    """Nats per supervised token; None where the trial diverged."""
    status: Literal["ok", "diverged"]


class SearchResult(BaseModel):
    """What a search found and took."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    learning_rate: float
    trials: tuple[Trial, ...]
    search_s: float
    """Loading, training and validation of all trials."""


def search(recipe: Recipe, method: Method, folder: Path) -> SearchResult:
    """Find `method`'s learning rate; the result is also written to `folder`/search.json.

    The trials of a rung train together where they can (`search_together.py`).
    """
    start = time.perf_counter()
    bench = _Bench.open(recipe, method)
    rates, trials = grid(recipe, method), list[Trial]()
    for rung, share in enumerate((0.5, 1.0), start=1):
        count = max(1, round(share * len(bench.examples)))
        done = bench.rung(rates, rung=rung, count=count)
        trials += done
        ranked = sorted(
            (trial for trial in done if trial.validation_loss is not None),
            key=lambda trial: trial.validation_loss or 0.0,
        )
        if not ranked:
            raise DivergedError(
                f"compare.learning_rates.{method}: training diverged at each of "
                f"{', '.join(f'{rate:g}' for rate in rates)}; give lower rates"
            )
        rates = sorted(trial.learning_rate for trial in ranked[: math.ceil(len(rates) / 2)])
    result = SearchResult(
        learning_rate=ranked[0].learning_rate,
        trials=tuple(trials),
        search_s=time.perf_counter() - start,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / RESULT, result.model_dump_json(indent=2) + "\n")
    return result


@dataclass(frozen=True, slots=True)
class _Bench:
    """What all trials of one search share."""

    recipe: Recipe
    method: Method
    examples: list[Encoded]
    """The longest trial's training examples; a shorter one takes the first of them."""
    validation: list[Encoded]
    pad_id: int
    device: torch.device
    dtype: torch.dtype
    group: SearchGroup | None
    """Where the trials can train together."""

    @classmethod
    def open(cls, recipe: Recipe, method: Method) -> Self:
        tokenizer = load_tokenizer(recipe.model)
        data = load_data(recipe, tokenizer, is_checked=True)
        seed = recipe.train.seed
        rest, validation = validation_split(
            data.train, recipe.compare.validation_share, recipe.data_seed
        )
        chosen = epoch_order(len(rest), seed, 0)
        chosen = chosen[: max(1, round(recipe.compare.search_share * len(data.train)))]
        device = pick_device()
        examples = [rest[i] for i in chosen]
        recipe, group = settle(recipe, method, examples).recipe, None
        if may_train_together(recipe, method, recipe.compare.search_trials):
            own = recipe.model_copy(update={"method": method})
            group = SearchGroup(own, data, examples, validation, tokenizer, pad_id(tokenizer))
        return cls(
            recipe=recipe,
            method=method,
            examples=examples,
            validation=validation,
            pad_id=pad_id(tokenizer),
            device=device,
            dtype=pick_dtype(recipe.train.precision, device),
            group=group,
        )

    def rung(self, rates: Sequence[float], *, rung: int, count: int) -> list[Trial]:
        """A trial of each rate, on the first `count` examples."""
        if self.group is None:
            return [self.run(rate, rung=rung, count=count) for rate in rates]
        return [
            Trial(
                learning_rate=rate,
                rung=rung,
                examples=count,
                validation_loss=loss,
                status="diverged" if loss is None else "ok",
            )
            for rate, loss in self.group.losses(rates, rung, count).items()
        ]

    def run(self, rate: float, *, rung: int, count: int) -> Trial:
        """Train on the first `count` examples at `rate`, from the base again, and validate."""
        seed = self.recipe.train.seed
        model = load_for_training(
            self.recipe,
            self.method,
            dtype=self.dtype,
            device=self.device,
            seed=seed,
            examples=self.examples,
        )
        num_steps = len(plan_steps(self.recipe, count, seed=seed))
        label = f"{self.method}: search {rate:g}"
        every_s = self.recipe.train.log_every_s
        with TrainProgress(
            label, num_steps=num_steps, device=self.device, every_s=every_s
        ) as progress:
            try:
                result = train_method(
                    model,
                    self.examples[:count],
                    self.recipe,
                    self.method,
                    learning_rate=rate,
                    seed=seed,
                    pad_id=self.pad_id,
                    on_step=progress.on_step,
                )
            except NoGradientError:  # no rate would mend that
                raise
            except DivergedError:
                return Trial(
                    learning_rate=rate,
                    rung=rung,
                    examples=count,
                    validation_loss=None,
                    status="diverged",
                )
        if result.is_asked_to_stop:
            raise KeyboardInterrupt
        columns = loss_columns(
            model,
            self.validation,
            max_tokens=self.recipe.train.micro_batch_tokens,
            packing=self.recipe.train.packing,
            pad_id=self.pad_id,
        )
        loss = float(columns["loss_sum"].sum() / columns["tokens"].sum())
        return Trial(
            learning_rate=rate, rung=rung, examples=count, validation_loss=loss, status="ok"
        )


def grid(recipe: Recipe, method: Method) -> list[float]:
    """`search_trials` rates of the method's grid, evenly spread, ascending."""
    rates, wanted = recipe.compare.learning_rates[method], recipe.compare.search_trials
    if wanted == 1:
        return [rates[len(rates) // 2]]
    last = len(rates) - 1
    return [rates[round(i * last / (wanted - 1))] for i in range(wanted)]
