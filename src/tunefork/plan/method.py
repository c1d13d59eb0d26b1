"""One method on one target: memory, time, money, and the largest batch and sequence that fit."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from tunefork.plan.batches import Batches
from tunefork.plan.case import Case
from tunefork.plan.one_pass import Step
from tunefork.plan.passes import Shape
from tunefork.plan.schema import MethodPlan, PhaseName
from tunefork.plan.shape import num_layers
from tunefork.plan.time import pass_seconds, update_seconds
from tunefork.plan.trace import Work
from tunefork.recipe import Method

_LENGTHS = (1024, 2048)
"""Rows of one example at which memory is traced; it is linear in between and beyond."""
_SHORTEST = 128
_HALVINGS = 4
_WITHOUT_PASSES: tuple[PhaseName, ...] = ("load", "optimizer", "save")
"""Phases that take the same whatever the batch."""


def plan_method(
    case: Case, batches: Batches, *, has_limits: bool = True, at_most: Case | None = None
) -> MethodPlan:
    """Everything but `next_option`, which needs other cases.

    Without `has_limits` the largest batch and sequence are looked for only where it does not fit.
    They are those of the case `at_most`, where larger ones would be run otherwise.
    """
    step, target = case.step(batches.largest, evaluates=True), case.target
    case = case.as_run(case.step(batches.largest), batches.largest)
    memory, seconds = case.memory(batches.largest), step_seconds(case, batches)
    error = case.time_error(step, batches.mean)
    # Of passes of many lengths some are replayed and others launched: it is known of none which.
    at_most_s = step_seconds(case.launched, batches) if case.is_varied else seconds
    total_s = seconds * batches.num_steps
    tokens = batches.mean.rows * batches.mean.length * batches.passes_per_step
    usd = None if target.usd_per_hour is None else target.usd_per_hour * total_s / 3600
    fits = memory.process.high <= target.memory_bytes
    is_limited = has_limits or not fits
    return MethodPlan(
        fits=fits,
        may_fit=memory.process.low <= target.memory_bytes,
        margin_bytes=round(target.memory_bytes - memory.process.high),
        activation_checkpointing=case.made.checkpointing,
        total_params=case.total_params,
        trainable_params=step.trained,
        peak_tensor_bytes=memory.tensors,
        peak_process_bytes=memory.process,
        phases=memory.phases,
        step_s=seconds,
        step_s_interval=(seconds / (1 + error), max(seconds, at_most_s) * (1 + error)),
        tokens_per_s=tokens / seconds,
        total_s=total_s,
        cost_usd=usd,
        artifact_bytes=artifact_bytes(case, step),
        largest_micro_batch_tokens=(
            largest_rows_tokens(at_most or case, batches.largest) if is_limited else None
        ),
        largest_length=largest_length(at_most or case, batches.largest) if is_limited else None,
        next_option=None,
    )


def step_seconds(case: Case, batches: Batches) -> float:
    """Of one optimiser step: its passes, the update, and what GPUs send each other.

    The GPUs share a step's passes. Sharded weights are gathered for the forward and the backward
    pass and gradients scattered (FSDP); sending hides behind computing where it is shorter.
    """
    step, target = case.step(batches.largest), case.target
    passes = max(1.0, batches.passes_per_step / target.count)
    computing = passes * one_pass_seconds(case, step, scaled_work(case, batches), batches.mean)
    if target.count > 1:
        weights = step.static.get("weights", 0)
        sent = (2 * weights + step.gradients) * (target.count - 1) / target.count
        computing = max(computing, passes * sent / target.link_bandwidth)
    update = update_seconds(step.update, target.rates, target.fit.time)
    return target.trust.time_factor.of(computing + update / target.count)


def one_pass_seconds(case: Case, step: Step, work: Mapping[str, Work], shape: Shape) -> float:
    """Of a forward and backward pass of `shape`, which does `work`, on one device, uncorrected.

    `step` is of any shape of the case.
    """
    is_recomputed = case.made.checkpointing != "none" and not step.is_compiled
    return pass_seconds(
        work,
        case.target.rates,
        case.target.fit.time,
        is_masked=step.is_masked,
        is_compiled=step.is_compiled,
        is_captured=case.captures(step, shape),
        num_recomputed=num_layers(case.config) if is_recomputed else 0,
    )


def scaled_work(case: Case, batches: Batches) -> dict[str, Work]:
    """A mean pass's work, on the line through the two passes that are traced in any case."""
    shape, mean = batches.largest, batches.mean
    tokens, wanted = shape.rows * shape.length, mean.rows * mean.length
    if shape == mean:
        return case.step(shape).work
    here, twice = case.step(shape).work, case.step(_of_rows(shape, 2 * shape.rows)).work
    share = wanted / tokens - 1
    scaled = {
        kind: Work(
            done.count,
            max(0.0, done.flops + share * (more.flops - done.flops)),
            max(0.0, done.num_bytes + share * (more.num_bytes - done.num_bytes)),
        )
        for kind, done in here.items()
        for more in (twice.get(kind, done),)
    }
    if "attention" in scaled:  # also in proportion to an example's length
        at_work = (mean.attended / wanted) / (shape.attended / tokens)
        scaled["attention"].flops *= at_work
    return scaled


def artifact_bytes(case: Case, step: Step) -> int:
    """Adapters are saved as they were trained, deltas in fp32; models in their weights' dtype."""
    if case.made.method is not Method.FULL:
        return step.gradients  # as many bytes as what they are the gradients of
    return case.total_params * case.made.dtype.itemsize


def largest_rows_tokens(case: Case, shape: Shape) -> int | None:
    """Most tokens of a pass that fits, in rows of `shape`'s length; None where one row does not."""
    if not fits_without_passes(case, shape):
        return None
    rows = _largest(case, lambda rows: _of_rows(shape, rows), shape.rows, 2 * shape.rows, least=1)
    return None if rows is None else rows * shape.length


def _of_rows(shape: Shape, rows: int) -> Shape:
    """`shape` with other rows, as many of their tokens supervised."""
    share = rows / shape.rows
    return replace(
        shape,
        rows=rows,
        supervised=max(1, round(shape.supervised * share)),
        segments=round(shape.segments * share),
        squares=shape.squares * share,
    )


def largest_length(case: Case, shape: Shape) -> int | None:
    """Longest single example that fits; None where none of 128 tokens does."""
    if not fits_without_passes(case, shape):
        return None
    share = shape.supervised / (shape.rows * shape.length)

    def of(length: int) -> Shape:
        return Shape(1, length, max(1, round(share * length)), is_masked=False)

    longest = _largest(case, of, *_LENGTHS, least=_SHORTEST)
    context = getattr(case.config.get_text_config(), "max_position_embeddings", None)
    return longest if longest is None or context is None else min(longest, context)


def fits_without_passes(case: Case, shape: Shape) -> bool:
    """Whether the phases fit that take the same whatever the batch."""
    memory = case.launched.memory(shape)
    most = max(memory.phases[name].tensor_bytes for name in _WITHOUT_PASSES)
    return memory.process_high(most) <= case.target.memory_bytes


def _largest(
    case: Case, of: Callable[[int], Shape], low: int, high: int, *, least: int
) -> int | None:
    """Largest size that fits. A moment's memory is linear in it, as traced at `low` and `high`."""
    case = case.launched
    size = _on_line(case, of, low, high, least)
    if size > high:
        # Logits are held for so many tokens at most, so that far out the line is less steep.
        size = _on_line(case, of, high, size, least)
    while size > low and not case.fits(of(size)):  # the line is a hair off after the filling up
        tokens = _run_tokens(case, of(size))
        while size > low and _run_tokens(case, of(size)) == tokens:
            size = max(low, size - max(1, size // 32))
    if size > low or case.fits(of(size)):
        return size
    if not case.fits(of(least)):
        return None
    fitting, too_large = least, low  # below what was traced the line bends: halve what is unknown
    for _ in range(_HALVINGS):
        middle = (fitting + too_large) // 2
        fitting, too_large = (middle, too_large) if case.fits(of(middle)) else (fitting, middle)
    return fitting


def _on_line(case: Case, of: Callable[[int], Shape], low: int, high: int, least: int) -> int:
    """Where the line through two sizes meets the device's memory."""
    at_low, at_high = (case.memory(of(size)).moments_high for size in (low, high))
    fewer, more = _run_tokens(case, of(low)), _run_tokens(case, of(high))
    limits = []
    for segment, there in at_high.items():
        slope = (there - at_low[segment]) / (more - fewer)
        if slope > 0:
            limits.append(more + (case.target.memory_bytes - there) / slope)
    shape, most = of(low), min(limits)
    size = max(least, int(most * low / (shape.rows * shape.length)))
    while size > least and _run_tokens(case, of(size)) > most:
        size -= max(1, size // 64)
    return size


def _run_tokens(case: Case, shape: Shape) -> int:
    """Of a pass as it is run: a compiled one is filled up to one of few sizes."""
    shape = shape.padded() if case.made.is_compiled else shape
    return shape.rows * shape.length
