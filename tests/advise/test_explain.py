"""The common questions, with the situation's figures; and the questions on a terminal."""

from datetime import date

import pytest

from tests.advise.fake import resolved
from tunefork.advise.explain import TOPICS, Topic, explain
from tunefork.advise.questions import QUESTIONS, ask_all
from tunefork.advise.situation import Situation

SAID: dict[Topic, tuple[str, ...]] = {
    "rank": ("Start at rank 16", "0.52 % of 8B", "you have 2.40M"),
    "serving": ("Yes, one server can serve many adapters", "83.8 MB", "2,831"),
    "full": ("1.34B supervised tokens", "$5,000", "a point is worth: not said", "0.224"),
    "qlora": ("memory is the limit", "a GPU", "LoRA on 1 x rtx4090"),
    "duration": ("1,250 steps over 6.00M tokens x 2 epochs", "0.9 to 1.6 times"),
    "managed": ("Tinker", "about $4.80", "no new jobs from 2027-01-06", "data may leave"),
}


@pytest.mark.parametrize("topic", TOPICS)
def test_topics_are_answered_with_figures(topic: Topic) -> None:
    facts = resolved(model_params=8e9, task="chat", examples=10_000).facts
    said = explain(facts, topic, date(2026, 11, 25))
    text = "\n".join(reason.text for reason in said)
    for words in SAID[topic]:
        assert words in text
    assert 2 <= len(said) <= 7 and all(reason.source for reason in said)


def test_the_answer_is_for_the_situation_given() -> None:
    bound = resolved(model_params=70e9, gpus=["l40s"], task="chat", tenants=40).facts
    text = "\n".join(reason.text for reason in explain(bound, "qlora"))
    assert "On 1 x l40s (47.8 GB) LoRA does not fit, so this is that case." in text
    text = "\n".join(reason.text for reason in explain(bound, "serving"))
    assert "40 customers would be 40 models of 140.0 GB, 5.60 TB together" in text
    huge = resolved(model_params=8e9, task="code", tokens="10B", examples=10_000_000).facts
    assert "No standard rank holds" in explain(huge, "rank")[0].text


def test_questions_fill_a_situation() -> None:
    answers = iter(
        ["8B", "chatt", "chat", "", "50k", "", "", "", "no", "l40s", "", "", "maybe", "yes"]
    )
    said: list[str] = []
    given = ask_all(lambda text: next(answers), said.append)
    assert given == {
        "model": "8B",
        "task": "chat",
        "examples": "50k",
        "distribute": False,
        "gpus": "l40s",
        "data_may_leave": True,
    }
    assert "did you mean 'chat'" in said[1] and "data_may_leave" in said[2]
    assert {question.key for question in QUESTIONS} == set(Situation.model_fields) - {
        "model_params"
    }
