"""`tunefork advise` in this process: flags, files, questions, JSON, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.advise.fake import FakePlanner
from tests.cli.conftest import Call
from tests.compare.fabricated import fabricate
from tunefork.advise.planner import TracedPlanner
from tunefork.advise.situation import Situation
from tunefork.cli.app import app
from tunefork.compare.comparison import Model
from tunefork.recipe_file import load

SITUATIONS = Path(__file__).parents[2] / "examples" / "situations"
CLASSIFY = ("--model", "8B", "--task", "classification", "--examples", "50k")


@pytest.fixture(autouse=True)
def arithmetic(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No planner, and neither runs nor a catalogue of the user's."""
    monkeypatch.setattr("tunefork.advise.resolve.TracedPlanner", FakePlanner)
    monkeypatch.setenv("TUNEFORK_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def _json(tunefork: Call, *arguments: object) -> dict[str, Any]:
    ended = tunefork("advise", *arguments, "--json")
    assert ended.status == 0, ended
    answer: dict[str, Any] = json.loads(ended.out)
    return answer


def test_flags_give_an_answer(tunefork: Call) -> None:
    ended = tunefork("advise", *CLASSIFY)
    assert ended.status == 0
    for words in (
        "LoRA, rank 16, on 1 x rtx4090.",
        "Confidence medium",
        "rank 16, alpha 32, all-linear, learning rate 2e-4, batch 16, 1 epoch\n",
        "1 x rtx4090",
        "Fireworks",
        "What would change it",
        "deadline_hours: no answer is refused",
        "--recipe-out FILE",
    ):
        assert words in ended.out


def test_json_has_what_programs_need(tunefork: Call) -> None:
    answer = _json(tunefork, "--situation", SITUATIONS / "2_many_customers.yaml")
    assert answer["method"] == "lora" and answer["where"]["recommended"] == "own"
    for key in ("rank", "alpha", "targets", "learning_rate", "serving", "confidence", "recipe"):
        assert answer[key]
    assert {"text", "source"} <= set(answer["reasons"][0])
    assert answer["where"]["own"]["cost_usd"] > 0 and answer["where"]["managed"]
    assert answer["plan"]["methods"]["lora"]["fits"]


def test_flags_go_over_the_file(tunefork: Call) -> None:
    file = SITUATIONS / "1_support_classification.yaml"
    answer = _json(tunefork, "--situation", file, "--gpu", "l40s", "--model-params", "70B")
    assert answer["method"] == "qlora"
    two = _json(tunefork, "--situation", file, "--gpu", "l4", "--gpu", "l4", "--data-stays")
    assert two["where"]["at_hand"]["machine"] == "2 x l4"
    assert two["where"]["managed"][0]["why_not"] == "the data may not leave"


def test_there_is_a_flag_for_every_key() -> None:

    verb = typer.main.get_command(app).commands["advise"]  # type: ignore[attr-defined]
    flags = {option for parameter in verb.params for option in parameter.opts}
    for key in Situation.model_fields:
        assert "--" + key.replace("_", "-") in flags


def test_the_recipe_can_be_trained_from(tunefork: Call, tmp_path: Path) -> None:
    file = tmp_path / "new" / "mine.yaml"
    ended = tunefork("advise", *CLASSIFY, "--recipe-out", file)
    assert ended.status == 0 and str(file) in ended.out
    recipe = load(file)
    assert recipe.method == "lora" and recipe.lora.rank == 16
    again = tunefork("advise", *CLASSIFY, "--recipe-out", file)
    assert again.status == 2 and "mine.yaml exists" in again.err
    none = tunefork("advise", "--task", "facts", "--recipe-out", tmp_path / "none.yaml")
    assert none.status == 0 and "not written" in none.err
    assert not (tmp_path / "none.yaml").exists()


def test_explanations(tunefork: Call) -> None:
    ended = tunefork("advise", *CLASSIFY, "--explain", "rank")
    assert ended.status == 0 and "Start at rank 16" in ended.out and "[LoRA Without" in ended.out
    answer = _json(tunefork, "--explain", "serving")
    assert answer["topic"] == "serving" and len(answer["answers"]) >= 3
    wrong = tunefork("advise", "--explain", "ranks")
    assert wrong.status == 2 and "did you mean 'rank'?; there are rank, serving" in wrong.err


def test_without_a_terminal_and_anything_said(tunefork: Call) -> None:
    ended = tunefork("advise")
    assert ended.status == 2
    assert "no terminal to ask on: give --situation FILE or flags" in ended.err


def test_questions_on_a_terminal(tunefork: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["8B", "style", *[""] * 9, "no"])
    monkeypatch.setattr("tunefork.cli.advise._is_terminal", lambda: True)
    monkeypatch.setattr("typer.prompt", lambda text, **_: next(answers))
    ended = tunefork("advise")
    assert ended.status == 0
    assert "Press Enter where you do not know" in ended.out and "LoRA, rank 16" in ended.out
    assert "The data may not leave the house" in ended.out


def test_ctrl_c_at_a_question(tunefork: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(*_: object, **__: object) -> str:
        raise typer.Abort

    monkeypatch.setattr("tunefork.cli.advise._is_terminal", lambda: True)
    monkeypatch.setattr("typer.prompt", leave)
    assert tunefork("advise").status == 130


def test_own_comparisons_are_found(tunefork: Call, tmp_path: Path) -> None:
    found = fabricate({"base": 0.25, "lora": 0.8, "full": 0.95})
    found = found.model_copy(update={"model": Model(id="owner/name", parameters=8_000_000_000)})
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    found.save(tmp_path / "runs" / "mine" / "comparison.json")
    ended = tunefork("advise", *CLASSIFY)
    assert "Full fine-tuning, on" in ended.out and "runs/mine" in ended.out
    (tmp_path / "other").mkdir()
    assert _json(tunefork, *CLASSIFY, "--runs", tmp_path / "other")["method"] == "lora"
    gone = tunefork("advise", *CLASSIFY, "--runs", "gone")
    assert gone.status == 2 and "--runs: gone: no such folder" in gone.err


def test_own_prices(tunefork: Call, tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text("gpus: [{id: b200, usd_per_hour: 0.01}]")
    answer = _json(tunefork, *CLASSIFY, "--catalogue", file)
    assert answer["where"]["own"]["machine"] == "1 x b200"
    assert str(file) in answer["where"]["own"]["note"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "l40"), "GPU 'l40' is not in the catalogue; did you mean 'l40s'?; there are"),
        (("--gpu", "l40s", "--gpu", "h100"), "GPUs of different kinds (l40s, h100)"),
        (("--budget-usd", "0", "--deadline-hours", "1"), "budget_usd: 0 with deadline_hours: 1"),
        (("--examples", "-3"), "examples: "),
        (("--task", "clasification"), "did you mean 'classification'?"),
        (("--situation", "gone.yaml"), "gone.yaml: cannot be read"),
    ],
)
def test_bad_input(tunefork: Call, arguments: tuple[str, ...], message: str) -> None:
    ended = tunefork("advise", *arguments)
    assert ended.status == 2 and message in ended.err and "Traceback" not in ended.err


def test_a_model_that_cannot_be_read(tunefork: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunefork.advise.resolve.TracedPlanner", TracedPlanner)
    for name in ("owner/name", "./gone"):
        ended = tunefork("advise", "--model", name)
        assert ended.status == 2 and f"model.id: {name}" in ended.err
        assert "say how large it is (model_params: 8B)" in ended.err
