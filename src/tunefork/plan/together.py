"""Many adapters trained in one pass over one base: what they take, and how many of them fit.

A pass over all adapters is a pass of one adapter with as many tokens (each token sees one delta),
which is traced with the highest rank of all; what each further adapter adds stays the same whatever
the batch, and is counted:

    A and B, fp32                    4 bytes a parameter
    their gradients, fp32, kept      4
    AdamW's two moments, fp32        8
    in the pass, one layer at a time: bf16 copies of its A and B for all adapters, padded to the
    highest rank (a multiple of 16), the gradients in that form, and these widened:  2 + 2 + 4

One thing is less. Over int8 one adapter's product keeps the input it rounds; the adapters of a
group are products of their own, and the compiler makes a norm's output again rather than keep it.
Counted where it was measured, compiled, without checkpointing and with deltas on all linear layers
(one adapter keeps no input of products without a delta): two inputs a layer of a Llama, 4 GiB of 8B
at 8,192 tokens (benchmarks/results/h200_together.json), and as many as are norms' outputs of others
(`plan/norms.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tunefork.errors import BadInputError
from tunefork.plan.auto import kinds_of
from tunefork.plan.built import Build
from tunefork.plan.case import Case
from tunefork.plan.catalogue import load_catalogue
from tunefork.plan.device import Target, dtype_for, free_here
from tunefork.plan.memory import Memory
from tunefork.plan.norms import norm_inputs
from tunefork.plan.one_pass import Step
from tunefork.plan.passes import Shape
from tunefork.plan.schema import Interval, Part
from tunefork.plan.shape import config_for, count_params, lora_params, num_layers
from tunefork.plan.trace import Peak
from tunefork.recipe import Checkpointing, LoraSection, Method, Recipe
from tunefork.train.engine import compiles

_WEIGHT, _GRADIENT, _MOMENTS, _IN_PASS = 4, 4, 8, 2 + 2 + 4
_RANK_STEP = 16
"""Ranks are padded to a multiple of this in a pass (`kernels/bank.py`)."""
_MANY_STEPS = 1000
"""A group is taken for a run that is worth compiling."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """What one adapter keeps on the device while its group trains."""

    params: int

    @property
    def weight_bytes(self) -> int:
        """A and B, fp32."""
        return _WEIGHT * self.params

    @property
    def gradient_bytes(self) -> int:
        """fp32."""
        return _GRADIENT * self.params

    @property
    def optimizer_bytes(self) -> int:
        """Two fp32 moments."""
        return _MOMENTS * self.params

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


@dataclass(frozen=True, slots=True)
class Together:
    """A group of adapters on one device."""

    fits: bool
    """All of them, at the high end of `peak_process_bytes`."""
    largest: int
    """How many of them, from the first on, fit; 0: not even one does."""
    activation_checkpointing: Checkpointing
    peak_tensor_bytes: Interval
    """Of all of them."""
    peak_process_bytes: Interval
    memory_bytes: int
    """That the device has."""
    base_bytes: int
    """The frozen base's weights."""
    activation_bytes: int
    """At the highest moment: activations, logits and workspaces."""
    adapters: tuple[Adapter, ...]


def fits(
    recipe: Recipe,
    variants: Sequence[LoraSection],
    *,
    target: Target | None = None,
    pass_tokens: int | None = None,
) -> Together:
    """Plan `variants`, in the order in which they would join, over the base of `recipe`.

    The recipe says the base, its precision, `method` (lora or qlora), checkpointing, compilation;
    its own `lora` is not looked at. `target` is this machine by default. `pass_tokens` are those of
    one pass over all adapters, by default `train.micro_batch_tokens`. Where checkpointing is `auto`
    it is the fastest kind that holds them all, or the one that holds the most.

    Raises BadInputError for a model that cannot be planned, and for `method: full`.
    """
    if recipe.method is Method.FULL:
        raise BadInputError("method: full trains no adapters, of which several could share a base")
    found = None
    for group in _groups(recipe, variants, target, pass_tokens):
        try:
            planned = group.planned()
        except BadInputError:
            if found is None:
                raise
            continue  # the architecture has no such checkpointing
        if planned.fits:
            return planned
        if found is None or planned.largest >= found.largest:
            found = planned
    assert found is not None
    return found


def groups(
    recipe: Recipe,
    variants: Sequence[LoraSection],
    *,
    target: Target | None = None,
    pass_tokens: int | None = None,
) -> list[list[int]]:
    """Places in `variants` of those that train together: as few groups as fit, in order.

    Raises BadInputError as `fits` does, and where not even one adapter fits.
    """
    cut: list[list[int]] = []
    start = 0
    while start < len(variants):
        found = fits(recipe, variants[start:], target=target, pass_tokens=pass_tokens)
        if found.largest == 0:
            gib = found.memory_bytes / 2**30
            raise BadInputError(
                f"not even one adapter of lora.rank {variants[start].rank} fits in {gib:.1f} GiB "
                "beside the base; set a smaller train.micro_batch_tokens, or method: qlora"
            )
        cut.append(list(range(start, start + found.largest)))
        start += found.largest
    return cut


def _groups(
    recipe: Recipe,
    variants: Sequence[LoraSection],
    target: Target | None,
    pass_tokens: int | None,
) -> list["_Group"]:
    """With each kind of checkpointing that may be taken."""
    target = target or free_here(load_catalogue())
    tokens = pass_tokens or recipe.train.micro_batch_tokens
    config = config_for(recipe.model)
    widest = max(variants, key=lambda lora: lora_params(config, lora) / lora.rank)
    rank = max(lora.rank for lora in variants)
    made = Build(
        method=recipe.method,
        lora=LoraSection(rank=rank, targets=widest.targets),
        full=recipe.full,
        dtype=dtype_for(target, recipe.train.precision),
        checkpointing=recipe.train.checkpointing,
        device=target.kind,
        wants_int8=recipe.train.precision == "int8",
        is_compiled=compiles(recipe.train.compile, target.kind, _MANY_STEPS),
        is_joint=True,
    )
    is_everywhere = all(lora.targets == "all-linear" for lora in variants)
    is_left = recipe.train.activation_checkpointing == "auto"
    shape = Shape(1, tokens, tokens, is_masked=True, segments=max(2, len(variants)))
    params = tuple(lora_params(config, lora) for lora in variants)
    padded = -(-rank // _RANK_STEP) * _RANK_STEP
    return [
        _Group(
            case=Case(config, count_params(config), kind, target),
            shape=shape,
            params=params,
            in_pass=tuple(
                _IN_PASS * n * padded // lora.rank // num_layers(config)
                for n, lora in zip(params, variants, strict=True)
            ),
            made_again=_made_again(config, tokens) if is_everywhere and _keeps_inputs(kind) else 0,
        )
        for kind in (kinds_of(made, target) if is_left else [made])
    ]


def _keeps_inputs(made: Build) -> bool:
    """Whether one adapter built so would keep the inputs of its layers' products."""
    return made.is_compiled and made.wants_int8 and made.checkpointing == "none"


def _made_again(config: Any, tokens: int) -> int:
    """Bytes of the norms' outputs, bf16, of all layers."""
    width = config.get_text_config().hidden_size
    return norm_inputs(config) * 2 * tokens * int(width) * num_layers(config)


@dataclass(frozen=True, slots=True)
class _Group:
    """The adapters with one kind of checkpointing."""

    case: Case
    """One adapter of the highest rank."""
    shape: Shape
    params: tuple[int, ...]
    """Of each adapter."""
    in_pass: tuple[int, ...]
    """Bytes that each takes in the layer at work."""
    made_again: int
    """Bytes of what one adapter keeps of a pass and a group does not."""

    def planned(self) -> Together:
        """All of them, and how many fit."""
        memory_bytes = self.case.target.memory_bytes
        whole = self.memory(len(self.params))
        is_whole = whole.process.high <= memory_bytes
        largest = len(self.params) if is_whole else self._largest(memory_bytes)
        peak = max(whole.phases.values(), key=lambda phase: phase.tensor_bytes).parts
        rest = ("activations", "logits", "workspace")
        step = self.case.step(self.shape)
        return Together(
            fits=is_whole,
            largest=largest,
            activation_checkpointing=self.case.made.checkpointing,
            peak_tensor_bytes=whole.tensors,
            peak_process_bytes=whole.process,
            memory_bytes=memory_bytes,
            base_bytes=step.static["weights"] - _WEIGHT * step.trained,
            activation_bytes=sum(size for part, size in peak.items() if part in rest),
            adapters=tuple(Adapter(n) for n in self.params),
        )

    def memory(self, count: int) -> Memory:
        """Of the first `count` adapters."""
        step = self.case.step(self.shape)
        more = sum(self.in_pass[:count])
        group = _with(step, self.params[:count], more, self.made_again)
        return self.case.memory_of(group, self.shape)

    def _largest(self, memory_bytes: int) -> int:
        """How many fit; each takes more than the one before."""
        fitting, too_many = 0, len(self.params)
        while too_many - fitting > 1:
            middle = (fitting + too_many) // 2
            if self.memory(middle).process.high <= memory_bytes:
                fitting = middle
            else:
                too_many = middle
        return fitting


def _with(step: Step, params: Sequence[int], in_pass: int, made_again: int) -> Step:
    """`step`, which has one adapter, with those of `params` in its place."""
    more = sum(params) - step.trained
    extra: dict[Part, int] = {
        "weights": _WEIGHT * more,
        "gradients": _GRADIENT * more,
        "optimizer": _MOMENTS * more,
    }

    def grown(parts: dict[Part, int]) -> dict[Part, int]:
        return parts | {part: parts.get(part, 0) + size for part, size in extra.items()}

    def peak(found: Peak, less: int) -> Peak:
        parts = grown(found.parts)
        parts["activations"] = max(0, parts.get("activations", 0) - less)
        parts["workspace"] = parts.get("workspace", 0) + in_pass
        return Peak(sum(parts.values()), parts)

    return replace(
        step,
        peaks={name: peak(found, made_again) for name, found in step.peaks.items()},
        evaluation=None if step.evaluation is None else peak(step.evaluation, 0),  # keeps nothing
        static=grown(step.static),
        gradients=step.gradients + extra["gradients"],
        trained=sum(params),
    )
