"""Two batches through bf16 and int8: what is measured, and that a wrong int8 is found."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.folders import save_model
from tests.train.test_loss import examples
from tunefork.errors import NoMemoryError
from tunefork.kernels.int8_product import int8_product
from tunefork.recipe import LoraSection, Method, Recipe
from tunefork.recipe_file import parse
from tunefork.train.agreement import agree, judge
from tunefork.train.precision_choice import Agreement, BatchAgreement
from tunefork.train.runner import Laid, Runner

CPU = torch.device("cpu")
KINDS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "all"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder: Path = tmp_path_factory.mktemp("base")
    save_model(folder)
    fields = {
        "model": str(folder),
        "method": "lora",
        "data": {"train": "unused.jsonl"},
        "train": {"batch_size": 3, "epochs": 2.0},
    }
    return parse(fields, "test").model_copy(update={"lora": LoraSection(rank=4)})


def _agree(recipe: Recipe, method: Method = Method.LORA) -> Agreement:
    return agree(recipe, method, examples(), seed=0, pad_id=0, device=CPU)


@pytest.mark.parametrize("method", [Method.LORA, Method.QLORA])
def test_what_is_measured(recipe: Recipe, method: Method) -> None:
    found = _agree(recipe, method)
    first, second = found.batches
    assert first.cosines.keys() == second.cosines.keys() == KINDS
    assert all(parts.keys() == {"lora_b"} for parts in first.cosines.values())  # B is zero
    assert all(parts.keys() == {"lora_a", "lora_b"} for parts in second.cosines.values())
    # The forms differ, and not by much.
    assert 0 < abs(first.loss_difference) < 0.02 and 0 < abs(second.loss_difference) < 0.02
    assert 0.9 < min(second.cosines["all"].values()) < 0.99999
    assert Agreement.model_validate_json(found.model_dump_json()) == found


def test_a_wrong_product_is_found(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    real = int8_product

    def turned(*operands: Any) -> torch.Tensor:
        return -real(*operands)

    monkeypatch.setattr("tunefork.kernels.int8.int8_product", turned)
    found = _agree(recipe)
    assert not found.agrees
    assert "batch 1" in found.why


def test_nothing_is_drawn_and_a_batch_without_room_is_cut(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, loss = list[int](), Runner.loss

    def in_little_room(self: Runner, laid: Laid, *rest: Any) -> torch.Tensor:
        passes.append(laid.batch.input_ids.numel())
        if passes[-1] > 24:
            raise NoMemoryError("out of memory")
        return loss(self, laid, *rest)

    monkeypatch.setattr(Runner, "loss", in_little_room)
    lora = LoraSection(rank=4, dropout=0.3)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = _agree(recipe.model_copy(update={"lora": lora}))
    assert torch.equal(torch.get_rng_state(), before)
    # Both forms drop the same values out, or their gradients would have little in common.
    assert min(found.batches[1].cosines["all"].values()) > 0.9
    assert max(passes) > 24


def _batch(loss: float = 1.0, **cosines: float) -> BatchAgreement:
    found = {kind: {"lora_a": value, "lora_b": 0.99} for kind, value in cosines.items()}
    return BatchAgreement(num_examples=1, loss_bf16=1.0, loss_int8=loss, cosines=found)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (_batch(1.02, all=0.96, q_proj=0.91), None),
        (_batch(1.04, all=0.99), "loss 1.0400 in int8, 1.0000 in bf16"),
        (_batch(0.96, all=0.99), "loss 0.9600 in int8"),
        (_batch(float("nan"), all=0.99), "loss nan"),
        (_batch(all=0.94), "the gradients of all's lora_a have a cosine of 0.940"),
        (_batch(all=0.99, q_proj=0.89), "the gradients of q_proj's lora_a"),
        (_batch(all=float("nan")), "cosine of nan"),
    ],
)
def test_the_bounds(batch: BatchAgreement, said: str | None) -> None:
    agrees, why = judge([_batch(all=0.99), batch])
    assert agrees is (said is None)
    assert said is None or (why.startswith("batch 2: ") and said in why)
