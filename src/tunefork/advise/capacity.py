"""How much a delta can hold, and hence which rank: LoRA Without Regret, "how much capacity".

A trained parameter stores about 2 bits and a supervised token brings about 1 bit, at most (Schulman
et al. 2025, https://thinkingmachines.ai/blog/lora/). A delta that holds less than the data brings
falls behind full fine-tuning. Repeating the data brings nothing new, so epochs do not count.
"""

from tunefork.advise.planner import Planner

RANKS = (8, 16, 32, 64, 128, 256)
"""The standard ranks."""
FIRST_RANK = 16
"""Where to start (mission.md's rule 13)."""
DEEP_RANK = 64
"""Where to start for a deeper change (mission.md's rule 13: 64 to 128)."""
BITS_PER_PARAMETER = 2.0
BITS_PER_TOKEN = 1.0


def capacity_tokens(planner: Planner, rank: int) -> float:
    """Supervised tokens that a delta of `rank` on all linear layers can hold."""
    return planner.lora_params(rank) * BITS_PER_PARAMETER / BITS_PER_TOKEN


def rank_needed(planner: Planner, supervised_tokens: int) -> int | None:
    """The lowest standard rank that holds the data; None where the highest does not."""
    holding = (rank for rank in RANKS if capacity_tokens(planner, rank) >= supervised_tokens)
    return next(holding, None)


def rank_for(needed: int | None, *, is_deep: bool) -> int:
    """The rank to start from: 16, or 64 for a deep change, or what the data needs."""
    return max(DEEP_RANK if is_deep else FIRST_RANK, needed or RANKS[-1])
