"""What stands in the way of an answer is said, and makes it less sure."""

from typing import Any

from tests.advise.fake import advised, resolved
from tunefork.recipe import Method


def test_gpus_at_hand_take_nothing_from_any_budget() -> None:
    given: dict[str, Any] = {"model_params": 8e9, "task": "chat", "examples": 9000}
    for budget in (0, 0.01, 1, 1000):
        at_hand = resolved(**given, gpus=["l40s"], budget_usd=budget).facts
        assert not at_hand.is_paid(Method.LORA) and not at_hand.is_over_budget(Method.LORA)
    over = [resolved(**given, budget_usd=b).facts.is_over_budget(Method.LORA) for b in (0, 0.01, 9)]
    assert over == [True, True, False]


def test_a_machine_at_hand_that_does_not_fit_is_rented_elsewhere() -> None:
    facts = resolved(model_params=70e9, gpus=["rtx4090"], examples=9000, budget_usd=0.01).facts
    assert facts.is_paid(Method.LORA) and facts.is_over_budget(Method.LORA)


def test_a_managed_service_is_named_where_it_is_recommended() -> None:
    advice = advised(model_params=8e9, task="chat", examples=500, data_may_leave=True)
    assert advice.where.recommended == "managed"
    assert "by a managed service: " in advice.text and " x " not in advice.text
    stays = advised(model_params=8e9, task="chat", examples=500, data_may_leave=False)
    assert stays.text.endswith(f", on {stays.where.own.machine}.")  # type: ignore[union-attr]


def test_every_place_that_is_too_slow_says_so() -> None:
    given: dict[str, Any] = {"model_params": 8e9, "task": "chat", "examples": 200_000}
    late = advised(**given, gpus=["l4"], deadline_hours=0.1).where
    assert late.own is not None and late.at_hand is not None and late.cheapest is not None
    for place in (late.own, late.at_hand, late.cheapest):
        assert "longer than the deadline of 0.1 h" in place.note
    in_time = advised(**given, deadline_hours=500).where.own
    assert in_time is not None and "longer" not in in_time.note


def test_an_answer_of_years_is_not_sure() -> None:
    given: dict[str, Any] = {"model_params": 70e9, "task": "domain_language"}
    sane = advised(**given, tokens="5B")
    absurd = advised(**given, tokens="5000B")
    assert (sane.confidence, absurd.confidence) != ("low", "low") and absurd.confidence == "low"
    assert "it would cost about $" in absurd.confidence_text
    assert any("no deadline was said" in text for text in absurd.warnings)


def test_cost_and_time_beyond_what_was_said_lower_the_confidence() -> None:
    given: dict[str, Any] = {"model_params": 8e9, "task": "classification", "tenants": 12}
    sure = advised(**given, examples=50_000)
    cost = sure.where.own.cost_usd  # type: ignore[union-attr]
    assert sure.confidence == "high"
    over = advised(**given, examples=50_000, budget_usd=round(0.5 * cost, 2))
    assert over.confidence == "medium" and "more than the budget" in over.confidence_text
    far = advised(**given, examples=50_000, budget_usd=round(0.02 * cost, 2))
    assert far.confidence == "low" and "it would cost about" in far.confidence_text
    late = advised(**given, examples=50_000, deadline_hours=0.001)
    assert late.confidence == "low" and "it would take" in late.confidence_text
