"""The field's rules of thumb beside what this run measured: do they hold here?

The rules are those of practitioners' guides of 2026 (the table "LoRA or full fine-tuning"). A rule
holds here when the measured figure lies in the claimed range; where the figure has an interval that
reaches both into the range and out of it, the run cannot tell. A rule about a size that was not
run (70B) is not measurable here, whatever this run's ratio is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tunefork.compare.comparison import NAMES, Arm, Comparison, MethodResult, Trained
from tunefork.compare.evidence import gain
from tunefork.page.units import METRIC_NAMES, SHARES, ratio_text, share_text

Agreement = Literal["holds here", "does not hold here", "cannot tell", "not measurable here"]

ADAPTED: tuple[Trained, ...] = ("lora", "qlora")
"""The methods that the rules are about; what they are compared with is full."""


@dataclass(frozen=True, slots=True)
class Claim:
    """One rule of thumb and this run's answer to it."""

    row: str
    """Key of the table's row that it stands beside."""
    rule: str
    measured: str
    """This run's figure, or why there is none; empty where a method has no figure."""
    agreement: Agreement


def claims(comparison: Comparison) -> list[Claim]:
    """Every rule that a row of the table speaks to, in the order of the rows."""
    return [
        _share(comparison),
        _memory(comparison),
        _time(comparison),
        _artifact(comparison),
        _quality(comparison),
        _forgetting(comparison),
        _cost(comparison),
    ]


def _share(comparison: Comparison) -> Claim:
    shares = {
        arm: result.trainable_share
        for arm, result in _adapted(comparison).items()
        if result.trainable_share is not None
    }
    measured = ", ".join(f"{NAMES[arm]} {share_text(share, 2)}" for arm, share in shares.items())
    return Claim(
        "share",
        "LoRA and QLoRA train 0.1 to 3 % of the parameters, full all of them.",
        measured,
        _agreement([0.001 <= share <= 0.03 for share in shares.values()]),
    )


def _memory(comparison: Comparison) -> Claim:
    rule = "LoRA and QLoRA take 10 to 100 times less memory."
    ratios = _ratios(comparison, "peak_memory_bytes")
    measured = _versus("full takes", ratios, "as much as")
    return Claim("memory", rule, measured, _agreement([r >= 10 for r in ratios.values()]))


def _time(comparison: Comparison) -> Claim:
    rule = "LoRA and QLoRA train 3 to 5 times faster."
    ratios = _ratios(comparison, "train_s")
    measured = _versus("full takes", ratios, "as long as")
    return Claim("time", rule, measured, _agreement([r >= 3 for r in ratios.values()]))


def _artifact(comparison: Comparison) -> Claim:
    rule = "At 70B, an adapter is under 1 GB and a full model about 140 GB: 140 times smaller."
    ratios = _ratios(comparison, "artifact_bytes")
    sizes = [comparison.methods[arm].artifact_bytes for arm in ratios]
    is_that_size = 60e9 <= comparison.model.parameters <= 80e9
    return Claim(
        "artifact",
        rule,
        _versus("full is", ratios, "as big as"),
        _agreement([size is not None and size < 1e9 for size in sizes])
        if is_that_size
        else "not measurable here",
    )


def _quality(comparison: Comparison) -> Claim:
    """In per cent of full's score, with the paired interval."""
    rule = "LoRA and QLoRA score 1 to 3 % below full."
    metric = comparison.primary_metric
    full = _finished(comparison, "full")
    if metric not in SHARES:
        why = f"a {METRIC_NAMES[metric]} is not a score of which per cent could be taken"
        return Claim(f"metric:{metric}", rule, why, "not measurable here")
    reference = full.metrics[metric].value if full else 0.0
    texts, answers = [], list[bool | None]()
    for arm in _adapted(comparison) if reference else ():
        ahead = gain(comparison.paired, metric, arm, "full")
        value, low, high = (100 * x / reference for x in (ahead.value, ahead.low, ahead.high))
        texts.append(f"{NAMES[arm]} {value:+.1f} % (95 % interval {low:+.1f} to {high:+.1f})")
        answers.append(_in_range(low, high, -3.0, -1.0))
    measured = f"against full, {', '.join(texts)}" if texts else ""
    return Claim(f"metric:{metric}", rule, measured, _agreement(answers))


def _forgetting(comparison: Comparison) -> Claim:
    rule = "LoRA and QLoRA change the model less, and forget less."
    full = _finished(comparison, "full")
    after_full = full.forgetting.change if full and full.forgetting else None
    texts, answers = [], list[bool | None]()
    for arm, result in _adapted(comparison).items():
        change = result.forgetting.change if result.forgetting else None
        if change is None or after_full is None:
            continue
        texts.append(f"{NAMES[arm]} {change.value:+.3f}")
        apart = change.high < after_full.low or change.low > after_full.high
        answers.append(change.high < after_full.low if apart else None)
    if texts and after_full:
        texts.append(f"full {after_full.value:+.3f} nats per token")
    return Claim("forgetting", rule, ", ".join(texts), _agreement(answers))


def _cost(comparison: Comparison) -> Claim:
    """The rule's dollars are those of other models and data; their ratio can be compared."""
    rule = (
        "An experiment costs $50 to $500 by LoRA and $5,000 to $50,000 by full: at least 10 times "
        "as much."
    )
    ratios = _ratios(comparison, "cost_usd")
    measured = _versus("full costs", ratios, "as much as")
    if comparison.usd_per_hour is None:
        measured = "no price was given (compare.usd_per_hour)"
    return Claim("cost", rule, measured, _agreement([r >= 10 for r in ratios.values()]))


def _finished(comparison: Comparison, arm: Arm) -> MethodResult | None:
    result = comparison.methods.get(arm)
    return result if result is not None and result.status == "ok" else None


def _adapted(comparison: Comparison) -> dict[Arm, MethodResult]:
    found = {arm: _finished(comparison, arm) for arm in ADAPTED}
    return {arm: result for arm, result in found.items() if result is not None}


def _ratios(comparison: Comparison, field: str) -> dict[Arm, float]:
    """Full's figure over each adapted method's; those without both figures are left out."""
    full = getattr(_finished(comparison, "full"), field, None)
    figures = {arm: getattr(result, field) for arm, result in _adapted(comparison).items()}
    return {arm: full / figure for arm, figure in figures.items() if full and figure}


def _versus(start: str, ratios: dict[Arm, float], than: str) -> str:
    """`full takes 1.5 times as much as LoRA, 1.6 times as much as QLoRA`"""
    parts = [f"{ratio_text(ratio)} {than} {NAMES[arm]}" for arm, ratio in ratios.items()]
    return f"{start} {', '.join(parts)}" if parts else ""


def _in_range(low: float, high: float, least: float, most: float) -> bool | None:
    """Whether an interval lies in [least, most]; None where it reaches both in and out."""
    if least <= low and high <= most:
        return True
    return False if high < least or low > most else None


def _agreement(answers: Sequence[bool | None]) -> Agreement:
    """One answer of the answers for each method: it holds only where it holds for all."""
    if not answers:
        return "not measurable here"
    if any(answer is False for answer in answers):
        return "does not hold here"
    return "cannot tell" if None in answers else "holds here"
