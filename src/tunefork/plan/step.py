"""One optimiser step's forward and backward pass of one method, traced at two depths.

The model is built by the functions that build it for training, and its loss is the loop's own. What
a whole model takes follows from two shallow ones: the highest moment of each segment, and the work
of each kind, are linear in the number of layers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunefork.data.bucket import WHOLE_ROWS, bucket
from tunefork.data.pack import MicroBatch, Segments
from tunefork.kernels.compiled import standing_for_gpu
from tunefork.model.build import build
from tunefork.model.fused import FusedLinear, fuse
from tunefork.model.head import Head
from tunefork.model.layers import decoder_layers, prepare_layers
from tunefork.model.linear import Nf4Linear
from tunefork.model.tokens import TokenHead
from tunefork.plan.attention import NAME, Setting, install
from tunefork.plan.compiled import EmptyShelf, Layer, Replay, capture, takes_segments
from tunefork.plan.optimizer import Update, keeps_gradients, state_bytes, update
from tunefork.plan.schema import Part
from tunefork.plan.shape import at_depth, depths, extrapolate, on_meta, traceable
from tunefork.plan.trace import BLOCK_BYTES, Peak, Trace, Work
from tunefork.recipe import Checkpointing, FullSection, LoraSection, Method
from tunefork.train.engine import BaseForm, form_of
from tunefork.train.loss import loss_sum, token_losses

_SCALED_LOGITS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
)
"""Settings by which an architecture changes its logits after the head; `model.head` measures this
where there are weights."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What one forward and backward pass takes in."""

    rows: int
    length: int
    supervised: int
    """Tokens that a loss is computed for."""
    is_masked: bool
    """Rows hold several examples, or padding."""
    segments: int = 0
    """Examples, and paddings, in all rows; 0: each row is one."""
    squares: float = 0.0
    """Sum of their lengths squared; 0: as if all were of one length."""

    @property
    def num_segments(self) -> int:
        """At least one a row."""
        return max(self.segments, self.rows)

    @property
    def attended(self) -> float:
        """What attention within segments works on: the sum of their lengths squared."""
        return self.squares or (self.rows * self.length) ** 2 / self.num_segments

    def padded(self) -> "Shape":
        """What a compiled run makes of it (`data/bucket.py`)."""
        supervised = bucket(self.supervised)
        if not self.is_masked and self.length % WHOLE_ROWS == 0:
            return replace(self, supervised=supervised)
        tokens = bucket(self.rows * self.length)
        segments = bucket(self.num_segments, multiple=8)
        return Shape(1, tokens, supervised, True, segments, self.attended)


@dataclass(frozen=True, slots=True)
class Build:
    """How the model is built."""

    method: Method
    lora: LoraSection
    full: FullSection
    dtype: torch.dtype
    checkpointing: Checkpointing
    device: str
    """"cuda" or "cpu": whose kernels are stood in for."""
    new_ids: tuple[int, ...] = ()
    """Tokens that the recipe adds, whose rows are trained."""
    wants_fp8: bool = False
    """`train.precision: fp8`."""
    is_compiled: bool = False

    @property
    def form(self) -> BaseForm | None:
        """How the frozen base is kept."""
        return form_of(
            self.method,
            kind=self.device,
            dtype=self.dtype,
            wants_fp8=self.wants_fp8,
            is_dora=self.lora.dora,
            checkpointing=self.checkpointing,
        )


@dataclass(frozen=True, slots=True)
class Step:
    """A whole model's step."""

    peaks: dict[str, Peak]
    """Segment -> its highest moment."""
    work: dict[str, Work]
    """Kind of operation -> all of the step's forward and backward pass."""
    evaluation: Peak | None
    """Highest moment of a forward pass without gradients, where that was asked for."""
    static: dict[Part, int]
    """Weights, optimiser states, and gradients where they are kept: there all the time."""
    gradients: int
    """Bytes of all gradients."""
    trained: int
    """Parameters that are trained."""
    update: Update
    layer_bytes: int
    """Of one decoder layer's weights."""
    is_masked: bool
    """Attention takes a mask."""
    is_compiled: bool
    """Its layers were captured compiled; where that could not be had they are as written."""

    @property
    def peak(self) -> Peak:
        """The highest moment of all."""
        return max(self.peaks.values(), key=lambda peak: peak.total)


def trace_step(config: Any, made: Build, shape: Shape, *, evaluates: bool = False) -> Step:
    """Trace `shape` through `config`'s model built as `made`; the same question is asked once.

    Raises ModelError for what the method cannot train, PlanError for what cannot be traced.
    """
    key = (config.to_json_string(), made, shape)
    if key not in _TRACED or (evaluates and _TRACED[key].evaluation is None):
        # The optimiser's form changes none of a pass's moments but what lies beside them.
        plain = replace(made, full=FullSection())
        if made == plain:
            with traceable(config):
                _TRACED[key] = _trace_whole(config, made, shape, evaluates)
        else:
            step = trace_step(config, plain, shape, evaluates=evaluates)
            _TRACED[key] = _with_optimizer(step, config, made)
    return _TRACED[key]


def _with_optimizer(step: "Step", config: Any, made: Build) -> "Step":
    """`step` with the optimiser of `made.full` in the place of the one that was traced."""
    low, high = depths(config)
    found = []
    for depth in (low, high):
        trained = _built(at_depth(config, depth), replace(made, full=FullSection())).trained
        sizes = state_bytes(trained, made.method, made.full)
        kept = sum(-(-size // BLOCK_BYTES) * BLOCK_BYTES for size in sizes)
        found.append((kept, update(trained, made.method, made.full)))
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


_TRACED: dict[Any, "Step"] = {}
_BUILT: dict[Any, "_Built"] = {}
_CAPTURED: dict[Any, list[Layer] | None] = {}
"""What was built and traced in this process: plans for several GPUs ask the same."""


def _trace_whole(config: Any, made: Build, shape: Shape, evaluates: bool) -> Step:
    low, high = depths(config)
    programs = _captured(at_depth(config, high), made)
    if programs is not None:
        shape = shape.padded()
    at_high = _trace(at_depth(config, high), made, shape, evaluates, programs)
    if low == high:
        return at_high
    at_low = _trace(at_depth(config, low), made, shape, evaluates, programs)

    def whole(a: float, b: float) -> int:
        return extrapolate(a, b, config)

    def peak(a: Peak, b: Peak) -> Peak:
        parts = {part: whole(a.parts.get(part, 0), b.parts[part]) for part in b.parts}
        return Peak(sum(parts.values()), parts)

    return Step(
        peaks={n: peak(at_low.peaks[n], at_high.peaks[n]) for n in at_low.peaks},
        work={
            kind: Work(
                whole(at_low.work[kind].count, done.count),
                whole(at_low.work[kind].flops, done.flops),
                whole(at_low.work[kind].num_bytes, done.num_bytes),
            )
            for kind, done in at_high.work.items()
            if kind in at_low.work
        },
        evaluation=(
            peak(at_low.evaluation, at_high.evaluation)
            if at_low.evaluation and at_high.evaluation
            else None
        ),
        static={p: whole(at_low.static[p], at_high.static[p]) for p in at_high.static},
        gradients=whole(at_low.gradients, at_high.gradients),
        trained=whole(at_low.trained, at_high.trained),
        update=_extrapolated_update(at_low.update, at_high.update, config),
        layer_bytes=at_high.layer_bytes,
        is_masked=at_high.is_masked,
        is_compiled=at_high.is_compiled,
    )


@dataclass(frozen=True, slots=True)
class _Built:
    """A shallow model on the meta device, and what does not depend on a batch's shape."""

    model: PreTrainedModel
    head: Head
    trained: list[nn.Parameter]
    states: list[Tensor]
    """The optimiser's, as bytes."""


def _built(config: Any, made: Build) -> _Built:
    key = (config.to_json_string(), made)
    if key not in _BUILT:
        _BUILT[key] = _build(config, made)
    return _BUILT[key]


def _build(config: Any, made: Build) -> _Built:
    model = on_meta(config, dtype=made.dtype, attention=NAME)
    model.config.pad_token_id = None  # GPT-2 looks for it among ids, of which there are none
    build(model, made.method, made.lora, seed=0, new_ids=made.new_ids)
    if made.form is not None:
        fuse(model, made.form.storage, made.form.products, torch.device("meta"))
    trained = [p for p in model.parameters() if p.requires_grad]
    sizes = state_bytes(trained, made.method, made.full)
    states = [torch.empty(size, dtype=torch.uint8, device="meta") for size in sizes]
    head = _head(model, config, takes_segments=made.device == "cuda" and takes_segments(model))
    return _Built(model, head, trained, states)


def _captured(config: Any, made: Build) -> list[Layer] | None:
    """The layers' programs where `made` compiles them and they can be had."""
    # Checkpointing and offloading go around a compiled layer, but for what is selected within it.
    within: Checkpointing = "selective" if made.checkpointing == "selective" else "none"
    key = (config.to_json_string(), replace(made, checkpointing=within), made.form)
    if made.is_compiled and key not in _CAPTURED:
        install(Setting("cuda", is_masked=False), Trace())
        built = _built(config, made)
        _CAPTURED[key] = capture(built.model, within) if built.head.takes_segments else None
    return _CAPTURED.get(key)


def _trace(
    config: Any, made: Build, shape: Shape, evaluates: bool, programs: list[Layer] | None
) -> Step:
    install(Setting("cpu", is_masked=False), Trace())  # for what building runs
    built = _built(config, made)
    model, head, trained = built.model, built.head, built.trained
    trace = Trace()
    trace.squares = shape.attended
    install(Setting("cuda" if made.device == "cuda" else "cpu", shape.is_masked), trace)
    _prepare(model, made, programs, trace, shape.num_segments)
    batch = _batch(shape)
    trace.adopt(_weights(model), "weights")
    trace.adopt(built.states, "optimizer")
    if keeps_gradients(trained, made.method):
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
            trace.adopt([parameter.grad], "gradients")
    static = dict(trace.live)
    trace.peaks.clear()
    stands_for = standing_for_gpu(trace.run_fused) if made.device == "cuda" else nullcontext()
    with stands_for, _segments(model, trace), _gradients(trained, trace), trace:
        trace.enter_segment("forward: embedding")
        model.train()
        loss = loss_sum(model, head, batch) / shape.supervised
        trace.enter_segment("backward: head")
        loss.backward()  # type: ignore[no-untyped-call]
    peaks, work = dict(trace.peaks), {kind: replace(done) for kind, done in trace.work.items()}
    del loss
    if not keeps_gradients(trained, made.method):
        model.zero_grad(set_to_none=True)
    trace.peaks.clear()
    if evaluates:
        model.eval()
        stands_for = standing_for_gpu(trace.run_fused) if made.device == "cuda" else nullcontext()
        with stands_for, trace:
            trace.enter_segment("evaluate")
            token_losses(model, head, batch)
    model.zero_grad(set_to_none=True)
    return Step(
        peaks=peaks,
        work=work,
        evaluation=trace.peaks.get("evaluate"),
        static=static,
        gradients=sum(p.numel() * p.element_size() for p in trained),
        trained=sum(p.numel() for p in trained),
        update=update(trained, made.method, made.full),
        layer_bytes=sum(t.untyped_storage().nbytes() for t in _weights(_layers(model)[0])),
        is_masked=shape.is_masked and not head.takes_segments,
        is_compiled=programs is not None,
    )


def _prepare(
    model: PreTrainedModel, made: Build, programs: list[Layer] | None, trace: Trace, segments: int
) -> None:
    """Have the layers run as `made` says."""
    checkpointing: Checkpointing = made.checkpointing
    if programs is None:
        if checkpointing == "selective" or (checkpointing == "offload" and made.device == "cpu"):
            checkpointing = "full"  # what it is without compilation, or where memory is the host's
        prepare_layers(model, checkpointing, compiles=False, shelf=EmptyShelf())
        return
    # The shallower of the two models is like the beginning of the other.
    replay = Replay(dict(zip(decoder_layers(model), programs, strict=False)), trace, segments)
    # What `selective` keeps is in the programs.
    checkpointing = "none" if checkpointing == "selective" else checkpointing
    prepare_layers(
        model, checkpointing, compiles=True, compiler=replay.compiler, shelf=EmptyShelf()
    )


@contextmanager
def _gradients(trained: Sequence[nn.Parameter], trace: Trace) -> Iterator[None]:
    """Say of gradients, as they come, that they are."""

    def adopt(parameter: Tensor) -> None:
        if parameter.grad is not None:
            trace.adopt([parameter.grad], "gradients")

    handles = [
        p.register_post_accumulate_grad_hook(adopt)  # type: ignore[no-untyped-call]
        for p in trained
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _head(model: PreTrainedModel, config: Any, *, takes_segments: bool) -> Head:
    linear = model.get_output_embeddings()
    assert isinstance(linear, nn.Linear | TokenHead)
    text = config.get_text_config()
    is_plain = not any(getattr(text, name, None) for name in _SCALED_LOGITS)
    return Head(linear, is_plain=is_plain and linear.bias is None, takes_segments=takes_segments)


def _batch(shape: Shape) -> MicroBatch:
    """A micro-batch of `shape` on the meta device."""

    def ids(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int64, device="meta")

    grid = (shape.rows, shape.length)
    at = (ids(shape.supervised), ids(shape.supervised))
    starts = torch.empty(shape.num_segments + 1, dtype=torch.int32, device="meta")
    segments = Segments(starts, shape.length, is_uniform=not shape.is_masked)
    return MicroBatch(
        ids(*grid), ids(*grid), ids(*grid), ids(*grid), at, ids(shape.supervised), segments
    )


def _weights(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        if isinstance(module, Nf4Linear):
            yield module.state.absmax
            yield module.state.state2.absmax
        if isinstance(module, FusedLinear):
            yield from module.group.weights


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))


@contextmanager
def _segments(model: PreTrainedModel, trace: Trace) -> Iterator[None]:
    """Name the moments after the decoder layer at work: the first, the last, those between."""
    layers = _layers(model)
    handles = []

    def enter_backward(name: str) -> None:
        trace.part = "activations"
        trace.enter_segment(f"backward: {name} layer")

    for at, layer in enumerate(layers):
        name = "first" if at == 0 else "last" if at == len(layers) - 1 else "middle"

        def forward(_module: nn.Module, _inputs: Any, name: str = name) -> None:
            if not trace.segment.startswith("backward"):  # a checkpoint's second forward pass
                trace.enter_segment(f"forward: {name} layer")

        def backward(_module: nn.Module, _inputs: Any, output: Any, name: str = name) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if tensor.requires_grad and not trace.segment.startswith("backward"):
                tensor.register_hook(lambda _: enter_backward(name))
                if name == "last":
                    trace.enter_segment("forward: head")
                    trace.part = "logits"

        handles += [layer.register_forward_pre_hook(forward), layer.register_forward_hook(backward)]
    try:
        yield
    finally:
        trace.part = "activations"
        for handle in handles:
            handle.remove()
