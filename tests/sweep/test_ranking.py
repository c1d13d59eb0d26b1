"""Who is best, by how much, and whether rank mattered: on runs whose truth is known."""

import pytest

from tests.sweep.fabricated import JUDGE, RATES, runs
from tunefork.recipe import HalvingSection
from tunefork.sweep.effects import knob_effects, rank_effect, rate_effect
from tunefork.sweep.halving import decide, rung_steps
from tunefork.sweep.ranking import Run, choose, configurations
from tunefork.sweep.recommend import recommend
from tunefork.sweep.summary import rank_sentence, rate_sentence


def _flat(rank: int, rate: float) -> float:
    """Rank does not matter; the higher rate is better."""
    return 1.0 if rate == RATES[1] else 1.2


def _steep(rank: int, rate: float) -> float:
    """Rank 1 is worse, and is best at the higher rate, rank 16 at the lower."""
    if rank == 1:
        return 1.3 if rate == RATES[1] else 1.4
    return 1.0 if rate == RATES[0] else 1.1


def test_configurations_are_ranked_and_compared_with_the_chosen_one() -> None:
    found = runs(_steep)
    chosen = choose(found)
    assert chosen == "r16-lr0.0001"
    ranked = configurations(found, JUDGE, chosen)
    assert [each.name for each in ranked] == [
        "r16-lr0.0001",
        "r16-lr0.001",
        "r1-lr0.001",
        "r1-lr0.0001",
    ]
    assert ranked[0].gain is None
    assert ranked[1].gain is not None  # worse, hence below 0
    assert ranked[1].gain.value == pytest.approx(-0.1, abs=0.01)
    assert ranked[1].gain.low < ranked[1].gain.value < ranked[1].gain.high < 0
    assert ranked[0].seeds == (0, 1, 2)
    assert {each.name for each in ranked if each.is_pareto} == {"r16-lr0.0001", "r1-lr0.001"}


def test_rank_that_mattered_is_told_from_rank_that_did_not() -> None:
    steep, flat = runs(_steep), runs(_flat)
    effect = rank_effect(steep, JUDGE, choose(steep) or "")
    assert effect is not None and effect.is_detected and not effect.is_within_margin
    assert (effect.best, effect.worst) == (16, 1)
    assert effect.spread.value == pytest.approx(0.3, abs=0.01)
    assert [rank.learning_rate for rank in effect.ranks] == [RATES[1], RATES[0]]
    assert rank_sentence(effect, "loss", 0.01).startswith("Rank mattered: ")
    none = rank_effect(flat, JUDGE, choose(flat) or "")
    assert none is not None and none.is_within_margin
    assert none.ranks[0].is_equal == "shown" or none.ranks[1].is_equal == "shown"
    assert rank_sentence(none, "loss", 0.01).startswith("Rank did not matter within the margin")


def test_whether_the_best_rate_moves_with_rank() -> None:
    moved = rate_effect(runs(_steep), JUDGE)
    assert moved is not None and moved.moves and moved.is_detected
    assert [rank.best for rank in moved.ranks] == [RATES[1], RATES[0]]
    costs = [rank.cost_of_common for rank in moved.ranks if rank.cost_of_common is not None]
    assert len(costs) == 1 and costs[0].value == pytest.approx(0.1, abs=0.01)
    assert "moved with rank: 1e-3 at rank 1, 1e-4 at rank 16" in rate_sentence(moved)
    same = rate_effect(runs(_flat), JUDGE)
    assert same is not None and not same.moves and same.common == RATES[1]
    assert all(rank.is_at_edge for rank in same.ranks)
    assert "widen the list" in rate_sentence(same)


def test_the_smallest_rank_that_is_not_worse_is_recommended() -> None:
    for loss_of, rank in ((_flat, 1), (_steep, 16)):
        found = runs(loss_of)
        assert recommend(found, JUDGE, choose(found) or "").rank == rank


def test_a_rank_that_was_far_behind_is_not_taken_because_that_could_be_chance() -> None:
    found = runs(
        lambda rank, rate: 1.5 - rank / 1000 + rate,
        ranks=(1, 200, 300),
        seeds=(0,),
        size=30,
        noise=0.5,
    )
    chosen = choose(found) or ""
    effect = rank_effect(found, JUDGE, chosen)
    assert effect is not None
    behind = [r for r in effect.ranks if r.gain is not None and r.gain.value < -JUDGE.margin]
    assert "not told apart" in [r.is_equal for r in behind]
    advice = recommend(found, JUDGE, chosen)
    assert advice.rank not in {r.rank for r in behind}
    assert "which could be chance: more evaluation examples or seeds" in advice.reason


def test_the_spread_is_the_gain_that_the_table_shows() -> None:
    found = runs(_steep)
    effect = rank_effect(found, JUDGE, choose(found) or "")
    assert effect is not None
    gain = effect.ranks[0].gain
    assert gain is not None
    assert (effect.spread.low, effect.spread.high) == (-gain.high, -gain.low)


def test_knobs_share_the_variance() -> None:
    effects = {effect.knob: effect for effect in knob_effects(runs(_flat), JUDGE)}
    assert effects["learning_rate"].share > 0.99 and effects["rank"].share < 0.01
    assert effects["learning_rate"].spread == pytest.approx(0.2, abs=0.01)
    assert knob_effects(runs(_flat, dropped=lambda rank, rate: rate == RATES[0]), JUDGE) == []


def test_a_rank_whose_best_setting_was_dropped_is_judged_by_what_is_left() -> None:
    found = runs(_steep, dropped=lambda rank, rate: rate == RATES[0])
    chosen = choose(found)
    assert chosen == "r16-lr0.001"
    ranked = configurations(found, JUDGE, chosen)
    assert [each.status for each in ranked] == ["ok", "ok", "dropped", "dropped"]
    assert ranked[2].gain is None and not ranked[2].metrics
    assert rate_effect(found, JUDGE) is None


def test_a_seed_that_failed_leaves_its_pair_out() -> None:
    found = [
        Run(run.result.model_copy(update={"status": "failed", "metrics": {}}), None)
        if run.result.name == "r1-lr0.001-s1"
        else run
        for run in runs(_steep)
    ]
    ranked = configurations(found, JUDGE, choose(found))
    [third] = [each for each in ranked if each.name == "r1-lr0.001"]
    assert third.seeds == (0, 2) and third.gain is not None


def test_rungs_lie_within_the_run() -> None:
    assert rung_steps(None, 100) == []
    assert rung_steps(HalvingSection(), 100) == [25, 50]
    assert rung_steps(HalvingSection(keep=0.5, rungs=3), 8) == [1, 2, 4]
    assert rung_steps(HalvingSection(rungs=4), 2) == [1]
    assert rung_steps(HalvingSection(), 1) == []


def test_a_rung_keeps_the_better_half_of_each_group() -> None:
    found = runs(_steep)
    columns = {
        name: [
            run.columns
            for run in found
            if run.result.configuration == name and run.columns is not None
        ]
        for name in dict.fromkeys(run.result.configuration for run in found)
    }
    of_rank = {run.result.configuration: run.result.rank for run in found}
    kept = {r.configuration for r in decide(columns, of_rank, 0.5) if r.is_kept}
    assert kept == {"r1-lr0.001", "r16-lr0.0001"}
    everyone = dict.fromkeys(columns, 0)
    ranked = decide(columns, everyone, 0.5)
    assert [r.configuration for r in ranked if r.is_kept] == ["r16-lr0.0001", "r16-lr0.001"]
    last = ranked[-1]
    assert (last.place, last.of, last.is_kept) == (4, 4, False)
    assert last.behind is not None and last.behind.low > 0
    assert last.behind.value == pytest.approx(0.4, abs=0.01)
    columns["r16-lr0.0001"] = []  # diverged
    ranked = decide(columns, everyone, 0.5)
    assert ranked[0].configuration == "r16-lr0.001"
    assert ranked[-1].configuration == "r16-lr0.0001" and ranked[-1].loss is None
