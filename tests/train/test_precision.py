"""`train.precision: auto`: what lets it be int8, and that what it came to is kept."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.folders import save_model
from tests.train.test_loss import examples
from tunefork.errors import ModelError
from tunefork.recipe import Method, Recipe
from tunefork.recipe_file import parse
from tunefork.train import precision
from tunefork.train.precision import FILE, Settled, Verdict, gate, settle_precision, verdicts
from tunefork.train.precision_choice import Agreement, BatchAgreement, PrecisionChoice

CUDA = torch.device("cuda", 0)
PASSED = Verdict(
    family="llama", method=Method.LORA, params=(1, 10**9), passed=True, finding="it did"
)
Settle = Callable[..., Settled]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    save_model(tmp_path / "base")
    fields = {
        "model": str(tmp_path / "base"),
        "method": "lora",
        "data": {"train": "unused.jsonl"},
        "train": {"batch_size": 1, "epochs": 40.0},
    }
    return parse(fields, "test")


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A GPU that has int8, and two batches that agree (true) or not, or cannot be had (none)."""
    answers: list[bool] = []

    def answer(*_: object, **__: object) -> Agreement:
        if not answers:
            raise ModelError("train.precision: int8 needs layers whose sizes are multiples of 16")
        batch = BatchAgreement(num_examples=1, loss_bf16=1.0, loss_int8=1.0, cosines={})
        return Agreement(batches=(batch,), agrees=answers[0], why="as it was asked", seconds=1.0)

    monkeypatch.setattr(precision, "has_timed_int8", lambda device: True)
    monkeypatch.setattr(precision, "agree", answer)
    monkeypatch.setattr(precision, "verdicts", lambda: (PASSED,))
    return answers


@pytest.fixture
def settle(recipe: Recipe, tmp_path: Path) -> Settle:
    def call(method: Method = Method.LORA, device: torch.device = CUDA, **train: object) -> Settled:
        section = recipe.train.model_copy(update=train)
        return settle_precision(
            recipe.model_copy(update={"train": section}),
            method,
            examples(),
            seed=0,
            pad_id=0,
            device=device,
            folder=tmp_path,
            checkpoints=tmp_path / "checkpoints",
        )

    return call


def test_batches_that_agree_make_it_int8(tried: list[bool], settle: Settle, tmp_path: Path) -> None:
    tried.append(True)
    found = settle()
    assert found.recipe.train.precision == "int8"
    assert found.choice is not None and found.choice.precision == "int8"
    assert found.choice.agreement is not None
    kept = PrecisionChoice.model_validate_json((tmp_path / FILE).read_bytes())
    assert kept == found.choice


@pytest.mark.parametrize("agrees", [False, None])
def test_else_it_is_bf16_and_says_why(
    tried: list[bool], settle: Settle, agrees: bool | None
) -> None:
    if agrees is not None:
        tried.append(agrees)
    found = settle()
    assert found.recipe.train.precision == "auto"
    assert found.choice is not None and found.choice.precision == "bf16"
    assert ("as it was asked" if agrees is False else "multiples of 16") in found.choice.why


def test_what_cannot_be_chosen_is_not_tried(
    tried: list[bool], settle: Settle, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried.append(True)
    short = settle(max_steps=99).choice
    assert short is not None and "fewer than 100 steps" in short.why
    other = settle(Method.QLORA).choice
    assert other is not None and "gate has not been run for qlora of llama" in other.why
    monkeypatch.setattr(precision, "has_timed_int8", lambda device: False)
    old = settle().choice
    assert old is not None and "timed on Hopper GPUs alone" in old.why
    for nothing_to_decide in (
        settle(Method.FULL),
        settle(precision="bf16"),
        settle(precision="int8"),
        settle(device=torch.device("cpu")),
    ):
        assert nothing_to_decide.choice is None


@pytest.mark.parametrize(("begun", "kept"), [("int8", "int8"), ("auto", "bf16")])
def test_a_run_that_goes_on_keeps_its_precision(
    tried: list[bool],
    settle: Settle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    begun: str,
    kept: str,
) -> None:
    monkeypatch.setattr(precision, "last_setting", lambda folder: {"train.precision": begun})
    tried.append(begun != "int8")  # it would come out the other way now
    found = settle()
    assert found.recipe.train.precision == ("int8" if kept == "int8" else "auto")
    assert found.choice == PrecisionChoice(precision=kept, why="as the run began")  # type: ignore[arg-type]
    figures = PrecisionChoice(precision=kept, why="then")  # type: ignore[arg-type]
    (tmp_path / FILE).write_text(figures.model_dump_json())
    assert settle().choice == figures


def test_a_run_in_fp8_of_an_older_version_is_decided_anew(
    tried: list[bool], settle: Settle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "last_setting", lambda folder: {"train.precision": "fp8"})
    tried.append(True)
    found = settle().choice
    assert found is not None and found.why != "as the run began"


def test_what_the_gate_has_passed() -> None:
    """Where this changes, docs/int8.md and the recipe's docstring have to say so."""
    assert "passed, but int8 is no faster, for lora" in str(gate("llama", Method.LORA, 134_515_008))
    assert "not passed for qlora" in str(gate("llama", Method.QLORA, 134_515_008))
    assert "has not been run" in str(gate("llama", Method.LORA, 8_000_000_000))
    assert "has not been run" in str(gate("qwen3", Method.LORA, 134_515_008))
    by_case = [(verdict.family, verdict.method, verdict.params) for verdict in verdicts()]
    assert len(set(by_case)) == len(by_case)


def test_what_did_not_pass_is_told_with_its_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = verdicts()[0].model_copy(update={"passed": False, "finding": "loss +4 %"})
    monkeypatch.setattr(precision, "verdicts", lambda: (failed,))
    assert "is not passed for lora of llama, 0.135B: loss +4 %" in str(
        gate("llama", Method.LORA, 134_515_008)
    )
    passed = failed.model_copy(update={"passed": True, "pays": False})
    monkeypatch.setattr(precision, "verdicts", lambda: (passed,))
    assert "passed, but int8 is no faster, for lora" in str(gate("llama", Method.LORA, 134_515_008))
