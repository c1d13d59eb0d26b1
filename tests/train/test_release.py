"""Gradient release: the same weights, no two gradients together, and what it cannot be had with."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import tiny_model
from tests.train.test_loss import examples
from tunefork.errors import DivergedError, ModelError, NoGradientError, RecipeError
from tunefork.model.head import find_head
from tunefork.model.layers import decoder_layers, prepare_layers
from tunefork.recipe import Checkpointing, DataSection, FullSection, Method, ModelSection, Recipe
from tunefork.recipe import TrainSection as Train
from tunefork.recipe_file import parse
from tunefork.train import method
from tunefork.train.accumulate import Accumulator
from tunefork.train.checkpoints import Checkpoints, Policy
from tunefork.train.loop import TrainResult, train
from tunefork.train.recovery import OnFault
from tunefork.train.rehearsal import FEWEST, rehearse
from tunefork.train.release import Release, check_one_pass, check_shared
from tunefork.train.runner import Runner
from tunefork.train.state import digest

NUM_STEPS = 20
EXAMPLES = examples(tuple(8 + at % 3 for at in range(2 * NUM_STEPS)))
STEPS = [[2 * at, 2 * at + 1] for at in range(NUM_STEPS)]


def _recipe(**full: Any) -> Recipe:
    return Recipe(
        model=ModelSection(id="-"),
        data=DataSection(train="-"),
        full=FullSection(gradient_release=True, **full),
        train=Train(max_grad_norm=None, weight_decay=0.1),
    )


def _run(
    *,
    releases: bool = True,
    dtype: torch.dtype = torch.float32,
    checkpointing: Checkpointing = "none",
    folder: Path | None = None,
    stop_after: int | None = NUM_STEPS,
    num_steps: int = NUM_STEPS,
    loss_spike: Any = "warn",
    on_built: Callable[[Any], None] = lambda model: None,
    **full: Any,
) -> tuple[str, TrainResult]:
    """The digest of everything that the next step depends on; the tiny llama's head is tied."""
    model = tiny_model("llama").to(dtype)
    model.requires_grad_(True)
    recipe = _recipe(**full)
    prepare_layers(model, checkpointing, compiles=False)
    optimizer = method.make_optimizer(model, recipe, Method.FULL, seed=0)
    release = method.make_release(model, optimizer, recipe, Method.FULL) if releases else None
    on_built(model)
    checkpoints = folder and Checkpoints(folder, {}, {}, Policy(every_steps=4), lambda line: None)
    with release or nullcontext():
        result = train(
            model,
            EXAMPLES,
            STEPS[:num_steps],
            optimizer,
            learning_rates=[1e-2] * num_steps,
            micro_batch_tokens=64,
            packing=True,
            pad_id=0,
            max_grad_norm=None,
            seed=0,
            checkpoints=checkpoints or None,
            start=checkpoints.newest() if checkpoints else None,
            stop_after=stop_after,
            on_fault=OnFault(loss_spike=loss_spike),
            release=release,
        )
    tensors = {**model.state_dict(), **optimizer.state_tensors()}
    return digest({name: value.detach() for name, value in tensors.items()}), result


@pytest.mark.parametrize(
    ("dtype", "checkpointing", "full"),
    [
        (torch.float32, "none", {}),
        (torch.bfloat16, "offload", {}),
        (torch.bfloat16, "none", {"weights": "bf16"}),
        (torch.bfloat16, "full", {"weights": "bf16", "optimizer": "adamw_bf16"}),
        (torch.bfloat16, "none", {"weights": "bf16", "optimizer": "adamw_8bit"}),
    ],
)
def test_the_bits_are_those_of_a_run_that_keeps_its_gradients(
    dtype: torch.dtype,
    checkpointing: Checkpointing,
    full: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    most = [0]
    forms: dict[str, Any] = {"dtype": dtype, "checkpointing": checkpointing, "num_steps": 3, **full}
    end = Release.end

    def watch(model: Any) -> None:
        def count(_: Any) -> None:
            most[0] = max(most[0], sum(p.grad is not None for p in model.parameters()))

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(count)

    kept, there = _run(releases=False, **forms)
    ends: list[Release] = []

    def ended(release: Release) -> float:
        ends.append(release)
        return end(release)

    monkeypatch.setattr(Release, "end", ended)
    released, here = _run(on_built=watch, **forms)
    assert released == kept
    assert here.steps == there.steps  # losses and the gradient's norms too
    assert len(ends) == 3 and most[0] == 1  # the one at hand


def test_a_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    form: dict[str, Any] = {"dtype": torch.bfloat16, "weights": "bf16", "num_steps": 6}
    form |= {"optimizer": "adamw_bf16"}
    whole, _ = _run(**form)
    _, first = _run(folder=tmp_path, **form | {"stop_after": 3})
    resumed, second = _run(folder=tmp_path, **form)
    assert [record.step for record in [*first.steps, *second.steps]] == [1, 2, 3, 4, 5, 6]
    assert resumed == whole


def _sick_gradient_at(step: int) -> Callable[[Any], None]:
    """A gradient of infinity in the embedding, in the backward pass of that step."""

    def plant(model: Any) -> None:
        passes = [0]

        def forward(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
            if torch.is_grad_enabled():
                passes[0] += 1
                if passes[0] == step:
                    output.register_hook(lambda gradient: gradient * torch.inf)

        model.get_input_embeddings().register_forward_hook(forward)

    return plant


def test_a_sick_gradient_ends_the_run_saves_nothing_and_names_the_newest_checkpoint(
    tmp_path: Path,
) -> None:
    said = r"step 7: the gradient's norm is nan .*goes on from step-000004.* row 12, row 13"
    with pytest.raises(DivergedError, match=said):
        _run(folder=tmp_path, on_built=_sick_gradient_at(7))
    found = Checkpoints(tmp_path, {}, {}).newest()
    assert found is not None and found.facts.step == 4
    with pytest.raises(DivergedError, match="starts anew, as there is no checkpoint yet"):
        _run(folder=tmp_path / "new", on_built=_sick_gradient_at(2))
    resumed, _ = _run(folder=tmp_path, num_steps=8)
    whole, _ = _run(num_steps=8)
    assert resumed == whole


def test_a_step_that_leaves_no_gradient_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accumulator, "backward", lambda self, following=(): self.drop())
    with pytest.raises(NoGradientError, match=r"step 1: .* nothing is learnt; .*compile: never"):
        _run()


def test_a_sick_loss_ends_the_run_before_any_weight_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunefork.train.guard._FEWEST", 4)
    before, _ = _run(num_steps=6)
    forward = Accumulator.forward
    for factor, said in ((float("nan"), "the loss is nan;"), (1e3, "standard deviations")):

        def planted(self: Any, chosen: Any, step: int, by: float = factor) -> tuple[float, int]:
            loss, supervised = forward(self, chosen, step)
            return loss * (by if step == 7 else 1.0), supervised

        monkeypatch.setattr(Accumulator, "forward", planted)
        with pytest.raises(DivergedError, match=rf"step 7: .*{said}.*checkpoint of step 6"):
            _run(folder=tmp_path, loss_spike="stop")
    assert _run(folder=tmp_path, num_steps=6)[0] == before


def test_a_rehearsal_changes_no_bit_and_keeps_no_gradient() -> None:
    model = tiny_model("llama").requires_grad_(True)
    optimizer = method.make_optimizer(model, _recipe(), Method.FULL, seed=0)
    release = method.make_release(model, optimizer, _recipe(), Method.FULL)
    before = digest({name: value.detach() for name, value in model.named_parameters()})
    assert release is not None
    with release:
        found = rehearse(
            Runner(model, find_head(model)),
            EXAMPLES,
            STEPS * (FEWEST // NUM_STEPS + 1),
            optimizer,
            micro_batch_tokens=64,
            packing=True,
            pad_id=0,
            on_out_of_memory="error",
            release=release,
        )
    assert found is not None and not optimizer.has_states()
    assert all(p.grad is None for p in model.parameters())
    assert digest({name: p.detach() for name, p in model.named_parameters()}) == before


def test_what_it_cannot_be_had_with_is_refused_by_name() -> None:
    fields: dict[str, Any] = {"model": "x", "data": {"train": "x"}}
    release = {"full": {"gradient_release": True}}
    with pytest.raises(RecipeError, match=r"train\.max_grad_norm \(1\) .*max_grad_norm: null"):
        parse(fields | release)
    with pytest.raises(RecipeError, match=r"on_out_of_memory: shrink would; set error"):
        parse(fields | release | {"train": {"max_grad_norm": None, "on_out_of_memory": "shrink"}})
    assert parse(fields | release | {"train": {"max_grad_norm": None}}).full.gradient_release
    said = r"step 1 of 20 takes 2 micro-batches .*\(10\).*set train.micro_batch_tokens: 20"
    with pytest.raises(RecipeError, match=said):
        check_one_pass(EXAMPLES, STEPS, micro_batch_tokens=10, packing=False)
    with pytest.raises(RecipeError, match=r"set train.micro_batch_tokens: 32"):
        check_one_pass(EXAMPLES, STEPS, micro_batch_tokens=4, packing=False)  # less than an example
    model = tiny_model("llama")
    first, second, *_ = decoder_layers(model)
    second.mlp.up_proj.weight = first.mlp.up_proj.weight  # type: ignore[union-attr]
    with pytest.raises(ModelError, match=r"mlp\.up_proj\.weight is shared by several layers"):
        check_shared(model, "offload")
    check_shared(model, "full")
