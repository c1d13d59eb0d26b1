"""Situations from files and flags; wrong ones and contradictions are named."""

from pathlib import Path
from typing import Any

import pytest

from tunefork.advise.amount import TYPICAL, amount_of
from tunefork.advise.situation import (
    CONTRADICTIONS,
    MISSING,
    TASKS,
    Situation,
    SituationError,
    load_situation,
    missing,
    size_in,
)


def test_numbers_as_people_write_them() -> None:
    s = load_situation(
        None, {"model_params": "8B", "examples": "50k", "tokens": "1.5M", "tenants": "40"}
    )
    assert (s.model_params, s.examples, s.tokens, s.tenants) == (8e9, 50_000, 1_500_000, 40)
    s = load_situation(None, {"examples": 1e6, "model_params": "7e9", "tokens": "2_000_000"})
    assert (s.examples, s.model_params, s.tokens) == (1_000_000, 7e9, 2_000_000)
    assert load_situation(None, {"gpus": "l4, l4"}).gpus == ("l4", "l4")


@pytest.mark.parametrize(
    "text",
    [
        "model_params: 8e9\ntask: chat\ndistribute: no\n",
        '{"model_params": 8e9, "task": "chat", "distribute": false}',
    ],
)
def test_files_in_yaml_and_json_and_what_goes_over_them(tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    s = load_situation(file, {"task": "code", "examples": None})
    assert (s.model_params, s.task, s.distribute, s.examples) == (8e9, "code", False, None)


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("# nothing\n")
    assert load_situation(file, {}) == Situation()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"examples": -5}, r"examples: .*greater than or equal to 0 \(found -5\)"),
        ({"examples": "-5"}, "examples: "),
        ({"examples": 1.5}, "examples: .*whole number"),
        ({"examples": True}, "examples: must be a number, not True"),
        ({"budget_usd": -1}, "budget_usd: .*greater than or equal to 0"),
        ({"deadline_hours": 0}, "deadline_hours: .*greater than 0"),
        ({"tenants": 0}, "tenants: .*greater than or equal to 1"),
        ({"quality_point_value_usd": "lots"}, r"quality_point_value_usd: .*\(found 'lots'\)"),
        ({"model_params": "inf"}, "model_params"),
        ({"task": "clasification"}, "task: .*did you mean 'classification'"),
        ({"change": "behavior"}, "change: .*did you mean 'behaviour'"),
        ({"tasks": "chat"}, "tasks: unknown key; did you mean 'task'.*allowed: model, "),
        ({"budget_usd": 0, "deadline_hours": 1}, "budget_usd: 0 with deadline_hours: 1"),
        ({"tokens": 10, "examples": 11}, "tokens: 10 is less than examples: 11"),
        ({"model_params": 8}, "model_params: 8 is no language model's size; write 8e9 or 8B"),
        ({"model": "x/Llama-8B", "model_params": "70B"}, "7e.10 is not the size in model: x/Llama"),
    ],
)
def test_what_is_wrong_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SituationError, match="^situation: .*" + message):
        load_situation(None, given)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    with pytest.raises(SituationError, match=r"mine\.yaml: cannot be read.*situation file"):
        load_situation(file, {})
    file.write_text("a: [\n")
    with pytest.raises(SituationError, match=r"mine\.yaml:2: is not YAML"):
        load_situation(file, {})
    file.write_text("- chat\n")
    with pytest.raises(SituationError, match=r"mine\.yaml: must be a mapping"):
        load_situation(file, {})


def test_distillation_with_tenants_is_no_contradiction() -> None:
    load_situation(None, {"task": "distillation", "tenants": 5})
    load_situation(None, {"budget_usd": 0})


def test_every_key_has_an_effect_when_missing() -> None:
    assert set(MISSING) == set(Situation.model_fields)
    assert set(missing(Situation())) == set(MISSING)
    assert "model_params" not in missing(Situation(model="owner/name"))
    assert all(message for _, message in CONTRADICTIONS)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("8B", 8e9),
        ("meta-llama/Llama-3.1-8B-Instruct", 8e9),
        ("Qwen/Qwen3-0.6B", 0.6e9),
        ("smollm2-135m-instruct", 135e6),
        ("Qwen/Qwen3-30B-A3B", 30e9),
        ("mistralai/Mixtral-8x7B", None),
        ("microsoft/phi-4", None),
        ("x/llama-8b-bnb-4bit", 8e9),
    ],
)
def test_sizes_in_names(name: str, params: float | None) -> None:
    assert size_in(name) == params


def test_amounts_said_and_assumed() -> None:
    assert set(TYPICAL) == set(TASKS)
    amount = amount_of(Situation(task="classification", examples=50_000))
    assert (amount.tokens, amount.supervised_tokens) == (12_500_000, 500_000)
    assert amount.steps == 50_000 // 16 and "250 tokens an example" in amount.note
    said = amount_of(Situation(task="chat", examples=1000, tokens=3_000_000))
    assert (said.tokens, said.max_length, said.epochs) == (3_000_000, 4096, 3.0)
    long = amount_of(Situation(task="chat", examples=10, tokens=60_000))
    assert long.max_length == 8192
    text = amount_of(Situation(task="domain_language", tokens=50_000_000_000))
    assert text.is_plain_text and text.supervised_tokens == text.tokens
    assert text.examples == -(-50_000_000_000 // 4096) and text.batch_size == 128
    assert amount_of(Situation(examples=0)).tokens > 0
