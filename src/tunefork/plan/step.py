"""One optimiser step's forward and backward pass of one method: traced at two depths, extrapolated.

What a whole model takes follows from two shallow ones: the highest moment of each segment, and the
work of each kind, are linear in the number of layers.
"""

from dataclasses import astuple, replace
from typing import Any

from tunefork.plan.attention import Setting, install
from tunefork.plan.built import Build, built
from tunefork.plan.capture import Layer, capture
from tunefork.plan.captured import remembered
from tunefork.plan.one_pass import Step, trace_evaluation, trace_pass
from tunefork.plan.optimizer import Update, state_bytes, update
from tunefork.plan.passes import Shape
from tunefork.plan.schema import Part
from tunefork.plan.shape import at_depth, depths, extrapolate, traceable
from tunefork.plan.trace import BLOCK_BYTES, Peak, Trace, Work
from tunefork.recipe import Checkpointing, FullSection


def trace_step(config: Any, made: Build, shape: Shape, *, evaluates: bool = False) -> Step:
    """Trace `shape` through `config`'s model built as `made`; the same question is asked once.

    Raises ModelError for what the method cannot train, PlanError for what cannot be traced.
    """
    key = (config.to_json_string(), made, shape)
    if key not in _TRACED:
        _TRACED[key] = _of_few_sizes(config, made, shape) or _traced(config, made, shape)
    if not evaluates:
        return _TRACED[key]
    if _TRACED[key].evaluation is None:
        with traceable(config):
            peak = _evaluation(config, made, shape, _TRACED[key].static)
        _TRACED[key] = replace(_TRACED[key], evaluation=peak)
    return _TRACED[key]


def _of_few_sizes(config: Any, made: Build, shape: Shape) -> Step | None:
    """Of a compiled pass, from that of the size that it is filled up to.

    How its tokens fall into segments changes attention's work alone, which is in proportion.
    """
    standard = replace(shape.padded(), squares=1.0)
    if not made.is_compiled or shape == standard:
        return None
    step = trace_step(config, made, standard)
    if not step.is_compiled:
        return None
    attention = step.work["attention"]
    scaled = replace(attention, flops=attention.flops * shape.padded().attended)
    return replace(step, work=step.work | {"attention": scaled})


def _traced(config: Any, made: Build, shape: Shape) -> Step:
    # The optimiser's form changes none of a pass's moments but what lies beside them, unless it
    # updates within the pass.
    plain = replace(made, full=FullSection())
    if made != plain and not made.releases:
        return _with_optimizer(trace_step(config, plain, shape), config, made)
    with traceable(config):
        return _trace_whole(config, made, shape)


def keep(config: Any, made: Build, shape: Shape, step: Step) -> None:
    """Take `step`, traced elsewhere, for what `trace_step` would find: by another PyTorch, say."""
    _TRACED[config.to_json_string(), made, shape] = step


def _with_optimizer(step: Step, config: Any, made: Build) -> Step:
    """`step` with the optimiser of `made.full` in the place of the one that was traced."""
    low, high = depths(config)
    found = []
    for depth in (low, high):
        trained = built(at_depth(config, depth), replace(made, full=FullSection())).trained
        sizes = state_bytes(trained, made.method, made.full)
        kept = sum(-(-size // BLOCK_BYTES) * BLOCK_BYTES for size in sizes)
        found.append((kept, update(trained, made.method, made.full, made.device)))
    kept = extrapolate(found[0][0], found[1][0], config)

    def changed(peak: Peak) -> Peak:
        parts = {**peak.parts, "optimizer": kept}
        return Peak(sum(parts.values()), parts)

    return replace(
        step,
        peaks={name: changed(peak) for name, peak in step.peaks.items()},
        evaluation=None if step.evaluation is None else changed(step.evaluation),
        static={**step.static, "optimizer": kept},
        update=_extrapolated_update(found[0][1], found[1][1], config),
    )


def _extrapolated_update(at_low: Update, at_high: Update, config: Any) -> Update:
    pairs = zip(astuple(at_low), astuple(at_high), strict=True)
    return Update(*(extrapolate(low, high, config) for low, high in pairs))


_TRACED: dict[Any, Step] = {}
_EVALUATED: dict[Any, Peak] = {}
_CAPTURED: dict[Any, list[Layer] | None] = {}
"""What was traced in this process: plans for several GPUs ask the same."""


def _trace_whole(config: Any, made: Build, shape: Shape) -> Step:
    low, high = depths(config)
    programs = _captured(at_depth(config, high), replace(made, full=FullSection()))
    at_high = trace_pass(at_depth(config, high), made, shape, programs)
    if low == high:
        return at_high
    at_low = trace_pass(at_depth(config, low), made, shape, programs)

    def whole(a: float, b: float) -> int:
        return extrapolate(a, b, config)

    return Step(
        peaks={n: _peak(at_low.peaks[n], at_high.peaks[n], config) for n in at_low.peaks},
        work={
            kind: Work(
                whole(at_low.work[kind].count, done.count),
                whole(at_low.work[kind].flops, done.flops),
                whole(at_low.work[kind].num_bytes, done.num_bytes),
            )
            for kind, done in at_high.work.items()
            if kind in at_low.work
        },
        evaluation=None,
        static={p: whole(at_low.static[p], at_high.static[p]) for p in at_high.static},
        gradients=whole(at_low.gradients, at_high.gradients),
        held_gradients=whole(at_low.held_gradients, at_high.held_gradients),
        trained=whole(at_low.trained, at_high.trained),
        update=_extrapolated_update(at_low.update, at_high.update, config),
        layer_bytes=at_high.layer_bytes,
        is_masked=at_high.is_masked,
        is_compiled=at_high.is_compiled,
    )


def _peak(at_low: Peak, at_high: Peak, config: Any) -> Peak:
    parts = {
        part: extrapolate(at_low.parts.get(part, 0), size, config)
        for part, size in at_high.parts.items()
    }
    return Peak(sum(parts.values()), parts)


def _evaluation(config: Any, made: Build, shape: Shape, static: dict[Part, int]) -> Peak:
    """Highest moment of an evaluation's pass, to which it is nothing how training runs layers.

    Without gradients nothing is kept of a layer, so beside what is there all the time (`static`)
    a few layers take what all of them do.
    """
    key = (config.to_json_string(), made.modules, shape)
    if key not in _EVALUATED:
        _EVALUATED[key] = trace_evaluation(at_depth(config, depths(config)[0]), made, shape)
    parts = {**_EVALUATED[key].parts, **static}
    return Peak(sum(parts.values()), parts)


def _captured(config: Any, made: Build) -> list[Layer] | None:
    """The layers' programs where `made` compiles them and they can be had."""
    # Checkpointing and offloading go around a compiled layer, but for what is selected within it.
    within: Checkpointing = "selective" if made.checkpointing == "selective" else "none"
    key = (config.to_json_string(), replace(made, checkpointing=within), made.form)
    if made.is_compiled and key not in _CAPTURED:
        install(Setting("cuda", is_masked=False), Trace())
        there = built(config, made)
        if there.head.takes_segments:
            _CAPTURED[key] = remembered(
                config, made, lambda: capture(there.model, within, gates=not made.is_joint)
            )
        else:
            _CAPTURED[key] = None
    return _CAPTURED.get(key)
