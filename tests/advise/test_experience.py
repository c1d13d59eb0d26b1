"""Comparisons of the user's own outrank the rules where they are about this, and only there."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.advise.fake import advised
from tests.compare.fabricated import fabricate
from tunefork.advise.experience import places
from tunefork.compare.comparison import Arm, Comparison, Model
from tunefork.registry.history import remember_comparison

Keep = Callable[..., Path]
FULL_WINS: dict[Arm, float] = {"base": 0.25, "lora": 0.80, "qlora": 0.79, "full": 0.90}
NOTHING_WINS: dict[Arm, float] = {"base": 0.87, "lora": 0.86, "qlora": 0.85, "full": 0.855}


@pytest.fixture
def keep(tmp_path: Path) -> Keep:
    """Write a comparison of a model of `params` parameters into a run folder."""

    def write(found: Comparison, params: float, name: str = "mine", day: int = 1) -> Path:
        model = Model(id="owner/model", parameters=int(params))
        created = f"2026-11-{day:02}T10:00:00+00:00"
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        found.model_copy(update={"model": model, "created": created}).save(
            folder / "comparison.json"
        )
        return tmp_path / "runs"

    return write


CLASSIFY: dict[str, Any] = {"model_params": 8e9, "task": "classification", "examples": 50_000}


def test_a_comparison_of_this_size_and_task_decides(keep: Keep) -> None:
    runs = keep(fabricate(FULL_WINS), 8e9)
    advice = advised(**CLASSIFY, runs=(runs,))
    assert advice.method == "full" and advice.confidence == "high"
    reason = next(r for r in advice.reasons if r.rule == "measured-full")
    assert reason.source == f"your own comparison, {runs / 'mine'}"
    assert "outranks the rules of thumb" in reason.text
    assert "full fine-tuning 90.0 %" in reason.text and "LoRA 80.0 %" in reason.text
    assert "counts here" in advice.measured[0]
    assert advised(**CLASSIFY).method == "lora"


def test_a_small_models_comparison_never_decides_for_a_large_one(keep: Keep) -> None:
    runs = keep(fabricate(FULL_WINS), 135e6)
    advice = advised(**CLASSIFY, runs=(runs,))
    assert advice.method == "lora"
    assert "135.0M parameters, and what that shows is not offered for 8.00B" in advice.measured[0]
    assert not any("measured" in reason.rule for reason in advice.reasons)
    small = advised(**{**CLASSIFY, "model_params": 135e6}, runs=(runs,))
    assert small.method == "full"


def test_what_the_store_remembers_counts_wherever_it_lies(
    keep: Keep, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = keep(fabricate(FULL_WINS), 8e9, name="elsewhere") / "elsewhere"
    away = tmp_path / "away"
    away.mkdir()
    monkeypatch.chdir(away)
    assert not places()
    remember_comparison(folder)
    assert advised(**CLASSIFY, runs=tuple(places())).method == "full"
    shutil.rmtree(folder)
    assert not places()


def test_another_kind_of_task_does_not_count(keep: Keep) -> None:
    runs = keep(fabricate(FULL_WINS), 8e9)
    chat = advised(model_params=8e9, task="chat", examples=50_000, runs=(runs,))
    assert chat.method == "lora" and "it is about classification, not answers" in chat.measured[0]
    unsaid = advised(model_params=8e9, examples=50_000, runs=(runs,))
    assert "the task is not given" in unsaid.measured[0]
    unknown = advised(task="classification", examples=50_000, runs=(runs,))
    assert "the size of your model is not given" in unknown.measured[0]


def test_a_base_that_stands_means_no_fine_tuning(keep: Keep) -> None:
    runs = keep(fabricate(NOTHING_WINS), 7e9)
    advice = advised(**CLASSIFY, runs=(runs,))
    assert advice.method == "none" and advice.recipe is None


def test_the_latest_counts(keep: Keep) -> None:
    keep(fabricate(FULL_WINS), 8e9, "old", day=1)
    runs = keep(fabricate(), 8e9, "new", day=2)
    advice = advised(**CLASSIFY, runs=(runs,))
    assert advice.method == "lora"
    assert [str(runs / "new") in line for line in advice.measured] == [True, False]


def test_what_only_quality_measured_does_not_overrule_many_tenants(keep: Keep) -> None:
    runs = keep(fabricate(FULL_WINS), 8e9)
    assert advised(**CLASSIFY, tenants=40, runs=(runs,)).method == "lora"


def test_a_damaged_file_is_said_and_passed_over(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text("{}")
    advice = advised(**CLASSIFY, runs=(tmp_path,))
    assert advice.method == "lora" and "is not a comparison" in advice.measured[0]
