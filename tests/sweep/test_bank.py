"""Sweeps and train-many over a real bank: what is trained together ends as if trained alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tunefork.recipe import Recipe
from tunefork.recipe_file import load
from tunefork.registry.run import read_record
from tunefork.sweep.result import SweepResult
from tunefork.sweep.sweep import sweep
from tunefork.trial.trial import train_run

Make = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def page_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunefork.sweep.sweep.write_report", lambda result, path: None)


@pytest.fixture
def recipe(make_recipe: Make) -> Recipe:
    return make_recipe(
        train={"max_steps": 4, "batch_size": 2, "epochs": 4},
        sweep={
            "rank": [2, 5],
            "learning_rate": [1e-4, 1e-2],
            "targets": ["all-linear", ["q_proj", "v_proj"]],
            "validation_share": 0.3,
            "halving": {"rungs": 1},
            "together": 3,
        },
    )


def _sweep(recipe: Recipe, out: Path) -> SweepResult:
    return sweep(recipe, out, say=lambda line: None)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "adapter" / "adapter_model.safetensors")
    return found


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_variants_that_come_and_go_end_as_alone(
    recipe: Recipe, tmp_path: Path, method: str
) -> None:
    recipe = Recipe.model_validate(recipe.model_dump() | {"method": method})
    result = _sweep(recipe, tmp_path / "sweep")
    assert result.together == 3
    assert sorted(v.status for v in result.variants) == ["dropped"] * 4 + ["ok"] * 4
    for variant in [v for v in result.variants if v.status == "ok"][:2]:
        folder = tmp_path / "sweep" / variant.folder
        alone = train_run(load(folder / "recipe.yaml"), tmp_path / variant.name, say=lambda _: None)
        record = read_record(folder)
        assert record is not None and record.tokens == alone.tokens
        assert record.metrics["loss"] == pytest.approx(alone.metrics["loss"], rel=1e-5)
        theirs = _weights(tmp_path / variant.name)
        for name, ours in _weights(folder).items():
            assert (ours - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), name
