"""What is planned for the optimiser is what it keeps."""

from typing import Any

import pytest
import torch

from tests.tiny import CONFIGS, tiny_model
from tunefork.model.build import build
from tunefork.plan.built import Build
from tunefork.plan.case import Case
from tunefork.plan.catalogue import load_catalogue
from tunefork.plan.device import target_of
from tunefork.plan.optimizer import Update, state_bytes, update
from tunefork.plan.option import changes
from tunefork.plan.passes import Shape
from tunefork.plan.step import trace_step
from tunefork.recipe import DataSection, FullSection, LoraSection, Method, ModelSection, Recipe
from tunefork.train.adamw_lora import LoraAdamW
from tunefork.train.method import make_optimizer

FORMS: list[tuple[Method, dict[str, Any]]] = [
    (Method.LORA, {}),
    (Method.FULL, {}),
    (Method.FULL, {"weights": "bf16"}),
    (Method.FULL, {"optimizer": "adamw_8bit"}),
    (Method.FULL, {"weights": "bf16", "optimizer": "adamw_bf16"}),
    (Method.FULL, {"weights": "bf16", "optimizer": "adamw_8bit"}),
]


RELEASED = FullSection(gradient_release=True)


@pytest.mark.parametrize(("method", "form"), FORMS)
def test_states_are_those_that_the_optimiser_keeps(method: Method, form: dict[str, Any]) -> None:
    full = FullSection(**form)
    recipe = Recipe(
        model=ModelSection(id="-"), data=DataSection(train="-"), lora=LoraSection(rank=4), full=full
    )
    model = tiny_model("llama").bfloat16()
    # Large enough for 8-bit states: bitsandbytes keeps those of small weights in fp32.
    model.resize_token_embeddings(256)
    build(model, method, recipe.lora, seed=0)
    optimizer = make_optimizer(model, recipe, method, seed=0)
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step(1e-3)
    is_flat = isinstance(optimizer, LoraAdamW)
    kept: dict[int, int] = {}
    for name, value in optimizer.state_tensors().items():
        if not name.endswith(("step", "qmap1", "qmap2")):
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    trained = [p for p in model.parameters() if p.requires_grad]
    planned = state_bytes(trained, method, full)
    # A flat tensor's parts start at the multiples of 512 bytes to which the trace rounds up too.
    expected = [-(-size // 512) * 512 for size in planned] if is_flat else planned
    assert sum(expected) == sum(kept.values())


def test_only_bf16_weights_take_room_for_an_update() -> None:
    weights = [torch.nn.Parameter(torch.zeros(8, 4, dtype=torch.bfloat16))]
    deltas = [torch.nn.Parameter(torch.zeros(8, 4))]
    assert update(deltas, Method.LORA, FullSection(), "cpu").room_bytes == 0
    # lora.modules_to_save
    assert update([*deltas, *weights], Method.LORA, FullSection(), "cpu").room_bytes == 4 * 32
    assert update(weights, Method.FULL, FullSection(), "cpu").room_bytes == 4 * 32
    rounded = update(weights, Method.FULL, FullSection(weights="bf16"), "cpu")
    assert rounded.room_bytes == 8 * 32 and rounded.rounded_params == 32
    full = FullSection(weights="bf16", optimizer="adamw_bf16")
    for device in ("cpu", "cuda"):
        narrow = update(weights, Method.FULL, full, device)
        assert narrow.room_bytes == 0
        assert narrow.moved_bytes == 32 * (2 + 14)  # a norm; p, g, m, v read and p, m, v written


def test_a_gpu_takes_none_but_for_8_bit_states() -> None:
    weights = [torch.nn.Parameter(torch.zeros(8, 4, dtype=torch.bfloat16)) for _ in range(2)]
    deltas = [torch.nn.Parameter(torch.zeros(8, 4))]
    rounded = update(weights, Method.FULL, FullSection(weights="bf16"), "cuda")
    # A norm; then p, g, m, v read and p, m, v written; with shadows, which are read in p's place.
    assert rounded == Update(0, 64 * (2 + 22), 4, 0, 0)
    kept = update(weights, Method.FULL, FullSection(), "cuda")
    assert kept == Update(0, 64 * (2 + 28), 4, 0, 0)
    on_cpu, mixed = (
        update([*deltas, *weights], Method.LORA, FullSection(), device)
        for device in ("cpu", "cuda")
    )
    assert mixed.room_bytes == 0
    assert mixed.moved_bytes == on_cpu.moved_bytes - 64 * 2 * (6 - 3)
    assert on_cpu.num_operations - mixed.num_operations == 2 * (5 - 2)
    small = FullSection(weights="bf16", optimizer="adamw_8bit")
    eight_bit = update(weights, Method.FULL, small, "cuda")
    assert eight_bit == update(weights, Method.FULL, small, "cpu")
    assert eight_bit.room_bytes == 8 * 32 and eight_bit.rounded_params == 64


def test_loras_gradients_are_planned_all_the_time_and_fulls_from_pass_to_update() -> None:
    steps = [
        trace_step(
            CONFIGS["llama"],
            Build(method, LoraSection(rank=4), FullSection(), torch.bfloat16, "none", "cuda"),
            Shape(2, 24, 40, is_masked=False),
            evaluates=True,
        )
        for method in (Method.LORA, Method.FULL)
    ]
    kept, freed = steps
    released = trace_step(
        CONFIGS["qwen3"],
        Build(Method.FULL, LoraSection(), RELEASED, torch.bfloat16, "none", "cuda"),
        Shape(2, 24, 40, is_masked=False),
    )
    largest = 2 * 96 * 32  # the head's, in bf16
    assert released.held_gradients == largest < released.gradients
    parts = [moment.parts.get("gradients") or 0 for moment in released.peaks.values()]
    assert max(parts) <= largest
    moments = [*kept.peaks.values(), *([kept.evaluation] if kept.evaluation else [])]
    assert len(moments) == len(kept.peaks) + 1
    assert kept.static["gradients"] >= kept.gradients
    assert {moment.parts["gradients"] for moment in moments} == {kept.static["gradients"]}
    assert "gradients" not in freed.static
    assert not freed.peaks["forward: head"].parts.get("gradients")


def test_release_is_a_change_for_steps_of_one_pass_only() -> None:
    made = Build(Method.FULL, LoraSection(), FullSection(), torch.bfloat16, "full", "cuda")
    case = Case(CONFIGS["llama"], 1, made, target_of(load_catalogue().machine(["h100"])))
    one, several = (list(changes(case, is_one_pass=is_one)) for is_one in (True, False))
    assert [changed.made.releases for _, changed in one] == [
        False,
        False,
        *([True, False] * 2),
        True,
    ]
    assert not any(changed.made.releases for _, changed in several)
    words, last = one[-1]
    assert last.made.full.optimizer == "adamw_8bit" and last.made.full.weights == "bf16"
    assert words.endswith(
        "full.gradient_release: true with train.max_grad_norm: null (no clipping)"
    )
