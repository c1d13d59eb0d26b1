"""The tables hold together: every text can be filled, every row can apply, every id is one."""

import re
from typing import Any

import pytest

from tests.advise.fake import resolved
from tunefork.advise.cautions import CAUTIONS
from tunefork.advise.explain import ANSWERS, TOPICS
from tunefork.advise.figures import TABLE, fill
from tunefork.advise.rules import BRANCHES, FORMS, NOTHING, STARTS, VOTES, Form, Start, Vote
from tunefork.advise.serving import SERVING
from tunefork.advise.sources import THUMB

ROWS: list[Vote | Form | Start] = [*VOTES, *FORMS, *STARTS]
SITUATIONS: list[dict[str, Any]] = [
    {},
    {"model_params": 8e9, "task": "classification", "examples": 50_000},
    {"model_params": 13e9, "task": "domain_language", "tokens": "50B"},
    {"model_params": 70e9, "gpus": ["rtx4090"], "tenants": 12, "change": "behaviour"},
    {"model_params": 900e9, "task": "distillation", "distribute": True, "deadline_hours": 3},
    {"model_params": 135e6, "task": "facts", "examples": 20, "budget_usd": 0},
    {"model_params": 8e9, "quality_point_value_usd": 1e6, "budget_usd": 40},
    {"model_params": 8e9, "gpus": ["l40s"], "data_may_leave": False, "change": "style"},
    {"model_params": 8e9, "gpus": ["l40s"], "examples": 150, "task": "code"},
    {"model_params": 8e9, "budget_usd": 0.8, "examples": 9000},
    {"model_params": 8e9, "deadline_hours": 0.0234, "examples": 9000},
    {"model_params": 32e9, "budget_usd": 4.2, "examples": 10_000, "task": "chat"},
    {"model_params": 400e9, "task": "chat"},
]


def test_ids_are_unique() -> None:
    ids = [row.id for row in ROWS]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("given", SITUATIONS, ids=str)
def test_every_text_can_be_filled(given: dict[str, Any]) -> None:
    facts = resolved(**given).facts
    texts = [text for row in ROWS for text in (row.text, row.source, getattr(row, "border", ""))]
    texts += [vote.undone_by for vote in VOTES]
    texts += [row.text for row in SERVING] + [row.text for row in ANSWERS]
    for text in texts:
        filled = fill(text, facts)
        assert "{" not in filled and "inf" not in re.split(r"\W", filled), filled


def test_every_figure_is_used() -> None:
    texts = [text for row in ROWS for text in (row.text, row.source, getattr(row, "border", ""))]
    texts += [vote.undone_by for vote in VOTES]
    texts += [row.text for row in SERVING] + [row.text for row in ANSWERS]
    texts += [text.replace("%", m) for _, text in CAUTIONS for m in ("lora", "qlora", "full")]
    used = {name for text in texts for name in re.findall(r"{(\w+)}", text)}
    assert set(TABLE) == used


def test_every_row_that_needs_no_measurement_applies_somewhere() -> None:
    facts = [resolved(**given).facts for given in SITUATIONS]
    never = [row.id for row in ROWS if not any(row.applies(f) for f in facts)]
    assert [id for id in never if "measured" not in id] == []


def test_every_branch_has_a_form_and_a_way_to_serve() -> None:
    facts = resolved().facts
    for branch in BRANCHES:
        assert any(form.branch == branch and form.applies(facts) for form in FORMS)
        assert any(row.branch == branch and row.applies(facts) for row in SERVING)
    assert {form.method for form in FORMS} == {
        "lora",
        "qlora",
        "full",
        "continued_pretraining",
        "distillation",
        "none",
    }
    assert not any(NOTHING in start.branches for start in STARTS)


def test_every_topic_has_answers() -> None:
    assert {row.topic for row in ANSWERS} | {"managed"} == set(TOPICS)


def test_cited_rules_of_thumb_exist() -> None:
    cited = re.findall(r"rule of thumb (\d+)", " ".join(row.source for row in [*ROWS, *ANSWERS]))
    assert {int(number) for number in cited} <= set(THUMB)
