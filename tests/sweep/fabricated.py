"""Runs of a sweep that was never trained, with figures whose truth is known."""

from collections.abc import Callable, Sequence

import numpy as np

from tunefork.page.estimate import Estimate
from tunefork.sweep.ranking import Judge, Run
from tunefork.sweep.result import VariantResult

RATES = (1e-4, 1e-3)
JUDGE = Judge(metric="loss", margin=0.01, samples=400)


def runs(
    loss_of: Callable[[int, float], float],
    *,
    ranks: Sequence[int] = (1, 16),
    rates: Sequence[float] = RATES,
    seeds: Sequence[int] = (0, 1, 2),
    size: int = 300,
    noise: float = 0.01,
    dropped: Callable[[int, float], bool] = lambda rank, rate: False,
) -> list[Run]:
    """A grid whose mean loss is `loss_of(rank, rate)`; examples are hard alike for all."""
    hard = np.random.default_rng(5).normal(0.0, 0.3, size)
    found = []
    for rank in ranks:
        for rate in rates:
            for seed in seeds:
                rng = np.random.default_rng([rank, round(rate * 1e6), seed])
                losses = [
                    {
                        "loss_sum": 2 * (loss_of(rank, rate) + hard + rng.normal(0, noise, size)),
                        "tokens": np.full(size, 2),
                        "predicted": (rng.random(size) < 0.7).astype(int),
                        "gold": np.ones(size, dtype=int),
                    }
                    for _ in range(2)
                ]
                is_dropped = dropped(rank, rate)
                value = float(losses[0]["loss_sum"].sum() / losses[0]["tokens"].sum())
                result = VariantResult(
                    name=f"r{rank}-lr{rate:g}-s{seed}",
                    folder=f"variants/r{rank}-lr{rate:g}-s{seed}",
                    configuration=f"r{rank}-lr{rate:g}",
                    values={"rank": rank, "learning_rate": rate, "seed": seed},
                    rank=rank,
                    alpha=32.0,
                    learning_rate=rate,
                    seed=seed,
                    status="dropped" if is_dropped else "ok",
                    num_steps=10,
                    planned_steps=10,
                    tokens=100,
                    trainable_params=1000 * rank,
                    train_s=5.0 if is_dropped else 10.0 + rank,
                    artifact_bytes=4000 * rank,
                    validation_loss=float(losses[1]["loss_sum"].sum() / losses[1]["tokens"].sum()),
                    metrics={}
                    if is_dropped
                    else {"loss": Estimate(value=value, low=value - 0.1, high=value + 0.1)},
                )
                found.append(Run(result, None if is_dropped else losses[0]))
    return found
