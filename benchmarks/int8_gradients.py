"""A's and B's gradients in bf16 and in int8 against float64, on one batch of the gate's data.

All three have the same frozen weights (bf16's, or what NF4 stores) and the same A and B: those that
a few steps in int8 have left, for at the start B is zero and A has no gradient. The reference is
transformers' model in float64 with the delta added by hooks, example by example, and PyTorch's
cross-entropy: none of tunefork's kernels, packing or loss. (transformers' norms and rotary angles
compute in float32 whatever the dtype, which is a thousand times finer than what is judged.)
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.int8_run import Trial, adapter, load, put_adapter, recipe_of
from tunefork.data.example import Encoded
from tunefork.evaluate.evaluate import pad_id
from tunefork.model.device import pick_device, pick_dtype
from tunefork.model.head import find_head
from tunefork.model.linear import LoraLinear
from tunefork.model.load import load_model
from tunefork.train.accumulate import Accumulator
from tunefork.train.kernels import attention_kernels
from tunefork.train.method import load_for_training, train_method
from tunefork.train.runner import Runner

Gradients = dict[str, Tensor]

NUM_EXAMPLES = 16


def compare(arguments: argparse.Namespace, method: str) -> dict[str, Any]:
    """Each precision's gradients beside the reference's."""
    data, tokenizer = load(arguments, Trial(method, "bf16", 0))
    examples, others = data.eval[:NUM_EXAMPLES], data.eval[NUM_EXAMPLES : 2 * NUM_EXAMPLES]
    found: dict[str, Gradients] = {}
    trained: dict[str, Tensor] | None = None
    for precision in sorted(
        arguments.precisions, reverse=True
    ):  # int8 first: its A and B serve all
        model = _built(arguments, Trial(method, precision, 0), data.train)
        if trained is None:
            _train(arguments, Trial(method, precision, 0), model, data, tokenizer)
            trained = adapter(model)
        else:
            put_adapter(model, trained)
        found[precision] = gradients(model, examples, pad_id(tokenizer))
        if precision == "bf16":  # a plain path's, which an engine has not replaced
            weights = {path: layer.materialize() for path, layer in _layers(model)}
            scale = next(layer.scale for _, layer in _layers(model))
        del model
    assert trained is not None
    section = recipe_of(arguments, Trial(method, "bf16", 0)).model
    truth, other = (
        reference_gradients(
            load_model(section, dtype=torch.bfloat16, device=pick_device()).double(),
            weights,
            trained,
            scale,
            batch,
        )
        for batch in (examples, others)
    )
    return {
        "run": f"gradients_{method}",
        "method": method,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "num_examples": len(examples),
        "steps": arguments.steps,
        **{precision: agreement(given, truth) for precision, given in found.items()},
        "other_batch": agreement(other, truth),
    }


def gradients(model: Any, examples: Sequence[Encoded], pad: int) -> Gradients:
    """Of what `model` trains, by the code that trains it."""
    model.train()
    model.zero_grad(set_to_none=True)
    runner = Runner(model, find_head(model))
    cut = Accumulator(runner, limit=8192, packing=True, pad_id=pad)
    with attention_kernels():
        cut.gradient(examples, 1)
    named = model.named_parameters()
    found = {name: p.grad.detach().double().cpu() for name, p in named if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def reference_gradients(
    model: Any,
    weights: dict[str, Tensor],
    trained: dict[str, Tensor],
    scale: float,
    examples: Sequence[Encoded],
) -> Gradients:
    """Of the mean loss over the supervised tokens, in `model`'s float64."""
    model.requires_grad_(False).eval()
    leaves = {name: value.to(model.device).double() for name, value in trained.items()}
    for leaf in leaves.values():
        leaf.requires_grad_()
    for path, weight in weights.items():
        linear = model.get_submodule(path)
        linear.weight.copy_(weight)
        a, b = leaves[f"{path}.lora_a"], leaves[f"{path}.lora_b"]
        linear.register_forward_hook(
            lambda module, inputs, y, a=a, b=b: y + scale * (inputs[0] @ a.t()) @ b.t()
        )
    count = sum(int(example.supervised[1:].sum()) for example in examples)
    for example in examples:
        ids = torch.from_numpy(example.input_ids).long().to(model.device)
        at = torch.from_numpy(example.supervised[1:]).nonzero()[:, 0].to(model.device)
        logits_tv = model(input_ids=ids[None], use_cache=False).logits[0]
        (F.cross_entropy(logits_tv[at], ids[1:][at], reduction="sum") / count).backward()  # type: ignore[no-untyped-call]
    return {name: leaf.grad.cpu() for name, leaf in leaves.items() if leaf.grad is not None}


def agreement(given: Gradients, truth: Gradients) -> dict[str, Any]:
    """Cosine and relative norm of each tensor, worst and median; A and B apart."""
    if given.keys() != truth.keys():
        raise ValueError(f"gradients of other tensors: {sorted(given.keys() ^ truth.keys())[:4]}")
    found: dict[str, Any] = {}
    for kind in ("lora_a", "lora_b"):
        cosines, norms = {}, {}
        for name in (name for name in truth if name.endswith(kind)):
            g, t = given[name].flatten(), truth[name].flatten()
            cosines[name] = float(F.cosine_similarity(g, t, dim=0))
            norms[name] = float(g.norm() / t.norm()) - 1
        least = min(cosines, key=lambda name: cosines[name])
        most = max(norms, key=lambda name: abs(norms[name]))
        found[kind] = {
            "tensors": len(cosines),
            "worst_cosine": cosines[least],
            "worst_cosine_of": least,
            "median_cosine": sorted(cosines.values())[len(cosines) // 2],
            "worst_norm_error": norms[most],
            "worst_norm_error_of": most,
        }
    both = [torch.cat([of[name].flatten() for name in truth]) for of in (given, truth)]
    found["whole_cosine"] = float(F.cosine_similarity(both[0], both[1], dim=0))
    found["whole_norm_error"] = float(both[0].norm() / both[1].norm()) - 1
    return found


def _built(arguments: argparse.Namespace, trial: Trial, examples: Sequence[Encoded]) -> Any:
    recipe, device = recipe_of(arguments, trial), pick_device()
    dtype = pick_dtype(recipe.train.precision, device)
    return load_for_training(
        recipe, recipe.method, dtype=dtype, device=device, seed=0, examples=examples
    )


def _train(
    arguments: argparse.Namespace, trial: Trial, model: Any, data: Any, tokenizer: Any
) -> None:
    recipe = recipe_of(arguments, trial)
    train_method(
        model,
        data.train,
        recipe,
        recipe.method,
        learning_rate=arguments.learning_rate,
        seed=0,
        pad_id=pad_id(tokenizer),
        on_step=lambda record: None,
    )


def _layers(model: Any) -> list[tuple[str, LoraLinear]]:
    return [(path, m) for path, m in model.named_modules() if isinstance(m, LoraLinear)]
