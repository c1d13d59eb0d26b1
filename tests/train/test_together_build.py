"""A group from a recipe and a model's folder, in every form of the base; what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.folders import save_model
from tests.train.groups import records, run
from tests.train.test_loss import examples
from tunefork.data.example import Encoded
from tunefork.errors import RecipeError
from tunefork.model.bank import BankAdapter
from tunefork.recipe import Method, Recipe
from tunefork.recipe_file import parse
from tunefork.train.loop import StepRecord
from tunefork.train.member import MemberFailed, member_of
from tunefork.train.method import load_for_training, train_method
from tunefork.train.together import Group
from tunefork.train.together_build import group_of, load_for_group

CPU = torch.device("cpu")
DATA = [examples((9, 4, 17, 6, 12, 8), seed=seed) for seed in range(3)]
VARIANTS: tuple[dict[str, Any], ...] = (
    {"lora.rank": 4, "train.learning_rate": 1e-2},
    {"lora.rank": 2, "lora.targets": "attention", "train.schedule": "linear"},
    {"lora.rank": 16, "lora.scaling": "rslora", "train.weight_decay": 0.1},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    save_model(made)
    return made


def _recipe(folder: Path, changes: dict[str, Any]) -> Recipe:
    fields: dict[str, Any] = {
        "model": str(folder),
        "data": {"train": "none", "max_length": 32},
        "train": {
            "max_steps": 5,
            "epochs": 9,
            "batch_size": 2,
            "micro_batch_tokens": 64,
            "learning_rate": 5e-3,
        },
    }
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        (fields.setdefault(section, {}) if section else fields)[name] = value
    return parse(fields, "test")


def _together(folder: Path, shared: dict[str, Any], dtype: torch.dtype) -> Group:
    recipes = [_recipe(folder, shared | own) for own in VARIANTS]
    members = [
        member_of(
            recipe, DATA[at], name=f"v{at}", learning_rate=recipe.train.learning_rate or 0, seed=at
        )
        for at, recipe in enumerate(recipes)
    ]
    adapters = [BankAdapter(m.lora, m.seed) for m in members]
    first = recipes[0]
    bank = load_for_group(first, first.method, adapters, dtype=dtype, device=CPU, examples=DATA[0])
    return group_of(bank, members, first, pad_id=0)


def _alone(folder: Path, shared: dict[str, Any], dtype: torch.dtype, at: int) -> list[StepRecord]:
    recipe = _recipe(folder, shared | VARIANTS[at])
    model = load_for_training(
        recipe, recipe.method, dtype=dtype, device=CPU, seed=at, examples=DATA[0]
    )
    told: list[StepRecord] = []
    train_method(
        model,
        DATA[at],
        recipe,
        recipe.method,
        learning_rate=recipe.train.learning_rate or 0,
        seed=at,
        pad_id=0,
        on_step=told.append,
    )
    return told


@pytest.mark.parametrize(
    ("shared", "dtype", "limit"),
    [
        ({}, torch.float32, 1e-5),
        ({"train.activation_checkpointing": "full"}, torch.float32, 1e-5),
        pytest.param({"method": "qlora"}, torch.float32, 1e-5, marks=pytest.mark.slow),
        ({}, torch.bfloat16, 3e-3),
        pytest.param({"method": "qlora"}, torch.bfloat16, 3e-3, marks=pytest.mark.slow),
        # A rounding of activations to 8 bits moves a random model's loss by a hundredth.
        pytest.param({"train.precision": "int8"}, torch.bfloat16, 1.5e-2, marks=pytest.mark.slow),
        ({"train.precision": "int8", "method": "qlora"}, torch.bfloat16, 1.5e-2),
    ],
)
def test_recipes_together_are_those_recipes(
    folder: Path, shared: dict[str, Any], dtype: torch.dtype, limit: float
) -> None:
    group = _together(folder, shared, dtype)
    events = run(group)
    assert not [e for e in events if isinstance(e, MemberFailed)]
    for at in range(len(VARIANTS)):
        solo, ours = _alone(folder, shared, dtype, at), records(events, f"v{at}")
        assert [r.learning_rate for r in ours] == [r.learning_rate for r in solo]
        assert [r.loss for r in ours] == pytest.approx([r.loss for r in solo], rel=limit)
        assert [r.grad_norm for r in ours] == pytest.approx(
            [r.grad_norm for r in solo], rel=30 * limit
        )


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"method": "full"}, "method: full"),
        ({"train.on_loss_spike": "rollback"}, "train.on_loss_spike"),
        ({"model": {"id": "x", "add_tokens": ["<new>"]}}, "model.add_tokens"),
    ],
)
def test_what_needs_a_pass_of_its_own_is_refused(
    folder: Path, changes: dict[str, Any], field: str
) -> None:
    recipe = _recipe(folder, changes)
    with pytest.raises(RecipeError, match=field):
        member_of(recipe, DATA[0], name="x", learning_rate=1e-3, seed=0)


def test_dropout_is_each_adapters_own(folder: Path) -> None:
    """One adapter's rate changes its own steps alone, and nothing in eval."""
    recipes = [_recipe(folder, {"lora.rank": 4, "lora.dropout": rate}) for rate in (0.0, 0.9)]
    found = []
    for rates in ((0, 0), (0, 1)):
        chosen = [recipes[at] for at in rates]
        members = [
            member_of(recipe, DATA[0], name=f"v{at}", learning_rate=1e-2, seed=at)
            for at, recipe in enumerate(chosen)
        ]
        adapters = [BankAdapter(m.lora, m.seed) for m in members]
        bank = load_for_group(chosen[0], Method.LORA, adapters, dtype=torch.float32, device=CPU)
        group = group_of(bank, members, chosen[0], pad_id=0)
        events = run(group)
        found.append([[r.loss for r in records(events, f"v{at}")] for at in (0, 1)])
        ids = torch.arange(3, 19)[None]
        with group.only("v1"):
            assert torch.equal(group.model(ids).logits, group.model(ids).logits)
    without, with_it = found
    assert with_it[0] == pytest.approx(without[0], rel=1e-6)
    assert with_it[1][0] == pytest.approx(without[1][0], rel=1e-6)  # B is zero still
    assert abs(with_it[1][-1] - without[1][-1]) > 1e-3


def test_an_example_longer_than_a_pass_fails_its_own_member(folder: Path) -> None:
    recipe = _recipe(folder, {"lora.rank": 2})
    too_long: list[Encoded] = examples((70,) * 6)
    members = [
        member_of(recipe, data, name=name, learning_rate=1e-3, seed=0)
        for name, data in (("long", too_long), ("fine", DATA[1]))
    ]
    adapters = [BankAdapter(m.lora, m.seed) for m in members]
    bank = load_for_group(recipe, Method.LORA, adapters, dtype=torch.float32, device=CPU)
    events = run(group_of(bank, members, recipe, pad_id=0))
    [failed] = [e for e in events if isinstance(e, MemberFailed)]
    assert failed.name == "long" and "70 tokens" in failed.reason
    assert len(records(events, "fine")) == 5
