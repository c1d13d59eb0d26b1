"""The learning-rate search: trials that train together choose as those one after the other do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tunefork.compare.search as searching
from tunefork.compare.search import search
from tunefork.compare.search_together import may_train_together
from tunefork.errors import DivergedError, NoGradientError
from tunefork.recipe import Method, Recipe
from tunefork.train.method import load_for_training
from tunefork.train.runner import Runner

Make = Callable[..., Recipe]


@pytest.fixture
def recipe(make_recipe: Make) -> Recipe:
    rates = [1e-4, 1e-3, 1e-2]
    return make_recipe(
        train={"max_steps": 3, "batch_size": 2},
        compare={
            "search_trials": 3,
            "search_share": 0.8,
            "validation_share": 0.2,
            "learning_rates": {"lora": rates, "qlora": rates},
        },
    )


@pytest.mark.parametrize("method", [Method.LORA, Method.QLORA])
def test_trials_that_train_together_end_as_one_after_the_other(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Method
) -> None:
    loads: list[object] = []

    def load(*arguments: Any, **options: Any) -> Any:
        loads.append(arguments)
        return load_for_training(*arguments, **options)

    monkeypatch.setattr(searching, "load_for_training", load)
    together = search(recipe, method, tmp_path / "together")
    assert not loads
    monkeypatch.setattr(searching, "may_train_together", lambda *_: False)
    in_turn = search(recipe, method, tmp_path / "in turn")
    assert len(loads) == 5
    assert together.learning_rate == in_turn.learning_rate
    assert len(together.trials) == len(in_turn.trials) == 5
    for one, other in zip(together.trials, in_turn.trials, strict=True):
        assert (one.learning_rate, one.rung, one.examples) == (
            other.learning_rate,
            other.rung,
            other.examples,
        )
        assert one.validation_loss == pytest.approx(other.validation_loss, rel=1e-5)


def test_a_rate_that_diverges_leaves_the_others(make_recipe: Make, tmp_path: Path) -> None:
    recipe = make_recipe(
        train={"max_steps": 3, "batch_size": 2},
        compare={
            "search_trials": 2,
            "search_share": 0.8,
            "validation_share": 0.2,
            "learning_rates": {"lora": [1e-4, 1e30]},
        },
    )
    found = search(recipe, Method.LORA, tmp_path)
    assert found.learning_rate == 1e-4
    assert [t.status for t in found.trials][:2] == ["ok", "diverged"]
    wild = recipe.compare.model_copy(update={"learning_rates": {Method.LORA: (1e29, 1e30)}})
    with pytest.raises(DivergedError, match=r"compare.learning_rates.lora: training diverged"):
        search(recipe.model_copy(update={"compare": wild}), Method.LORA, tmp_path)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_gradient_that_is_lost_is_no_rate_that_diverges(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    """In one pass, and one after the other."""
    monkeypatch.setattr(Runner, "backward", lambda *_: None)
    recipe = make_recipe(
        train={"max_steps": 3, "batch_size": 2},
        lora={"dropout": dropout},
        compare={"search_trials": 2, "search_share": 0.8, "validation_share": 0.2},
    )
    with pytest.raises(NoGradientError, match=r"nothing is learnt.* train.compile: never"):
        search(recipe, Method.LORA, tmp_path)


def test_what_a_group_cannot_train_is_searched_in_turn(recipe: Recipe) -> None:
    def may(method: Method = Method.LORA, trials: int = 3, **lora: object) -> bool:
        section = recipe.lora.model_copy(update=lora)
        return may_train_together(recipe.model_copy(update={"lora": section}), method, trials)

    assert may() and may(Method.QLORA)
    assert not may(Method.FULL) and not may(trials=1)
    assert not may(dora=True) and not may(dropout=0.1) and not may(modules_to_save=("norm",))
