"""Do int8 products train this model on this data as bf16 ones do? Two batches that say so, or not.

The first batch is passed with B = 0, as a run begins. The second is passed with a random B whose
delta is as large as training makes it, where A has a gradient too. (A few steps of training would
not do: where a layer's bf16 product is rounded before the delta is added, with `lora.dropout` say,
part of so small a one is lost, and the two forms differ for that.) Both forms of the base see the
same batches, A and B; what is compared is the loss and the cosine of A's and B's gradients, all
together and by kind of layer.

One form is on the device at a time: the base is loaded for each, int8 group by group as for a run.
"""

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunefork.data.example import Encoded
from tunefork.model.linear import LoraLinear
from tunefork.recipe import Method, Recipe
from tunefork.train.accumulate import Accumulator
from tunefork.train.engine import prepare
from tunefork.train.kernels import attention_kernels
from tunefork.train.method import load_for_training, plan_steps
from tunefork.train.precision_choice import Agreement, BatchAgreement

LOSS_BOUND = 0.03
"""Of the relative difference, on either side. SmolLM2-135M, which ends within 1 % of bf16, is 1.1
to 1.4 % apart on 32 examples that it has not been trained on yet (a loss of 9 nats); this finds a
model whose numbers int8 does not hold. What 0.5 % after training are, only the gate can tell."""
WHOLE_BOUND = 0.95
"""Of the cosine of all A's or all B's, as in the gate."""
KIND_BOUND = 0.9
"""Of one kind of layer's."""
_MOST_EXAMPLES = 32
_DELTA_SHARE = 0.02
"""Of the weight's norm, the delta's with the random B."""
_PARTS = ("lora_a", "lora_b")

Gradients = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class _Pass:
    loss: float
    gradients: Gradients


def agree(
    recipe: Recipe,
    method: Method,
    examples: Sequence[Encoded],
    *,
    seed: int,
    pad_id: int,
    device: torch.device,
) -> Agreement:
    """Measure on the first two batches of the run that the arguments describe.

    Raises ModelError where the base has no int8 form, NoMemoryError where a batch does not fit.
    """
    began = time.perf_counter()
    schedule = plan_steps(recipe, len(examples), seed=seed)
    batches = [
        [examples[i] for i in chosen[:_MOST_EXAMPLES]] for chosen in (schedule[0], schedule[-1])
    ]
    found, drawn = dict[str, list[_Pass]](), None
    for precision in ("bf16", "int8"):
        train = recipe.train.model_copy(update={"precision": precision, "compile": "never"})
        of_form = recipe.model_copy(update={"train": train})
        with _built(of_form, method, examples, device, seed) as accumulator:
            accumulator.pad_id = pad_id
            first = _pass(accumulator, batches[0], seed)
            drawn = _random_b(accumulator.model, seed) if drawn is None else drawn
            for name, parameter in accumulator.model.named_parameters():
                if name in drawn:
                    parameter.data.copy_(drawn[name])
            found[precision] = [first, _pass(accumulator, batches[1], seed)]
    compared = tuple(
        _compare(len(batch), bf16, int8)
        for batch, bf16, int8 in zip(batches, found["bf16"], found["int8"], strict=True)
    )
    agrees, why = judge(compared)
    return Agreement(batches=compared, agrees=agrees, why=why, seconds=time.perf_counter() - began)


def judge(batches: Sequence[BatchAgreement]) -> tuple[bool, str]:
    """Whether the batches agree, and the figure that says so. NaN agrees with nothing."""
    for number, batch in enumerate(batches, start=1):
        if not abs(batch.loss_difference) <= LOSS_BOUND:
            return False, (
                f"batch {number}: loss {batch.loss_int8:.4f} in int8, {batch.loss_bf16:.4f} in "
                f"bf16 (at most {LOSS_BOUND:.0%} apart)"
            )
        for kind, parts in batch.cosines.items():
            bound = WHOLE_BOUND if kind == "all" else KIND_BOUND
            for part, cosine in parts.items():
                if not cosine >= bound:
                    return False, (
                        f"batch {number}: the gradients of {kind}'s {part} have a cosine of "
                        f"{cosine:.3f} (at least {bound})"
                    )
    losses = max(abs(batch.loss_difference) for batch in batches)
    least = min(min(batch.cosines["all"].values()) for batch in batches)
    return True, f"losses {losses:.2%} apart at most, gradients' cosine {least:.3f} at least"


@contextmanager
def _built(
    recipe: Recipe,
    method: Method,
    examples: Sequence[Encoded],
    device: torch.device,
    seed: int,
) -> Iterator[Accumulator]:
    """The model in one form, and nothing of it afterwards."""
    model = load_for_training(
        recipe, method, dtype=torch.bfloat16, device=device, seed=seed, examples=examples
    )
    model.train()
    runner = prepare(model, recipe, num_steps=1)
    limit, packing = recipe.train.micro_batch_tokens, recipe.train.packing
    try:
        # A batch that does not fit is taken in smaller pieces: what a run keeps of its activations
        # may not be settled yet, and the gradient is the same.
        yield Accumulator(runner, limit=limit, packing=packing, pad_id=0, on_out_of_memory="shrink")
    finally:
        del model, runner
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


@torch.no_grad()
def _random_b(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """B of each layer, by its parameter's name: |scale B A| is `_DELTA_SHARE` of |W|."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLinear):
            b_or = torch.randn(layer.lora_b.shape, generator=generator)
            delta = float(layer.scale * layer.lora_a.float().norm()) * len(b_or) ** 0.5
            wanted = _DELTA_SHARE * float(layer.materialize().float().norm())
            found[f"{path}.lora_b"] = b_or * (wanted / max(delta, 1e-30))
    return found


def _pass(accumulator: Accumulator, batch: Sequence[Encoded], seed: int) -> _Pass:
    model = accumulator.model
    model.zero_grad(set_to_none=True)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), attention_kernels():
        torch.manual_seed(seed)  # the same dropout in both forms
        loss, _ = accumulator.gradient(batch, 0)
    gradients = {
        name: parameter.grad.detach().float().cpu()
        for name, parameter in model.named_parameters()
        if name.endswith(_PARTS) and parameter.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return _Pass(float(loss), gradients)


def _compare(num_examples: int, bf16: _Pass, int8: _Pass) -> BatchAgreement:
    sums: dict[tuple[str, str], Tensor] = {}
    for name, ours in bf16.gradients.items():
        theirs = int8.gradients[name]
        *_, kind, part = name.split(".")
        three = torch.stack([(ours * theirs).sum(), ours.square().sum(), theirs.square().sum()])
        for key in ((kind, part), ("all", part)):
            sums[key] = sums.get(key, torch.zeros(3)) + three
    cosines: dict[str, dict[str, float]] = {}
    for (kind, part), (dot, one, other) in sums.items():
        if not (part == "lora_a" and float(one) == float(other) == 0.0):  # B is zero
            cosines.setdefault(kind, {})[part] = float(dot / (one * other).sqrt())
    return BatchAgreement(
        num_examples=num_examples, loss_bf16=bf16.loss, loss_int8=int8.loss, cosines=cosines
    )
