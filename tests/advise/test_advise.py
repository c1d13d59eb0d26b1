"""The situations that the advice must get right, and sensible neighbours of them."""

from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from tests.advise.fake import advised, resolved
from tunefork.advise.advise import advise
from tunefork.advise.capacity import RANKS, capacity_tokens
from tunefork.recipe import Method
from tunefork.recipe_file import parse
from tunefork.yaml_text import read_yaml

SITUATIONS = Path(__file__).parents[2] / "examples" / "situations"
SIX = {
    "1_support_classification": "lora",
    "2_many_customers": "lora",
    "3_critical_accuracy": "full",
    "4_specialised_domain": "continued_pretraining",
    "5_brand_voice": "lora",
    "6_open_distilled_model": "distillation",
}
TODAY = date(2026, 11, 25)


@pytest.mark.parametrize("name", SIX)
def test_the_six_situations(name: str) -> None:
    advice = advised(file=SITUATIONS / f"{name}.yaml")
    assert advice.method == SIX[name]
    assert advice.confidence in ("high", "medium")
    assert advice.recipe is not None and advice.recipe_yaml is not None
    recipe = parse(advice.recipe)
    assert recipe.method == ("lora" if SIX[name] == "lora" else "full")
    assert parse(read_yaml(advice.recipe_yaml, "")) == recipe
    assert advice.where.own is not None and advice.where.own.fits
    assert all(reason.source for reason in advice.reasons)


def test_every_situation_file_is_tested() -> None:
    assert {file.stem for file in SITUATIONS.iterdir()} == set(SIX)


def test_many_customers_share_one_base() -> None:
    advice = advised(file=SITUATIONS / "2_many_customers.yaml")
    assert "one adapter a customer, chosen or loaded at request time" in advice.serving
    assert "40 adapters" in advice.serving
    single = advised(file=SITUATIONS / "2_many_customers.yaml", tenants=1)
    assert advice.where.own is not None and single.where.own is not None
    assert advice.where.own.cost_usd == pytest.approx(40 * single.where.own.cost_usd)
    assert advice.rank == 64, "behaviour is a deep change"


NEIGHBOURS: list[tuple[str, dict[str, Any], str]] = [
    ("facts alone", {"task": "facts", "examples": 120}, "none"),
    ("facts to be known, many", {"change": "facts", "task": "chat", "examples": 9000}, "none"),
    ("too few examples", {"task": "chat", "examples": 30}, "none"),
    ("no examples", {"task": "style", "examples": 0}, "none"),
    ("enough to try", {"task": "style", "examples": 300}, "lora"),
    ("70B on one 48 GB GPU", {"model_params": "70B", "gpus": ["l40s"]}, "qlora"),
    ("13B on a 24 GB GPU", {"model_params": "13B", "gpus": ["rtx4090"]}, "qlora"),
    ("8B on an 80 GB GPU", {"model_params": "8B", "gpus": ["h100"]}, "lora"),
    ("70B on eight of 80 GB", {"model_params": "70B", "gpus": ["h100"] * 8}, "lora"),
    ("style for others", {"task": "style", "examples": 5000, "distribute": True}, "lora"),
    ("two customers", {"tenants": 2, "examples": 5000, "change": "behaviour"}, "lora"),
    ("distillation with tenants", {"task": "distillation", "tenants": 3}, "distillation"),
    ("facts of many customers", {"task": "facts", "tenants": 30, "examples": 900}, "none"),
    ("too few of each customer", {"tenants": 30, "examples": 20}, "none"),
    ("distillation, many tenants", {"task": "distillation", "tenants": 30}, "distillation"),
    ("code, moderate", {"task": "code", "examples": 20_000}, "lora"),
    ("code, 10B tokens", {"task": "code", "examples": 10_000_000, "tokens": "10B"}, "full"),
    ("a little domain text", {"task": "domain_language", "tokens": "5M"}, "lora"),
    ("points worth little", {"examples": 9000, "quality_point_value_usd": 200}, "lora"),
    ("points worth a lot", {"examples": 9000, "quality_point_value_usd": 50_000}, "full"),
    (
        "points worth a lot, small budget",
        {"examples": 9000, "quality_point_value_usd": 50_000, "budget_usd": 1.2},
        "lora",
    ),
    ("no money, no GPU", {"examples": 9000, "budget_usd": 0}, "none"),
    ("no money, own GPU", {"examples": 9000, "budget_usd": 0, "gpus": ["l40s"]}, "lora"),
    (
        "critical, data stays, small GPU",
        {
            "examples": 9000,
            "quality_point_value_usd": 1e6,
            "gpus": ["l40s"],
            "data_may_leave": False,
        },
        "lora",
    ),
    (
        "critical, data may leave, small GPU",
        {"examples": 9000, "quality_point_value_usd": 1e6, "gpus": ["l40s"]},
        "full",
    ),
]


@pytest.mark.parametrize(
    ("given", "method"), [n[1:] for n in NEIGHBOURS], ids=[n[0] for n in NEIGHBOURS]
)
def test_neighbours(given: dict[str, Any], method: str) -> None:
    advice = advised(**{"model_params": 8e9, "task": "chat", **given})
    assert advice.method == method, advice.reasons
    assert (advice.recipe is None) == (method == "none")
    assert (advice.plan is None) == (method == "none")
    assert (advice.rank is None) == (method not in ("lora", "qlora"))


def test_few_but_long_documents_are_counted_by_their_tokens() -> None:
    advice = advised(model_params=8e9, task="domain_language", examples=20, tokens="5B")
    assert advice.method == "continued_pretraining"
    assert advice.recipe is not None and advice.recipe["data"]["format"] == "text"


def test_rank_follows_capacity() -> None:
    ranks = []
    for millions in (1, 50, 100, 200, 400, 800, 1300, 1500):
        tokens = round(millions * 1e6 / 0.5)  # of code, half is learnt
        advice = advised(model_params=8e9, task="code", examples=tokens // 700, tokens=tokens)
        ranks.append(advice.rank)
    assert ranks == [16, 16, 32, 64, 128, 256, 256, None]


def test_capacity_is_two_bits_a_parameter() -> None:
    planner = resolved(model_params=8e9).facts.estimates.planner
    assert capacity_tokens(planner, 16) == 2 * planner.lora_params(16)
    assert list(RANKS) == sorted(RANKS)


def test_learning_rates() -> None:
    long = advised(model_params=8e9, task="chat", examples=20_000)
    short = advised(model_params=8e9, task="chat", examples=100)
    full = advised(model_params=8e9, task="distillation", examples=20_000)
    large = advised(model_params=70e9, task="chat", examples=20_000)
    assert long.learning_rate == 2e-4 and short.learning_rate == pytest.approx(3e-4)
    assert (full.learning_rate, large.learning_rate) == (2e-5, 1e-4)
    assert long.alpha == 32 and long.targets == "all-linear"
    assert short.batch_size == 4 and long.batch_size == 16


def test_what_is_missing_is_named_and_lowers_confidence() -> None:
    nothing = advised()
    assert {m.key for m in nothing.missing} >= {"model_params", "task", "examples", "gpus"}
    assert nothing.confidence == "low"
    assert any("8B" in text for text in nothing.assumptions)
    assert advised(model_params=8e9, task="chat").confidence == "medium"
    assert "model_params" not in {m.key for m in advised(model="8B").missing}


def test_what_speaks_against_the_answer_is_said() -> None:
    small = advised(model_params=135e6, task="classification", examples=5000)
    assert small.method == "lora" and [r.rule for r in small.against] == ["small-model"]
    clear = advised(model_params=8e9, task="classification", examples=5000)
    assert clear.against == []


def test_borders_name_figures_of_the_situation() -> None:
    advice = advised(model_params=8e9, task="classification", examples=50_000)
    borders = "\n".join(advice.would_change)
    assert "1.34B supervised tokens (here 500.0k)" in borders
    assert "$5,000 (here not said)" in borders
    assert "no-money" not in {reason.rule for reason in advice.reasons}
    assert "budget" not in borders


def test_budget_and_deadline_are_compared_with_the_plan() -> None:
    over = advised(model_params=70e9, task="chat", examples=500_000, budget_usd=5)
    assert any("more than the budget of $5" in text for text in over.warnings)
    late = advised(model_params=70e9, task="chat", examples=500_000, deadline_hours=0.1)
    assert any("longer than 0.1 h" in text for text in late.warnings)
    in_time = advised(model_params=8e9, task="chat", examples=500_000, deadline_hours=12)
    assert in_time.where.own is not None and in_time.where.own.seconds < 12 * 3600
    assert in_time.warnings == []


def test_money_can_speak_for_qlora() -> None:
    chat: dict[str, Any] = {"model_params": 32e9, "task": "chat", "examples": 10_000}
    assert advised(**chat).method == "lora"
    tight = advised(**chat, budget_usd=4.2)
    assert tight.method == "qlora" and tight.warnings == []
    assert advised(**chat, budget_usd=5).method == "lora"


def test_weights_that_fit_nothing_leave_the_adapter() -> None:
    assert advised(model_params=400e9, quality_point_value_usd=1e3, task="chat").method == "lora"


def test_a_machine_that_does_not_do_is_said() -> None:
    advice = advised(model_params=70e9, task="chat", examples=5000, gpus=["rtx4090"])
    assert advice.method == "qlora"
    assert advice.where.at_hand is not None and not advice.where.at_hand.fits
    assert advice.where.own is not None and advice.where.own.machine == "1 x l40s"
    assert any("does not fit 1 x rtx4090" in text for text in advice.warnings)


def test_a_recipe_file_gives_model_and_data(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    file = tmp_path / "mine.yaml"
    file.write_text("model: owner/Some-3B\ndata: {train: rows.jsonl, max_length: 512}\n")
    advice = advised(model=str(file), task="chat", examples=3000)
    assert advice.recipe is not None
    recipe = parse(advice.recipe)
    assert recipe.model.id == "owner/Some-3B"
    assert recipe.data.train == str(tmp_path / "rows.jsonl") and recipe.data.max_length == 512
    assert advice.method == "lora" and recipe.lora.rank == 16


def test_the_recipe_compares_what_fits_at_the_machines_price() -> None:
    advice = advised(model_params=8e9, task="chat", examples=9000, gpus=["l40s"])
    assert advice.recipe is not None
    grid = [6.7e-5, 2e-4, 6e-4]
    assert advice.recipe["compare"] == {
        "methods": ["lora", "qlora"],
        "usd_per_hour": 0.79,
        "learning_rates": {"lora": grid, "qlora": grid},
    }
    assert advice.text == "LoRA, rank 16, on 1 x l40s."


@pytest.mark.parametrize(
    ("params", "examples"), [(8e9, 9000), (8e9, 100), (70e9, 9000)], ids=["usual", "short", "large"]
)
def test_train_takes_the_advised_rate_and_compare_searches_round_it(
    params: float, examples: int
) -> None:
    advice = advised(model_params=params, task="chat", examples=examples)
    assert advice.recipe is not None and "learning_rate" not in advice.recipe["train"]
    recipe = parse(advice.recipe)
    assert recipe.learning_rate(recipe.method) == pytest.approx(advice.learning_rate)


def test_a_recipes_own_grids_stay(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "model: owner/Some-3B\ndata: {train: rows.jsonl}\ntrain: {learning_rate: 1.0e-3}\n"
        "compare: {search_trials: 4, learning_rates: {lora: [1.0e-4, 2.0e-4, 4.0e-4, 8.0e-4], "
        "qlora: [1.0e-4, 2.0e-4, 3.0e-4, 4.0e-4], full: [1.0e-6, 2.0e-6, 3.0e-6, 4.0e-6]}}\n"
    )
    advice = advised(model=str(file), task="chat", examples=3000)
    assert advice.recipe is not None
    recipe = parse(advice.recipe)
    assert recipe.compare.learning_rates[Method.LORA] == (1e-4, 2e-4, 4e-4, 8e-4)
    assert recipe.train.learning_rate is None


def test_several_gpus_are_not_promised() -> None:
    advice = advised(model_params=70e9, task="chat", gpus=["h100"] * 4)
    assert advice.method == "lora"
    assert any("tunefork train runs on one GPU so far" in text for text in advice.warnings)


def test_where_honours_that_data_may_not_leave() -> None:
    given: dict[str, Any] = {"model_params": 8e9, "task": "chat", "examples": 200_000}
    stays = advise(resolved(**given, data_may_leave=False), TODAY).where
    assert stays.recommended == "own"
    assert {m.why_not for m in stays.managed} == {"the data may not leave"}
    leaves = advise(resolved(**given, data_may_leave=True), TODAY).where
    costs = {m.id: m.cost_usd for m in leaves.managed if m.is_usable}
    assert costs == {"tinker-8b": pytest.approx(48.0), "fireworks-16b": pytest.approx(60.0)}


def test_services_that_have_closed_are_said() -> None:
    facts = resolved(model_params=8e9, task="chat", examples=2000, data_may_leave=True)
    place = advise(facts, date(2027, 2, 1)).where
    closed = {m.id: m.why_not for m in place.managed if not m.is_usable}
    assert closed["openai-small"] == "takes no new jobs since 2027-01-06"


def test_full_fine_tuning_is_not_sold_at_the_adapters_price() -> None:
    place = advised(model_params=8e9, task="distillation", data_may_leave=True).where
    assert place.recommended == "own" and not any(m.is_usable for m in place.managed)


def test_a_machine_at_hand_that_is_too_slow_is_left_where_the_data_may_leave() -> None:
    given: dict[str, Any] = {
        "model_params": 8e9,
        "task": "chat",
        "examples": 200_000,
        "gpus": ["l4"],
        "deadline_hours": 20,
    }
    leaves = advised(**given)
    assert leaves.where.own is not None and not leaves.where.own.is_at_hand
    assert leaves.where.own.seconds < 20 * 3600 and leaves.warnings == []
    stays = advised(**given, data_may_leave=False)
    assert stays.where.own is not None and stays.where.own.is_at_hand
    assert any("longer than 20 h" in text for text in stays.warnings)


def test_smaller_micro_batches_are_taken_where_they_make_it_fit() -> None:
    given: dict[str, Any] = {"task": "classification", "examples": 9000, "gpus": ["rtx4090"]}
    whole = advised(model_params=9.0e9, **given)
    smaller = advised(model_params=10.8e9, **given)
    none = advised(model_params=12e9, **given)
    assert (whole.method, smaller.method, none.method) == ("lora", "lora", "qlora")
    assert whole.recipe is not None and smaller.recipe is not None
    tokens = smaller.recipe["train"]["micro_batch_tokens"]
    assert whole.recipe["train"]["micro_batch_tokens"] == 4096 and 1024 <= tokens < 4096
    assert smaller.where.own is not None and smaller.where.own.is_at_hand
    assert f"with train.micro_batch_tokens: {tokens}" in smaller.where.own.note


def test_a_shorter_row_is_taken_where_only_that_fits() -> None:
    facts = resolved(model_params=8e9, task="chat", examples=9000, gpus=["l4"]).facts
    here = facts.estimates.here(Method.LORA)
    assert here is not None
    for longest, shorter in ((778, 768), (719, None), (None, None), (5000, 2048)):
        update = {"fits": False, "largest_micro_batch_tokens": None, "largest_length": longest}
        changed = here.figures.model_copy(update=update)
        there = replace(here, figures=changed)
        assert there.shorter == shorter and there.fits == (shorter is not None)
