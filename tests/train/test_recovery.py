"""Sick steps in a run: the weights are those of before, the state is saved, rows are left out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import tiny_model
from tests.train.test_loss import examples
from tunefork.errors import DivergedError, NoGradientError
from tunefork.model.build import build
from tunefork.recipe import LoraSection, Method
from tunefork.train.accumulate import Accumulator
from tunefork.train.adamw_lora import LoraAdamW
from tunefork.train.checkpoints import Checkpoints, Policy
from tunefork.train.events import Event, Resumed, Warned
from tunefork.train.loop import TrainResult, train
from tunefork.train.recovery import OnFault

NUM_STEPS = 24
EXAMPLES = examples(tuple(8 + at % 3 for at in range(2 * NUM_STEPS)))
STEPS = [[2 * at, 2 * at + 1] for at in range(NUM_STEPS)]


def _run(
    folder: Path,
    *,
    stop_after: int | None = None,
    modules_to_save: tuple[str, ...] = (),
    **options: Any,
) -> tuple[Any, list[Event], TrainResult]:
    model = tiny_model("llama")
    lora = LoraSection(rank=4, dropout=0.1, modules_to_save=modules_to_save)
    build(model, Method.LORA, lora, seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    events: list[Event] = []
    checkpoints = Checkpoints(folder, {}, {}, Policy(every_steps=4), say=lambda line: None)
    result = train(
        model,
        EXAMPLES,
        STEPS,
        LoraAdamW(trained, betas=(0.9, 0.999), weight_decay=0.0),
        learning_rates=[1e-3] * NUM_STEPS,
        micro_batch_tokens=64,
        packing=True,
        pad_id=0,
        max_grad_norm=1.0,
        seed=0,
        checkpoints=checkpoints,
        start=checkpoints.newest(),
        stop_after=stop_after,
        on_fault=OnFault(on_event=events.append, **options),
    )
    return model, events, result


def _plant(monkeypatch: pytest.MonkeyPatch, at: dict[int, float], times: int = 1) -> None:
    """The loss of those steps is multiplied so, each the first `times` that it is taken."""
    left = dict.fromkeys(at, times)
    first = Accumulator.gradient

    def gradient(
        self: Accumulator, chosen: Any, step: int, following: Any = ()
    ) -> tuple[torch.Tensor, int]:
        loss, supervised = first(self, chosen, step, following)
        if left.get(step, 0) > 0:
            left[step] -= 1
            loss *= at[step]
        return loss, supervised

    monkeypatch.setattr(Accumulator, "gradient", gradient)


def _weights(model: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_a_step_that_is_not_finite_is_not_taken_and_the_state_before_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    until, _, _ = _run(tmp_path / "until", stop_after=18)
    whole, _, _ = _run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        _plant(patch, {19: float("nan")})
        with pytest.raises(
            DivergedError, match=r"step 19: the loss is nan .*checkpoint of step 18"
        ):
            _run(tmp_path / "run")
    found = Checkpoints(tmp_path / "run", {}, {}).newest()
    assert found is not None and found.facts.step == 18
    saved = {k: v for k, v in found.read().tensors.items() if k.startswith("weights/")}
    trained = {f"weights/{n}": p for n, p in until.named_parameters() if p.requires_grad}
    assert all(torch.equal(saved[name], trained[name]) for name in trained)
    # and the saved state goes on as if nothing had been: dropout's draws are those of the step
    again, _, result = _run(tmp_path / "run")
    assert result.num_steps == NUM_STEPS
    assert all(map(torch.equal, _weights(again), _weights(whole)))


def test_a_step_that_leaves_no_gradient_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch 2.11's compiler once had it for `train.precision: fp32`, for all of a run."""
    first = Accumulator.gradient

    def gradient(
        self: Accumulator, chosen: Any, step: int, following: Any = ()
    ) -> tuple[torch.Tensor, int]:
        found = first(self, chosen, step, following)
        if step == 3:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()
        return found

    monkeypatch.setattr(Accumulator, "gradient", gradient)
    with pytest.raises(NoGradientError, match=r"step 3: .* nothing is learnt; .*compile: never"):
        _run(tmp_path)
    found = Checkpoints(tmp_path, {}, {}).newest()
    assert found is not None and found.facts.step == 2


@pytest.mark.parametrize("step", [1, 2])
def test_nor_does_an_adapter_learn_nothing_beside_a_module_that_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """`lora.modules_to_save` would have had its gradient, and hidden that the adapter had none. It
    is looked at once in a process: what loses it, loses it each time."""
    if step > 1:
        _run(tmp_path, modules_to_save=("norm",), stop_after=step - 1)
    first = Accumulator.gradient

    def gradient(
        self: Accumulator, chosen: Any, step: int, following: Any = ()
    ) -> tuple[torch.Tensor, int]:
        found = first(self, chosen, step, following)
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and "lora_" in name:
                parameter.grad.zero_()
        return found

    monkeypatch.setattr(Accumulator, "gradient", gradient)
    with pytest.raises(NoGradientError, match=rf"step {step}: .* they learn nothing; .*never"):
        _run(tmp_path, modules_to_save=("norm",))


def test_bad_weights_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be the newest checkpoint, and the same command would fail for ever."""
    whole, _, _ = _run(tmp_path / "whole")
    first = Accumulator.gradient

    def gradient(
        self: Accumulator, chosen: Any, step: int, following: Any = ()
    ) -> tuple[torch.Tensor, int]:
        if step == 19:
            with torch.no_grad():
                next(p for p in self.model.parameters() if p.requires_grad).fill_(float("nan"))
        return first(self, chosen, step, following)

    with monkeypatch.context() as patch:
        patch.setattr(Accumulator, "gradient", gradient)
        with pytest.raises(DivergedError, match="not saved.*the weights are bad"):
            _run(tmp_path / "run")
    found = Checkpoints(tmp_path / "run", {}, {}).newest()
    assert found is not None and found.facts.step == 16
    again, _, _ = _run(tmp_path / "run")
    assert all(map(torch.equal, _weights(again), _weights(whole)))


def test_a_spike_is_said_once_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, events, _ = _run(tmp_path / "whole")
    assert not events
    _plant(monkeypatch, {19: 3.0, 20: 3.0})
    model, events, _ = _run(tmp_path / "run")
    [warned] = events
    assert isinstance(warned, Warned) and (warned.code, warned.step) == ("loss_spike", 19)
    assert "rows row 36, row 37" in warned.message
    assert all(map(torch.equal, _weights(model), _weights(whole)))


def test_a_spike_stops_the_run_before_its_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _plant(monkeypatch, {19: 3.0})
    with pytest.raises(DivergedError, match=r"robust standard deviations .* step 18\. The step's"):
        _run(tmp_path, loss_spike="stop")


def test_a_rollback_leaves_out_the_rows_around_the_spike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _plant(monkeypatch, {22: 3.0})
    model, events, result = _run(tmp_path / "run", loss_spike="rollback")
    [back] = events
    assert isinstance(back, Resumed) and (back.step, back.checkpoint) == (20, "step-000020")
    assert back.skipped_steps == (21, 22)  # nothing before the checkpoint can be left out
    assert [record.step for record in result.steps] == [*range(1, 21), 23, 24]
    assert result.status == "ok" and result.num_steps == NUM_STEPS
    # the same bits as a run that is stopped at 20 and told to leave them out
    _run(tmp_path / "by hand", stop_after=20)
    checkpoints = Checkpoints(tmp_path / "by hand", {}, {})
    found = checkpoints.newest()
    assert found is not None
    facts = found.facts.model_copy(update={"skipped": (21, 22)})
    monkeypatch.setattr(Checkpoints, "newest", lambda self: replace(found, facts=facts))
    by_hand, _, _ = _run(tmp_path / "by hand")
    assert all(map(torch.equal, _weights(model), _weights(by_hand)))


def test_what_is_left_out_stays_out_over_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _plant(patch, {18: 3.0})
        whole, _, _ = _run(tmp_path / "whole", loss_spike="rollback")
    with monkeypatch.context() as patch:
        _plant(patch, {18: 3.0})
        _run(tmp_path / "run", loss_spike="rollback", stop_after=20)
    resumed, _, _ = _run(tmp_path / "run", loss_spike="rollback")
    assert all(map(torch.equal, _weights(resumed), _weights(whole)))


def test_rollbacks_come_to_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _plant(monkeypatch, dict.fromkeys(range(17, 25), 3.0), times=99)
    with pytest.raises(DivergedError, match="after 3 rollbacks"):
        _run(tmp_path, loss_spike="rollback")


def test_without_a_checkpoint_only_the_rows_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoints, "is_due", lambda self, step: False)
    _plant(monkeypatch, {19: 3.0})
    _, events, result = _run(tmp_path, loss_spike="rollback")
    [warned] = events
    assert isinstance(warned, Warned) and "only its rows are left out" in warned.message
    assert 19 not in [record.step for record in result.steps]
