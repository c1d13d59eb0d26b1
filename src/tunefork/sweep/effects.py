"""How much rank mattered at all, whether the best learning rate moves with it, what to take.

A rank stands for its best setting, which the validation loss chooses among all learning rates (and
other knobs) tried with it; ranks are compared on the evaluation examples, paired. That asks what a
user asks: what would I lose with the smaller rank, tuned as well as I could?
"""

from collections.abc import Sequence

from tunefork.evaluate.statistics import FEWEST_EXAMPLES, Difference
from tunefork.page.units import rate_text
from tunefork.sweep.ranking import (
    Judge,
    Run,
    as_estimate,
    by_configuration,
    choose,
    finished,
    opposite,
    validation_loss,
)
from tunefork.sweep.result import (
    KnobEffect,
    RankEffect,
    RankResult,
    RateEffect,
    RateOfRank,
    Standing,
)
from tunefork.sweep.variants import value_text

_LEVEL = 0.05


def rank_results(runs: Sequence[Run], judge: Judge, chosen: str) -> list[RankResult]:
    """The best configuration of each rank that has one, ascending."""
    reference = finished(by_configuration(runs)[chosen])
    own_rank = reference[0].result.rank
    found = []
    for rank in sorted({run.result.rank for run in finished(runs)}):
        best = chosen if rank == own_rank else choose(_with_rank(runs, rank))
        assert best is not None
        its = finished(by_configuration(runs)[best])
        gain = None if best == chosen else judge.gain(its, reference)
        found.append(
            RankResult(
                rank=rank,
                configuration=best,
                learning_rate=its[0].result.learning_rate,
                value=judge.value(its),
                gain=None if gain is None else as_estimate(gain),
                is_equal=None if gain is None else _standing(gain, judge.margin),
                trainable_params=its[0].result.trainable_params,
            )
        )
    return found


def _standing(gain: Difference, margin: float) -> Standing:
    few = gain.num_examples < FEWEST_EXAMPLES
    if not few and -margin <= gain.low and gain.high <= margin:
        return "shown"
    if few or gain.low <= 0 <= gain.high:
        return "not told apart"
    return "better" if gain.value > 0 else "worse"


def rank_effect(runs: Sequence[Run], judge: Judge, chosen: str) -> RankEffect | None:
    """None where fewer than two ranks came to an end."""
    ranks = rank_results(runs, judge, chosen)
    if len(ranks) < 2:
        return None
    each = by_configuration(runs)
    order = sorted(
        ranks, key=lambda rank: validation_loss(finished(each[rank.configuration])) or 0.0
    )
    best, worst = order[0], order[-1]
    behind = judge.gain(finished(each[worst.configuration]), finished(each[best.configuration]))
    gain = opposite(behind)  # the same resamples as in `ranks`
    is_enough = gain.num_examples >= FEWEST_EXAMPLES
    return RankEffect(
        ranks=tuple(ranks),
        best=best.rank,
        worst=worst.rank,
        spread=as_estimate(gain),
        is_detected=is_enough and not gain.low <= 0 <= gain.high,
        is_within_margin=is_enough and -judge.margin <= gain.low and gain.high <= judge.margin,
    )


def rate_effect(runs: Sequence[Run], judge: Judge) -> RateEffect | None:
    """None where fewer than two ranks, or two rates, came to an end."""
    done = finished(runs)
    ranks = sorted({run.result.rank for run in done})
    rates = sorted({run.result.learning_rate for run in done})
    if len(ranks) < 2 or len(rates) < 2:
        return None
    best: dict[tuple[int, float], tuple[float, list[Run]]] = {}
    for own in by_configuration(done).values():
        loss, key = validation_loss(own), (own[0].result.rank, own[0].result.learning_rate)
        if loss is not None and (key not in best or loss < best[key][0]):
            best[key] = loss, own
    common = _common(best, ranks, rates)
    found, is_detected = [], False
    for rank in ranks:
        losses = {rate: best[rank, rate][0] for rate in rates if (rank, rate) in best}
        own_rate = min(losses, key=lambda rate: losses[rate])
        cost = None
        if own_rate != common and (rank, common) in best:
            gain = judge.gain(best[rank, own_rate][1], best[rank, common][1], "loss")
            by_chance = 2 * (1 - gain.share_above) * len(ranks)
            is_detected |= gain.num_examples >= FEWEST_EXAMPLES and by_chance < _LEVEL
            cost = as_estimate(gain)
        found.append(
            RateOfRank(
                rank=rank,
                losses={rate_text(rate): loss for rate, loss in losses.items()},
                best=own_rate,
                is_at_edge=own_rate in (rates[0], rates[-1]),
                cost_of_common=cost,
            )
        )
    return RateEffect(
        ranks=tuple(found),
        common=common,
        moves=len({rank.best for rank in found}) > 1,
        is_detected=is_detected,
    )


def _common(
    best: dict[tuple[int, float], tuple[float, list[Run]]],
    ranks: Sequence[int],
    rates: Sequence[float],
) -> float:
    """The rate that most ranks have a run with and, of those, with the lowest mean loss."""

    def key(rate: float) -> tuple[int, float]:
        losses = [best[rank, rate][0] for rank in ranks if (rank, rate) in best]
        return -len(losses), sum(losses) / max(1, len(losses))

    return min(rates, key=key)


def knob_effects(runs: Sequence[Run], judge: Judge) -> list[KnobEffect]:
    """Each knob's share of the variance, largest first; none where the grid is not whole."""
    if len(runs) < 3 or len(finished(runs)) < len(runs):
        return []
    values = [run.result.metrics[judge.metric].value for run in runs]
    mean = sum(values) / len(values)
    total = sum((value - mean) ** 2 for value in values)
    found = []
    for knob in runs[0].result.values:
        groups: dict[str, list[float]] = {}
        for run, value in zip(runs, values, strict=True):
            groups.setdefault(value_text(knob, run.result.values[knob]), []).append(value)
        means = {name: sum(own) / len(own) for name, own in groups.items()}
        between = sum(len(own) * (means[name] - mean) ** 2 for name, own in groups.items())
        found.append(
            KnobEffect(
                knob=knob,
                share=min(1.0, between / total) if total > 0 else 0.0,
                spread=max(means.values()) - min(means.values()),
            )
        )
    return sorted(found, key=lambda effect: -effect.share)


def _with_rank(runs: Sequence[Run], rank: int) -> list[Run]:
    return [run for run in runs if run.result.rank == rank]
