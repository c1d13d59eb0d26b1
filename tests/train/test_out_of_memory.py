"""Out of memory is named, helped, and may be got round with the same gradient."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.tiny import tiny_model
from tests.train.test_loss import examples
from tunefork.errors import NoMemoryError
from tunefork.model.build import build
from tunefork.model.head import find_head
from tunefork.recipe import LoraSection, Method
from tunefork.train.accumulate import Accumulator
from tunefork.train.events import SettingChanged
from tunefork.train.out_of_memory import Phase, Remedies, is_out_of_memory, phase
from tunefork.train.runner import Runner

EXAMPLES = examples((9, 4, 17, 6, 12, 8, 5, 11))
REMEDIES = Remedies(Method.LORA, 4096, 1024, "none", False, True)


@contextmanager
def room_for(model: Any, tokens: int) -> Iterator[list[int]]:
    """A device that has room for forward passes of so many tokens; yields the passes' tokens."""
    seen: list[int] = []

    def check(_: object, given: tuple[torch.Tensor, ...]) -> None:
        seen.append(given[0].numel())
        if given[0].numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    hook = model.get_input_embeddings().register_forward_pre_hook(check)
    try:
        yield seen
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.EIO, "Input/output error"), False),
        (RuntimeError("shapes differ"), False),
        (ValueError("not enough memory"), False),
    ],
)
def test_what_out_of_memory_looks_like(error: Exception, is_it: bool) -> None:
    assert is_out_of_memory(error) is is_it
    with pytest.raises(NoMemoryError if is_it else type(error)) as raised, phase("load", REMEDIES):
        raise error
    assert not is_it or str(raised.value).startswith("out of memory in loading; the cheapest")


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("forward", {}, "train.micro_batch_tokens: 2048"),
        ("evaluation", {}, "train.micro_batch_tokens: 2048"),
        ("backward", {"least_tokens": 4096}, "train.activation_checkpointing: full"),
        ("forward", {"releases": True}, "train.activation_checkpointing: full"),
        (
            "backward",
            {"least_tokens": 4096, "checkpointing": "selective"},
            "train.activation_checkpointing: full",
        ),
        (
            "backward",
            {"least_tokens": 4096, "checkpointing": "full", "may_be_int8": True},
            "train.precision: int8",
        ),
        (
            "backward",
            {"least_tokens": 4096, "checkpointing": "full", "on_gpu": True},
            "train.activation_checkpointing: offload",
        ),
        ("load", {"may_be_int8": True}, "train.precision: int8"),
        ("optimiser step", {"method": Method.FULL}, "full.optimizer: adamw_8bit"),
        ("optimiser step", {"method": Method.FULL, "eight_bit": True}, "full.weights: bf16"),
        (
            "optimiser step",
            {"method": Method.FULL, "eight_bit": True, "master_weights": False},
            "method: lora",
        ),
        ("load", {}, "method: qlora"),
        ("load", {"method": Method.QLORA}, "data.max_length below 1024"),
        ("save", {}, "close what else is running"),
    ],
)
def test_the_cheapest_remedy(name: Phase, changed: dict[str, Any], said: str) -> None:
    assert replace(REMEDIES, **changed).cheapest(name).startswith(said)


def _gradient(limit: int, room: int | None = None, **options: Any) -> Any:
    model = tiny_model("llama").train()
    build(model, Method.LORA, LoraSection(rank=4, dropout=0.0), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_b" in name:  # zeros would give lora_a no gradient
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    changes: list[SettingChanged] = []
    runner = Runner(model, find_head(model), remedies=options.pop("remedies", None))
    cut = Accumulator(runner, limit, True, 0, on_change=changes.append, **options)
    with room_for(model, room or 10**9) as seen:
        loss, supervised = cut.gradient(EXAMPLES, 1)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return float(loss), supervised, gradients, changes, seen, cut


@pytest.mark.parametrize("room", [40, 20, 17])
def test_a_smaller_try_has_the_same_gradient(room: int) -> None:
    loss, supervised, expected, *_ = _gradient(72)
    found_loss, found, gradients, changes, seen, cut = _gradient(
        72, room, on_out_of_memory="shrink"
    )
    assert changes and seen[0] > room and max(seen[-2:]) <= room and cut.limit < 72
    assert changes[-1].after == cut.limit and changes[0].before == 72
    assert (found_loss, found) == (pytest.approx(loss, rel=1e-5), supervised)
    assert expected.keys() == gradients.keys()
    for name, gradient in gradients.items():
        # fp32 sums in another order: eps is 1.2e-7, and each value is a sum over 72 tokens
        assert float((gradient - expected[name]).norm() / expected[name].norm()) < 2e-5, name


def test_one_row_at_a_time_is_the_end_of_it() -> None:
    with pytest.raises(NoMemoryError, match=r"forward pass \(step 1, a micro-batch of 1 x 17"):
        _gradient(72, 16, on_out_of_memory="shrink")


def test_without_shrink_the_first_failure_ends_it() -> None:
    with pytest.raises(NoMemoryError, match=r"train\.activation_checkpointing: full"):
        _gradient(72, 40, remedies=replace(REMEDIES, micro_batch_tokens=72, least_tokens=64))


def test_a_failed_try_leaves_no_gradient_and_no_draw() -> None:
    """Dropout of the second try is that of a run that had the smaller limit from the start."""
    both = []
    for limit, room in ((72, 36), (36, None)):
        model = tiny_model("llama").train()
        build(model, Method.LORA, LoraSection(rank=4, dropout=0.5), seed=0)
        torch.manual_seed(5)
        runner = Runner(model, find_head(model))
        cut = Accumulator(runner, limit, True, 0, on_out_of_memory="shrink")
        with room_for(model, room or 10**9):
            loss, _ = cut.gradient(EXAMPLES, 1)
        both.append((float(loss), [p.grad for p in model.parameters() if p.grad is not None]))
    assert both[0][0] == both[1][0]
    assert all(torch.equal(a, b) for a, b in zip(both[0][1], both[1][1], strict=True))
