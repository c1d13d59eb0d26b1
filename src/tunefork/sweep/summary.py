"""What a sweep found, in sentences: the same in the terminal, the page and the Markdown."""

from collections.abc import Iterator

from tunefork.evaluate.intervals import FEWEST_SEEDS
from tunefork.page.units import (
    METRIC_NAMES,
    count_text,
    difference_text,
    gain_text,
    metric_text,
    rate_text,
    seconds_text,
    sentence,
)
from tunefork.recipe import Metric
from tunefork.sweep.result import RankEffect, RateEffect, SweepResult


def headline(result: SweepResult) -> str:
    """The recommendation in a line."""
    if result.recommended is None:
        return "No variant came to its end"
    return f"Recommended: rank {result.recommended.rank} ({result.recommended.configuration})"


def findings(result: SweepResult) -> list[str]:
    """The recommendation's reason, whether rank mattered, whether the best rate moved."""
    found = []
    if result.recommended is not None:
        found.append(sentence(result.recommended.reason) + ".")
    if result.rank_effect is not None:
        found.append(rank_sentence(result.rank_effect, result.primary_metric, result.margin))
    if result.rate_effect is not None:
        found.append(rate_sentence(result.rate_effect))
    if result.knobs:
        shares = ", ".join(
            f"{knob.knob} {100 * knob.share:.0f} %" for knob in result.knobs if knob.share >= 0.005
        )
        name = METRIC_NAMES[result.primary_metric]
        found.append(f"Of the variance of {name} between all variants, by knob: {shares}.")
    return found


def rank_sentence(effect: RankEffect, metric: Metric, margin: float) -> str:
    """How much rank mattered at all."""
    name = METRIC_NAMES[metric]
    said = (
        f"each at its own best setting, rank {effect.best} (lowest validation loss) against rank "
        f"{effect.worst} (highest): {gain_text(metric, effect.spread)} of {name}, above 0 is better"
    )
    if effect.is_within_margin:
        verdict = f"Rank did not matter within the margin of {difference_text(metric, margin)}"
    elif not effect.is_detected:
        verdict = "No effect of rank was found that chance could not explain"
    elif abs(effect.spread.value) <= margin:
        verdict = f"Rank mattered less than the margin of {difference_text(metric, margin)}"
    else:
        verdict = "Rank mattered"
    return f"{verdict}: {said}."


def rate_sentence(effect: RateEffect) -> str:
    """Whether the best learning rate moves with rank."""
    best = ", ".join(f"{rate_text(rank.best)} at rank {rank.rank}" for rank in effect.ranks)
    common = rate_text(effect.common)
    if not effect.moves:
        said = f"The best learning rate did not move with rank: {common} for all"
    else:
        verdict = "moved with rank" if effect.is_detected else "did not clearly move with rank"
        said = f"The best learning rate {verdict}: {best}"
        costs = [
            f"{gain_text('loss', rank.cost_of_common)} at rank {rank.rank}"
            for rank in effect.ranks
            if rank.cost_of_common is not None
        ]
        if costs:
            said += (
                f". Taking {common} for all would cost, in loss on the evaluation examples (below "
                f"0: it would gain): {'; '.join(costs)}"
            )
    at_edge = [str(rank.rank) for rank in effect.ranks if rank.is_at_edge]
    if at_edge:
        said += f". At rank {', '.join(at_edge)} it is the lowest or highest tried: widen the list"
    return said + "."


def notes(result: SweepResult) -> Iterator[str]:
    """How the figures came about, and what they do not say."""
    size = f"{result.validation_examples:,}"
    yield (
        f"What was dropped, the learning rate of each rank and the chosen configuration were "
        f"chosen by the loss on {size} validation examples, held back from training; the "
        f"{result.eval_examples:,} evaluation examples judge, and chose nothing."
    )
    seeds = {len(each.seeds) for each in result.configurations if each.status == "ok"}
    if seeds and max(seeds) < FEWEST_SEEDS:
        yield (
            f"Intervals are over evaluation examples, paired; training's variance takes "
            f"{FEWEST_SEEDS} seeds to measure and is left out."
        )
    elif seeds:
        yield "Intervals are over evaluation examples and training seeds, paired by both."
    if any(each.status == "dropped" for each in result.configurations):
        yield (
            "Dropped configurations were judged in the middle of their schedules; how far behind "
            "each was, with its interval, is in sweep.json."
        )
    yield (
        f"Up to {result.together} variants trained at one time; a variant's time is its share, by "
        "tokens, of the passes it took part in. All together took "
        f"{seconds_text(result.wall_s)}{_rate(result)}."
    )
    yield (
        "Time and memory hold for this machine, quality for this model's size and data: what a "
        "small model shows of rank is not offered for a larger one."
    )


def base_text(result: SweepResult) -> str:
    """The untouched base's figure, or nothing."""
    base = result.base_metrics.get(result.primary_metric)
    return "" if base is None else metric_text(result.primary_metric, base.value)


def _rate(result: SweepResult) -> str:
    if result.tokens_per_s is None:
        return ""
    return f", {count_text(result.tokens_per_s)} tokens/s"
