"""Options of the deltas and added tokens, all the way: trained, saved, opened and predicted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM

from tunefork.errors import ModelError
from tunefork.model.load import load_config, load_model, load_tokenizer
from tunefork.model.tokens import TokenHead
from tunefork.plan.built import Build
from tunefork.plan.passes import Shape
from tunefork.plan.step import trace_step
from tunefork.recipe import Method, ModelSection, Recipe
from tunefork.registry.opening import open_model
from tunefork.train.adamw_lora import LoraAdamW
from tunefork.train.method import load_for_training, make_optimizer
from tunefork.train.optim import ShadowAdamW
from tunefork.trial.trial import train_run

Make = Callable[..., Recipe]
CPU = torch.device("cpu")
TOKENS = ("<tool>", "<route>")
TYING = "ignore:Model has `tie_word_embeddings=True`"


def _with(recipe: Recipe, add_tokens: tuple[str, ...] = (), **lora: Any) -> Recipe:
    fields = recipe.model_dump(mode="json")
    fields["model"]["add_tokens"] = add_tokens
    fields["lora"] |= lora
    return Recipe.model_validate(fields)


@torch.no_grad()
def _logits(model: Any, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([ids])).logits.float()
    return logits


@pytest.mark.parametrize(
    "method", [Method.LORA, pytest.param(Method.QLORA, marks=pytest.mark.slow), Method.FULL]
)
def test_added_tokens_are_trained_saved_and_opened(
    make_recipe: Make, tmp_path: Path, method: Method
) -> None:
    recipe = _with(make_recipe(method=method), TOKENS)
    record = train_run(recipe, tmp_path / "run")
    opened = open_model(str(tmp_path / "run"), precision="fp32")
    ids = opened.tokenizer.convert_tokens_to_ids(list(TOKENS))
    assert ids == [len(opened.tokenizer) - 2, len(opened.tokenizer) - 1]
    assert opened.tokenizer("a<tool>b")["input_ids"].count(ids[0]) == 1
    base = load_model(recipe.model, dtype=torch.float32, device=CPU).eval()
    assert base.get_input_embeddings().num_embeddings == len(opened.tokenizer)
    assert (_logits(opened.model, ids) - _logits(base, ids)).abs().max() > 0
    assert record.trainable_params > 0
    if method is not Method.FULL:
        theirs = AutoPeftModelForCausalLM.from_pretrained(
            str(tmp_path / "run" / "adapter"), dtype=torch.float32
        )
        if method is Method.LORA:  # the base that PEFT finds is not in 4 bits
            torch.testing.assert_close(
                _logits(theirs, ids), _logits(opened.model, ids), rtol=1e-4, atol=1e-4
            )


def test_new_rows_are_the_mean_of_the_old_ones_each_time(make_recipe: Make) -> None:
    section = _with(make_recipe(), TOKENS).model
    old = load_model(ModelSection(id=section.id), dtype=torch.float32, device=CPU)
    new = load_model(section, dtype=torch.float32, device=CPU)
    rows, before = new.get_input_embeddings().weight, old.get_input_embeddings().weight
    assert torch.equal(rows[:-2], before)
    torch.testing.assert_close(rows[-2:], before.mean(0).expand(2, -1))
    assert load_config(section).vocab_size == len(rows)
    known = load_tokenizer(section).convert_ids_to_tokens(5)
    with pytest.raises(ModelError, match=r"model\.add_tokens: .* vocabulary already"):
        load_tokenizer(ModelSection(id=section.id, add_tokens=(known,)))


@pytest.mark.parametrize("method", [Method.LORA, Method.QLORA])
@pytest.mark.parametrize(
    "lora",
    [{"dora": True}, {"modules_to_save": ["embed_tokens", "lm_head"], "dora": True}, {}],
    ids=["dora", "whole", "rows"],
)
def test_a_plan_counts_what_is_trained(
    make_recipe: Make, method: Method, lora: dict[str, Any]
) -> None:
    recipe = _with(make_recipe(), TOKENS, rank=2, **lora)
    model = load_for_training(recipe, method, dtype=torch.bfloat16, device=CPU, seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    new_ids = tuple(load_tokenizer(recipe.model).convert_tokens_to_ids(list(TOKENS)))
    made = Build(method, recipe.lora, recipe.full, torch.bfloat16, "none", "cpu", new_ids)
    step = trace_step(load_config(recipe.model), made, Shape(1, 16, 8, is_masked=False))
    assert step.trained == sum(p.numel() for p in trained)
    assert step.gradients == sum(p.numel() * p.element_size() for p in trained)
    optimizer = make_optimizer(model, recipe, method, seed=0)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1e-3)
    inner = optimizer.inner if isinstance(optimizer, ShadowAdamW) else [optimizer.inner]  # type: ignore[attr-defined]
    moments = sum(
        s.numel() * s.element_size()
        for one in inner
        for state in one.state.values()
        for s in state.values()
        if s.dim() > 0
    )
    shadows = sum(p.numel() * 4 for p in trained if p.dtype != torch.float32)
    blocks = -(-(moments + shadows) // 512) * 512
    assert blocks <= step.static["optimizer"] <= blocks + 512 * 4 * len(trained)


def test_bf16_modules_lose_no_small_update(make_recipe: Make) -> None:
    recipe = _with(make_recipe(), modules_to_save=["embed_tokens"])
    model = load_for_training(recipe, Method.LORA, dtype=torch.bfloat16, device=CPU, seed=0)
    optimizer = make_optimizer(model, recipe, Method.LORA, seed=0)
    assert isinstance(optimizer, ShadowAdamW)
    weight = model.get_input_embeddings().weight
    weight.data.fill_(1.0)
    optimizer = make_optimizer(model, recipe, Method.LORA, seed=0)
    deltas = [p for p in optimizer.parameters if p.dtype == torch.float32]
    before = deltas[0].detach().clone()
    for _ in range(20):
        for parameter in optimizer.parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(1e-3)  # each less than half of bf16's 1/128 at 1
    assert float((weight.detach().float() - (1 - 0.02)).abs().max()) < 0.005
    torch.testing.assert_close(deltas[0].detach(), before - 0.02, rtol=0, atol=1e-4)


def test_plain_lora_keeps_its_fused_optimiser_and_magnitudes_take_no_decay(
    make_recipe: Make,
) -> None:
    cases: list[tuple[dict[str, Any], float, type]] = [
        ({}, 0.1, LoraAdamW),
        ({"dora": True}, 0.0, LoraAdamW),
        ({"dora": True}, 0.1, ShadowAdamW),
    ]
    for lora, decay, kind in cases:
        recipe = _with(make_recipe(), **lora)
        recipe = recipe.model_copy(
            update={"train": recipe.train.model_copy(update={"weight_decay": decay})}
        )
        model = load_for_training(recipe, Method.LORA, dtype=torch.float32, device=CPU, seed=0)
        optimizer = make_optimizer(model, recipe, Method.LORA, seed=0)
        assert isinstance(optimizer, kind)
        if isinstance(optimizer, ShadowAdamW):
            flat = [i for i, p in enumerate(optimizer.parameters) if p.dim() == 1]
            assert flat
            assert all(optimizer.inner[i].param_groups[0]["weight_decay"] == 0 for i in flat)


@pytest.mark.filterwarnings(TYING)
@pytest.mark.parametrize("lora", [{"dora": True}, {"modules_to_save": ["lm_head", "embed_tokens"]}])
def test_a_run_with_options_opens_as_it_was_trained(
    make_recipe: Make, tmp_path: Path, lora: dict[str, Any]
) -> None:
    train_run(_with(make_recipe(), **lora), tmp_path / "run")
    opened = open_model(str(tmp_path / "run"), precision="fp32")
    theirs = AutoPeftModelForCausalLM.from_pretrained(
        str(tmp_path / "run" / "adapter"), dtype=torch.float32
    )
    ids = list(range(5, 40))
    torch.testing.assert_close(
        _logits(opened.model, ids), _logits(theirs, ids), rtol=1e-4, atol=1e-4
    )
    assert not isinstance(opened.model.get_output_embeddings(), TokenHead)
