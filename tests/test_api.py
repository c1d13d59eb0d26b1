"""The Python API: the command line's verbs, callable however much of the library is loaded."""

import json
from pathlib import Path

import pytest

import tunefork
import tunefork.compare.compare
import tunefork.train.loop
from tests.advise.fake import FakePlanner
from tests.folders import save_model
from tunefork.errors import BadInputError


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    save_model(tmp_path / "base")
    for name, start in (("train", 0), ("eval", 50)):
        rows = [{"text": f"n {n}", "label": "ab"[n % 2]} for n in range(start, start + 12)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: base\n"
        "data: {train: train.jsonl, eval: eval.jsonl, max_length: 128}\n"
        "lora: {rank: 4}\n"
        "train: {max_steps: 2, batch_size: 4, precision: fp32}\n"
        "evaluate: {forgetting: null, bootstrap_samples: 200}\n"
    )
    return file


def test_verbs_with_a_package_of_their_name_can_be_called(recipe: Path, tmp_path: Path) -> None:
    record = tunefork.train(recipe, tmp_path / "run")
    assert record.status == "ok"
    assert tunefork.train(recipe, tmp_path / "run") == record
    figures = tunefork.evaluate(tmp_path / "run", recipe)
    assert figures["loss"][0] == pytest.approx(record.metrics["loss"][0], rel=1e-4)
    assert [folder for folder, _ in tunefork.runs(tmp_path)] == [tmp_path / "run"]


def test_plan(recipe: Path) -> None:
    """Over numbers and as written: of the data and the compiler are other tests."""
    as_written = ("train.compile=never", "train.activation_checkpointing=none")
    resolved = tunefork.load_recipe(recipe, *as_written)
    plan = tunefork.plan(resolved, ["l4"], examples=100, tokens=900)
    assert plan.machine.gpu == "l4" and set(plan.methods) == {"lora", "qlora", "full"}
    assert plan.work.tokens == 900
    with pytest.raises(BadInputError, match="give both"):
        tunefork.plan(recipe, examples=100)


@pytest.mark.parametrize("planner", [FakePlanner, pytest.param(None, marks=pytest.mark.slow)])
def test_advise(planner: type | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if planner is not None:  # one that traces nothing
        monkeypatch.setattr("tunefork.advise.resolve.TracedPlanner", planner)
    advice = tunefork.advise(model="8B", task="classification", examples="50k", gpus=["h100"])
    assert advice.method == "lora"
    with pytest.raises(BadInputError, match="task"):
        tunefork.advise(task="clasification")


def test_sweep_and_train_many(recipe: Path, tmp_path: Path) -> None:
    resolved = tunefork.load_recipe(recipe, "sweep.rank=[1,2]", "sweep.validation_share=0.4")
    result = tunefork.sweep(resolved, tmp_path / "sweep")
    assert [v.status for v in result.variants] == ["ok", "ok"] and result.recommended
    (tmp_path / "many.yaml").write_text(
        "recipe: recipe.yaml\nadapters: [{name: a}, {name: b, lora: {rank: 2}}]\n"
    )
    many = tunefork.train_many(tmp_path / "many.yaml", tmp_path / "many", publish="team")
    assert [entry.published for entry in many.entries] == ["team/a:v1", "team/b:v1"]
    assert callable(tunefork.sweep)  # its package was imported meanwhile
