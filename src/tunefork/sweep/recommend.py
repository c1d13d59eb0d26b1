"""Which rank to take: the smallest that loses nothing that matters.

As a comparison chooses among its methods (`compare/verdict.py`): those that cannot be told from the
best, or are behind it by less than the margin, are equal for the purpose, and the cheapest is
taken. The reason says which of the two it was: shown to be equal is more than not told apart.
"""

from collections.abc import Sequence

from tunefork.page.units import count_text, difference_text, gain_text
from tunefork.sweep.effects import rank_results
from tunefork.sweep.ranking import Judge, Run
from tunefork.sweep.result import Recommendation


def recommend(runs: Sequence[Run], judge: Judge, chosen: str) -> Recommendation:
    """The smallest rank that is not worse than the chosen one by more than the margin."""
    ranks = rank_results(runs, judge, chosen)
    reference = next(rank for rank in ranks if rank.gain is None)
    metric = judge.metric
    margin = difference_text(metric, judge.margin)
    for rank in ranks:
        if rank.gain is None or rank.rank > reference.rank:
            break
        # Behind by less than the margin as measured, or not told apart at all.
        if rank.is_equal == "worse" and rank.gain.value < -judge.margin:
            continue
        params = reference.trainable_params / rank.trainable_params
        beyond = gain_text(metric, rank.gain)
        sure = {
            "shown": f"shown to be within the margin of {margin}",
            "not told apart": "not told apart; more evaluation examples or seeds would say more",
            "worse": f"behind by less than the margin of {margin}",
            "better": "even better on the evaluation examples",
        }[rank.is_equal or "shown"]
        return Recommendation(
            configuration=rank.configuration,
            rank=rank.rank,
            reason=(
                f"rank {rank.rank} against rank {reference.rank}, which has the lowest validation "
                f"loss: {beyond}, {sure}; it has {params:,.3g} times fewer parameters"
            ),
        )
    others = len(ranks) > 1
    params_text = count_text(reference.trainable_params)
    why = "every smaller rank is worse by more than the margin" if others else "no other rank ended"
    if others and reference.rank == ranks[0].rank:
        why = "and it is the smallest rank"
    return Recommendation(
        configuration=chosen,
        rank=reference.rank,
        reason=f"lowest validation loss ({params_text} parameters); {why}",
    )
