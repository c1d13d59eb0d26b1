"""Sweeps and train-many over a real bank: what is trained together ends as if trained alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tunefork.recipe import Recipe
from tunefork.recipe_file import load
from tunefork.registry.run import read_record
from tunefork.sweep.bank import BankGroup
from tunefork.sweep.result import SweepResult
from tunefork.sweep.seat import Seat
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


@pytest.mark.parametrize("method", ["lora", pytest.param("qlora", marks=pytest.mark.slow)])
def test_variants_that_come_and_go_end_as_alone(
    recipe: Recipe, tmp_path: Path, method: str
) -> None:
    recipe = Recipe.model_validate(recipe.model_dump() | {"method": method})
    result = _sweep(recipe, tmp_path / "sweep")
    assert result.together == 3
    assert sorted(v.status for v in result.variants) == ["dropped"] * 2 + ["ok"] * 2
    for variant in [v for v in result.variants if v.status == "ok"]:
        folder = tmp_path / "sweep" / variant.folder
        alone = train_run(load(folder / "recipe.yaml"), tmp_path / variant.name, say=lambda _: None)
        record = read_record(folder)
        assert record is not None and record.tokens == alone.tokens
        assert record.metrics["loss"] == pytest.approx(alone.metrics["loss"], rel=1e-5)
        theirs = _weights(tmp_path / variant.name)
        for name, ours in _weights(folder).items():
            assert (ours - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), name


@pytest.mark.parametrize("amidst_saving", [pytest.param(False, marks=pytest.mark.slow), True])
def test_killed_a_group_goes_on_bit_for_bit(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amidst_saving: bool
) -> None:
    """Also where some have saved a later step than others: `moment.json` says which go together."""
    recipe = make_recipe(
        train={"max_steps": 4, "batch_size": 2, "epochs": 4, "checkpoint_every_steps": 1},
        lora={"dropout": 0.1},
        sweep={"rank": [2, 5, 3], "validation_share": 0.3},
    )
    _sweep(recipe, tmp_path / "whole")
    calls = list[int]()

    def dying(method: Callable[..., Any], at: int) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == at:
                raise SystemExit
            return method(*arguments)

        return call

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        if amidst_saving:  # of the second moment, after two of three
            patched.setattr(Seat, "save", dying(Seat.save, 6))
        else:
            patched.setattr(BankGroup, "step", dying(BankGroup.step, 3))
        _sweep(recipe, tmp_path / "killed")
    result = _sweep(recipe, tmp_path / "killed")
    for variant in result.variants:
        ours, theirs = (_weights(tmp_path / at / variant.folder) for at in ("killed", "whole"))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), variant.name


def test_a_loss_that_is_not_finite_ends_its_variant_alone(
    make_recipe: Make, tmp_path: Path
) -> None:
    def found(*rates: float) -> tuple[SweepResult, Path]:
        sweeping = {"learning_rate": list(rates), "validation_share": 0.3}
        out = tmp_path / str(rates[-1])
        return _sweep(
            make_recipe(train={"max_steps": 3, "batch_size": 2}, sweep=sweeping), out
        ), out

    (failing, at), (whole, beside) = found(1e-4, 1e-3, 1e30), found(1e-4, 1e-3, 1e-2)
    assert [v.status for v in failing.variants] == ["ok", "ok", "failed"]
    last = failing.variants[-1]
    assert "the loss is" in (last.error or "") and "train.learning_rate" in (last.error or "")
    record = read_record(at / last.folder)
    assert record is not None and record.status == "failed"
    for one, other in zip(failing.variants[:2], whole.variants[:2], strict=True):
        ours, theirs = _weights(at / one.folder), _weights(beside / other.folder)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
