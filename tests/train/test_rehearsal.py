"""The rehearsal: finds what a run would fall over, and leaves the run's bits alone."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import tiny_model
from tests.train.test_loss import examples
from tests.train.test_out_of_memory import room_for
from tunefork.errors import NoMemoryError, NoRoomError
from tunefork.model.build import build
from tunefork.model.head import find_head
from tunefork.recipe import LoraSection, Method
from tunefork.train.adamw_bf16 import Bf16AdamW
from tunefork.train.adamw_lora import LoraAdamW
from tunefork.train.dry_update import dry_update
from tunefork.train.longest import passes_of
from tunefork.train.loop import train
from tunefork.train.optim import ShadowAdamW
from tunefork.train.rehearsal import Rehearsal, Stage, rehearse
from tunefork.train.runner import Runner
from tunefork.train.save_rehearsal import rehearse_save

FEWEST = 16
LENGTHS = tuple(4 + at % 7 for at in range(2 * FEWEST - 1))
EXAMPLES = examples((*LENGTHS, 40))
"""The last one is the longest by far."""
STEPS = [[2 * at, 2 * at + 1] for at in range(FEWEST)]
KINDS = ("lora", "qlora", "full_fp32", "full_bf16", "full_master", "full_8bit", "full_small")


@pytest.fixture(autouse=True)
def few_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs as short as those here are rehearsed."""
    monkeypatch.setattr("tunefork.train.rehearsal.FEWEST", FEWEST)


def _made(kind: str) -> tuple[Any, Any]:
    method = Method(kind.partition("_")[0])
    model = tiny_model("llama")
    if kind in ("full_bf16", "full_master", "full_small"):
        model = model.to(torch.bfloat16)
    build(model, method, LoraSection(rank=4, dropout=0.1), seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    trained[0].data.view(-1)[3] = -0.0
    if method is not Method.FULL:
        return model, LoraAdamW(trained, betas=(0.9, 0.999), weight_decay=0.1)
    if kind == "full_small":
        return model, Bf16AdamW(trained, betas=(0.9, 0.999), weight_decay=0.1)
    return model, ShadowAdamW(
        trained,
        keep_shadows=kind == "full_master",
        eight_bit=kind == "full_8bit",
        betas=(0.9, 0.999),
        weight_decay=0.1,
    )


def _rehearse(model: Any, optimizer: Any, **options: Any) -> Rehearsal | None:
    fields: dict[str, Any] = {
        "micro_batch_tokens": 64,
        "packing": True,
        "pad_id": 0,
        "on_out_of_memory": "error",
    }
    return rehearse(
        Runner(model, find_head(model)), EXAMPLES, STEPS, optimizer, **(fields | options)
    )


def _bits(model: Any) -> list[torch.Tensor]:
    return [p.detach().clone().view(-1).view(torch.uint8) for p in model.parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_it_is_bit_equal_to_one_without(kind: str) -> None:
    ends = []
    for rehearsed in (False, True):
        model, optimizer = _made(kind)
        before, random = _bits(model), torch.get_rng_state()
        if rehearsed:
            assert _rehearse(model, optimizer) is not None
            assert all(map(torch.equal, before, _bits(model)))
            assert torch.equal(random, torch.get_rng_state())
            assert all(p.grad is None for p in model.parameters())
        result = train(
            model,
            EXAMPLES,
            STEPS,
            optimizer,
            learning_rates=[1e-2] * len(STEPS),
            micro_batch_tokens=64,
            packing=True,
            pad_id=0,
            max_grad_norm=1.0,
            seed=0,
        )
        ends.append((result.steps, _bits(model)))
    assert ends[0][0] == ends[1][0]
    assert all(map(torch.equal, ends[0][1], ends[1][1]))


def test_negative_zeros_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """By an optimiser that turns them into zeros, as a kernel may."""
    model, optimizer = _made("full_master")
    before, shadows = _bits(model), [s.detach().clone() for s in optimizer.shadows]

    def step(rate: float) -> None:
        for parameter, shadow in zip(optimizer.parameters, optimizer.shadows, strict=True):
            parameter.data.add_(0.0)
            shadow.data.add_(0.0)

    monkeypatch.setattr(optimizer, "step", step)
    with dry_update(optimizer, None):
        pass
    assert all(map(torch.equal, before, _bits(model)))
    for shadow, was in zip(optimizer.shadows, shadows, strict=True):
        assert torch.equal(shadow.view(torch.int32), was.view(torch.int32))


def test_a_planted_out_of_memory_is_found_before_the_first_step() -> None:
    """Only the last step's batch is too long for the device."""
    model, optimizer = _made("lora")
    with (
        room_for(model, 39) as seen,
        pytest.raises(NoMemoryError, match=r"forward pass \(rehearsal of the longest .* 1 x 4"),
    ):
        _rehearse(model, optimizer)
    assert seen[-1] == 46 and max(seen[:-1]) <= 4  # before it, only the head was looked for
    assert all(p.grad is None for p in model.parameters()) and not optimizer.inner.state
    with room_for(model, 50):
        assert _rehearse(model, optimizer) is not None


def test_it_shrinks_where_the_run_may() -> None:
    model, optimizer = _made("lora")
    with room_for(model, 40):
        found = _rehearse(model, optimizer, on_out_of_memory="shrink")
        assert found is not None and found.micro_batch_tokens == 40
    with room_for(model, 39), pytest.raises(NoMemoryError):
        _rehearse(model, optimizer, on_out_of_memory="shrink")


def test_an_update_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = _made("lora")

    def fail(rate: float) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(optimizer, "step", fail)
    with pytest.raises(NoMemoryError, match=r"out of memory in the optimiser step \(rehearsal\)"):
        _rehearse(model, optimizer)


def test_a_short_run_is_its_own_rehearsal() -> None:
    model, optimizer = _made("lora")
    found = rehearse(
        Runner(model, find_head(model)),
        EXAMPLES,
        STEPS[:-1],
        optimizer,
        micro_batch_tokens=64,
        packing=True,
        pad_id=0,
        on_out_of_memory="error",
    )
    assert found is None


def test_the_longest_by_tokens_and_by_row_are_both_found() -> None:
    made = examples((30, 4, 20, 20, 20, 20, 20))
    passes = passes_of(made, [[0, 1], [2, 3, 4, 5, 6]], micro_batch_tokens=80, packing=False)
    assert passes.heaviest == ((0, 0), (1, 0))  # 2 x 30 by its rows; 4 x 20 by tokens
    assert (passes.count, passes.tokens, passes.is_accumulated) == (3, 160, True)


def _stage(folder: Path, **changed: Any) -> Stage:
    fields: dict[str, Any] = {
        "evaluate": lambda: 0.5,
        "save": lambda at: (at / "weights").write_bytes(bytes(1000)),
        "kept": lambda size: 3 * size,
    }
    return Stage(folder=folder, **(fields | changed))


def test_evaluation_and_save_are_rehearsed_and_leave_nothing(tmp_path: Path) -> None:
    model, optimizer = _made("lora")
    found = _rehearse(model, optimizer, stage=_stage(tmp_path))
    assert found is not None and found.save is not None and found.save.bytes == 1000
    assert found.evaluate_s is not None and not list(tmp_path.iterdir())
    assert "rehearsed in " in str(found) and "training will take about" in str(found)


def _fails(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object) -> None:
        raise error

    return fail


def test_faults_of_evaluation_and_save_name_their_phase(tmp_path: Path) -> None:
    model, optimizer = _made("lora")
    full = OSError(errno.ENOSPC, "No space left on device")
    for changed, kind, said in (
        ({"evaluate": _fails(MemoryError())}, NoMemoryError, "the evaluation"),
        ({"save": _fails(MemoryError())}, NoMemoryError, "the save"),
        ({"save": _fails(full)}, NoRoomError, "rehearsal of the save"),
        ({"kept": lambda size: 2**62}, NoRoomError, "rehearsal of the save"),
    ):
        with pytest.raises(kind, match=said):
            _rehearse(model, optimizer, stage=_stage(tmp_path, **changed))
        assert not list(tmp_path.iterdir())


def test_of_a_large_artefact_a_part_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunefork.train.save_rehearsal._MOST_WRITTEN", 1000)
    monkeypatch.setattr("tunefork.train.save_rehearsal._PROBE", 500)
    (tmp_path / ".rehearsal").mkdir()  # of a run that was killed in its own
    cost = rehearse_save(tmp_path, _fails(ValueError()), trained_bytes=2000, kept=lambda s: s)
    assert cost.bytes == 2000 and not list(tmp_path.iterdir())
    assert json.dumps(str(cost))
