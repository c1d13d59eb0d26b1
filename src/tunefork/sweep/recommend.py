"""Which rank to take: the smallest that was measured within the margin of the best setting.

A smaller rank costs little less to train, and often nothing less to serve: so one that came out
behind by more than the margin is not taken because the difference might be chance, unlike a cheaper
method in a comparison. The reason says how sure the choice is, and which smaller rank more
evaluation examples or seeds might yet show to do.
"""

from collections.abc import Sequence

from tunefork.page.units import difference_text, gain_text
from tunefork.sweep.effects import rank_results
from tunefork.sweep.ranking import Judge, Run
from tunefork.sweep.result import RankResult, Recommendation


def recommend(runs: Sequence[Run], judge: Judge, chosen: str) -> Recommendation:
    """The smallest rank that is not behind the chosen one by more than the margin."""
    ranks = rank_results(runs, judge, chosen)
    reference = next(rank for rank in ranks if rank.gain is None)
    smaller = [rank for rank in ranks if rank.rank < reference.rank]
    taken = next((rank for rank in smaller if _loses_nothing(rank, judge)), reference)
    open_ones = [
        rank for rank in smaller if rank.rank < taken.rank and rank.is_equal == "not told apart"
    ]
    reason = _reason(taken, reference, judge) if taken is not reference else _of_best(smaller)
    for rank in open_ones[-1:]:  # the nearest
        assert rank.gain is not None
        reason += (
            f". Rank {rank.rank} was {gain_text(judge.metric, rank.gain)}, which could be chance: "
            "more evaluation examples or seeds would say whether it does"
        )
    return Recommendation(configuration=taken.configuration, rank=taken.rank, reason=reason)


def _loses_nothing(rank: RankResult, judge: Judge) -> bool:
    assert rank.gain is not None
    return rank.gain.value >= -judge.margin


def _reason(taken: RankResult, reference: RankResult, judge: Judge) -> str:
    assert taken.gain is not None
    margin = difference_text(judge.metric, judge.margin)
    sure = {
        "shown": f"shown to be within the margin of {margin}",
        "not told apart": f"measured within the margin of {margin}, which could be chance",
        "worse": f"behind, by less than the margin of {margin}",
        "better": "even better on the evaluation examples",
    }[taken.is_equal or "shown"]
    times = reference.trainable_params / taken.trainable_params
    return (
        f"rank {taken.rank} against rank {reference.rank}, which has the lowest validation loss: "
        f"{gain_text(judge.metric, taken.gain)}, {sure}; it has {times:,.3g} times fewer parameters"
    )


def _of_best(smaller: Sequence[RankResult]) -> str:
    if not smaller:
        return "lowest validation loss, and no smaller rank came to its end"
    return "lowest validation loss, and every smaller rank was behind by more than the margin"
