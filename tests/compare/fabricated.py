"""Comparisons with made-up but plausible figures: what a small demo on a CPU would give."""

from collections.abc import Mapping
from math import exp, sin
from statistics import NormalDist

from tunefork.compare.comparison import (
    Arm,
    Comparison,
    Data,
    Device,
    Forgetting,
    LossPoint,
    MethodResult,
    Model,
    PairedDifference,
    SearchTrial,
    Trained,
)
from tunefork.compare.verdict import decide
from tunefork.evaluate.statistics import METRICS
from tunefork.page.estimate import Estimate
from tunefork.recipe import Metric

ACCURACIES: dict[Arm, float] = {"base": 0.248, "lora": 0.872, "qlora": 0.864, "full": 0.88}
MODEL = Model(id="smollm2-135m-instruct", parameters=134_515_008)
DATA = Data(
    train_examples=960,
    eval_examples=400,
    labels=8,
    majority_share=0.142,
    supervised_share=0.034,
    tokens=118_400,
)


def fabricate(
    accuracies: Mapping[Arm, float] = ACCURACIES,
    *,
    seeds: tuple[int, ...] = (0,),
    margin: float = 0.01,
    usd_per_hour: float | None = 0.10,
    failed: Mapping[Arm, str] | None = None,
    half_width: float = 0.021,
    has_labels: bool = True,
    has_forgetting: bool = True,
    model_id: str = MODEL.id,
    examples: int | None = None,
    paired_seeds: tuple[int, ...] | None = None,
) -> Comparison:
    """A comparison whose arms have these `accuracies`; every paired interval is `half_width`.

    Differences are of `examples`, and of methods paired by `paired_seeds` (default: by `seeds`).

    Without labels the accuracies stand for exp(-loss) and the only metrics are loss and perplexity.
    """
    failed = failed or {}
    metric: Metric = "accuracy" if has_labels else "loss"
    metrics: tuple[Metric, ...] = ("loss", "perplexity")
    if has_labels:
        metrics += ("accuracy", "macro_f1")
    values = {arm: figures(accuracy) for arm, accuracy in accuracies.items()}
    methods: dict[Arm, MethodResult] = {}
    for arm in accuracies:
        if arm in failed:
            methods[arm] = MethodResult(status="failed", error=failed[arm])
        else:
            methods[arm] = _method(arm, values[arm], metrics, seeds, usd_per_hour, has_forgetting)
    finished = [arm for arm in methods if arm not in failed]
    paired = tuple(
        pair(
            a,
            b,
            name,
            values[a][name] - values[b][name],
            half_width * _scale(name),
            examples=examples,
            seeds=() if b == "base" else seeds if paired_seeds is None else paired_seeds,
        )
        for name in metrics
        for i, b in enumerate(finished)
        for a in finished[i + 1 :]
    )
    data = DATA
    if not has_labels:
        data = data.model_copy(update={"labels": None, "majority_share": None})
    model = MODEL.model_copy(update={"id": model_id})
    return Comparison(
        tunefork_version="0.1.0",
        created="2026-11-24T14:02:11Z",
        device=Device(
            name="AMD EPYC 9R14",
            threads=2,
            memory_bytes=16_400_000_000,
            torch="2.13.0+cpu",
            transformers="5.24.0",
        ),
        model=model,
        data=data,
        primary_metric=metric,
        margin=margin,
        usd_per_hour=usd_per_hour,
        seeds=seeds,
        methods=methods,
        paired=paired,
        verdict=decide(methods, paired, metric=metric, margin=margin, model=model, data=data),
        recipe={
            "model": {"id": model_id},
            "data": {"train": "requests.jsonl"},
            "compare": {"seeds": list(seeds), "search_share": 0.25, "validation_share": 0.1},
        },
    )


def figures(accuracy: float) -> dict[Metric, float]:
    """Every metric of an arm with this accuracy."""
    loss = 2.2 * (1 - accuracy) + 0.08
    return {
        "accuracy": accuracy,
        "macro_f1": accuracy - 0.011,
        "loss": loss,
        "perplexity": 2.718281828**loss,
    }


def pair(
    a: Arm,
    b: Arm,
    metric: Metric,
    difference: float,
    half_width: float,
    *,
    examples: int | None = None,
    seeds: tuple[int, ...] = (),
) -> PairedDifference:
    """A difference with a symmetric interval; the share above follows a normal distribution."""
    share = NormalDist(0, 1).cdf(difference / (half_width / 1.96))
    return PairedDifference(
        a=a,
        b=b,
        metric=metric,
        difference=difference,
        low=difference - half_width,
        high=difference + half_width,
        share_above=share,
        examples=examples,
        seeds=seeds,
    )


def _scale(metric: Metric) -> float:
    return 1.0 if METRICS[metric].higher_is_better else 2.2


def _method(
    arm: Arm,
    values: Mapping[Metric, float],
    metrics: tuple[Metric, ...],
    seeds: tuple[int, ...],
    usd_per_hour: float | None,
    has_forgetting: bool,
) -> MethodResult:
    estimates = {
        name: Estimate(
            value=values[name],
            low=values[name] - 0.03 * _scale(name),
            high=min(values[name] + 0.03 * _scale(name), 1.0 if name == "accuracy" else 99.0),
        )
        for name in metrics
    }
    if arm == "base":
        return MethodResult(
            status="ok",
            trainable_share=0.0,
            trainable_params=0,
            total_params=MODEL.parameters,
            metrics=estimates,
            forgetting=Forgetting(before=3.412, after=3.412, change=None)
            if has_forgetting
            else None,
        )
    trained, memory, seconds, artifact, change = _COSTS[arm]
    full = arm == "full"
    return MethodResult(
        status="ok",
        trainable_share=1.0 if full else trained / (MODEL.parameters + trained),
        trainable_params=trained,
        total_params=MODEL.parameters + (0 if full else trained),
        peak_memory_bytes=memory,
        memory_kind="resident",
        train_s=seconds,
        tokens_per_s=118_400 / seconds,
        trained_tokens=118_400,
        artifact_bytes=artifact,
        artifact=f"{arm}/seed-0/{'model' if full else 'adapter'}",
        learning_rate=_GRIDS[arm][1],
        metrics=estimates,
        forgetting=Forgetting(
            before=3.412,
            after=3.412 + change,
            change=Estimate(value=change, low=change - 0.012, high=change + 0.014),
        )
        if has_forgetting
        else None,
        cost_usd=None if usd_per_hour is None else usd_per_hour * 1.9 * seconds / 3600,
        search_s=0.9 * seconds,
        search=_search(arm),
        seeds=seeds,
        loss_curve=_curve(arm, values["loss"]),
    )


_COSTS: dict[Trained, tuple[int, int, float, int, float]] = {
    "lora": (4_884_480, 2_910_000_000, 118.4, 19_600_000, 0.041),
    "qlora": (4_884_480, 2_640_000_000, 171.0, 19_600_000, 0.038),
    "full": (134_515_008, 4_350_000_000, 139.2, 269_100_000, 0.163),
}
"""Trained parameters, peak memory, seconds, artefact, forgetting."""
_GRIDS: dict[Trained, tuple[float, float, float]] = {
    "lora": (1e-4, 3e-4, 1e-3),
    "qlora": (1e-4, 3e-4, 1e-3),
    "full": (1e-5, 3e-5, 1e-4),
}


_RUNGS: dict[Trained, tuple[tuple[float | None, ...], tuple[float | None, ...]]] = {
    "lora": ((1.21, 0.74, 0.83), (None, 0.50, 0.58)),
    "qlora": ((1.24, 0.78, 0.80), (None, 0.55, 0.57)),
    "full": ((0.92, 0.71, None), (0.63, 0.48, None)),
}
"""Validation losses by rate in two rounds. In the first, None has diverged; in the second, it was
not tried."""


def _search(arm: Trained) -> tuple[SearchTrial, ...]:
    return tuple(
        SearchTrial(
            learning_rate=rate,
            examples=120 * rung,
            validation_loss=loss,
            rung=rung,
            status="diverged" if loss is None else "ok",
        )
        for rung, losses in enumerate(_RUNGS[arm], start=1)
        for rate, loss in zip(_GRIDS[arm], losses, strict=True)
        if rung == 1 or loss is not None
    )


def _curve(arm: Trained, end: float) -> tuple[LossPoint, ...]:
    """A loss that falls from 2.6 to about `end`, with a step's noise."""
    peak, steps = _GRIDS[arm][1], 60
    return tuple(
        LossPoint(
            step=step,
            tokens=round(118_400 * step / steps),
            loss=end + (2.6 - end) * exp(-step / 7) + 0.05 * sin(step * (2.1 + len(arm))),
            learning_rate=peak * min(1.0, step / 3),
        )
        for step in range(1, steps + 1)
    )
