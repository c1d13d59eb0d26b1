"""The whole recipe: its sections, and what they must agree on."""

from typing import Any, Self

from pydantic import model_validator

from tunefork.recipe.compare import DEFAULT_LEARNING_RATES, CompareSection, EvaluateSection
from tunefork.recipe.data import DataSection, ModelSection
from tunefork.recipe.method import FullSection, LoraSection
from tunefork.recipe.section import Method, Section
from tunefork.recipe.sweep import SweepSection
from tunefork.recipe.train import TrainSection


class Recipe(Section):
    """One run, or one comparison: which model, which data, which method, how, and how judged."""

    model: ModelSection
    data: DataSection
    method: Method = Method.LORA
    """What `tunefork train` trains. `tunefork compare` trains `compare.methods`."""

    lora: LoraSection = LoraSection()
    full: FullSection = FullSection()
    train: TrainSection = TrainSection()
    evaluate: EvaluateSection = EvaluateSection()
    compare: CompareSection = CompareSection()
    sweep: SweepSection = SweepSection()

    @model_validator(mode="before")
    @classmethod
    def _model_may_be_a_string(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and isinstance(fields.get("model"), str):
            return {**fields, "model": {"id": fields["model"]}}
        return fields

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.train.micro_batch_tokens < self.data.max_length:
            raise ValueError(
                f"train.micro_batch_tokens: {self.train.micro_batch_tokens} is less than "
                f"data.max_length ({self.data.max_length}): one sequence must fit in one pass"
            )
        if self.train.keep == "best" and self.train.validate_every_steps is None:
            raise ValueError(
                "train.keep: best is the state with the lowest validation loss, and none is "
                "measured; set train.validate_every_steps"
            )
        lists: dict[str, object] = {
            "data.labels": self.data.labels,
            "lora.targets": self.lora.targets,
            "lora.modules_to_save": self.lora.modules_to_save or None,
            "model.add_tokens": self.model.add_tokens or None,
            "evaluate.metrics": self.evaluate.metrics,
            "compare.methods": self.compare.methods,
            "compare.seeds": self.compare.seeds,
            "train.trackers": self.train.trackers,
            **{f"sweep.{name}": value for name, value in self.sweep},
        }
        may_be_empty = {"train.trackers", *(field for field in lists if field.startswith("sweep."))}
        for field, values in lists.items():
            if isinstance(values, tuple) and not values and field not in may_be_empty:
                raise ValueError(f"{field}: is an empty list; name at least one")
            if isinstance(values, tuple) and len(set(values)) < len(values):
                raise ValueError(f"{field}: holds the same value twice")
        self._check_full_trains_all()
        self._check_release()
        for method in self.compare.methods:
            rates = self.compare.learning_rates.get(method, ())
            if len(rates) < self.compare.search_trials:
                raise ValueError(
                    f"compare.learning_rates.{method}: has {len(rates)} rates, but "
                    f"compare.search_trials asks for {self.compare.search_trials} for each method; "
                    f"name as many, or set compare.search_trials: {len(rates) or 1}"
                )
            if list(rates) != sorted(set(rates)):
                raise ValueError(f"compare.learning_rates.{method}: must ascend, each rate once")
        return self

    def _check_full_trains_all(self) -> None:
        """Options of deltas alone are refused where `method` has none; `compare` may have both."""
        chosen = {"dora": self.lora.dora, "modules_to_save": bool(self.lora.modules_to_save)}
        for field, is_set in chosen.items():
            if is_set and self.method is Method.FULL:
                raise ValueError(
                    f"lora.{field}: is set, but method full trains every weight and has no deltas; "
                    "leave it out, or choose lora or qlora"
                )

    def _check_release(self) -> None:
        """What cannot be had where weights move before the whole gradient is known."""
        if not self.full.gradient_release:
            return
        if self.train.max_grad_norm is not None:
            raise ValueError(
                "full.gradient_release: updates weights before the gradient's global norm is "
                f"known, so train.max_grad_norm ({self.train.max_grad_norm:g}) cannot be kept to; "
                "set train.max_grad_norm: null, or leave full.gradient_release out"
            )
        if self.train.on_out_of_memory == "shrink":
            raise ValueError(
                "full.gradient_release: a step that ran out of memory has moved weights already, "
                "so it cannot be taken again as train.on_out_of_memory: shrink would; set error, "
                "or leave full.gradient_release out"
            )

    @property
    def data_seed(self) -> int:
        """By which examples are chosen."""
        return self.train.seed if self.data.seed is None else self.data.seed

    def learning_rate(self, method: Method) -> float:
        """Peak learning rate for `method` where no search chose one."""
        if self.train.learning_rate is not None:
            return self.train.learning_rate
        rates = self.compare.learning_rates[method]
        if rates and rates != DEFAULT_LEARNING_RATES[method]:
            return rates[len(rates) // 2]
        return 2e-5 if method is Method.FULL else 2e-4
