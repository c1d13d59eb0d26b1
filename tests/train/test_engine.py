"""In what form a frozen base is kept, and what is compiled."""

from typing import Any

import pytest
import torch

from tests.tiny import tiny_model
from tunefork.errors import ModelError
from tunefork.model.build import build
from tunefork.model.fused import fuse
from tunefork.model.fused_checks import check_sizes
from tunefork.recipe import Compile, LoraSection, Method, Recipe, TrainSection
from tunefork.train import engine, method
from tunefork.train.engine import BaseForm, base_form, compiles, form_of


@pytest.mark.parametrize(
    ("method", "kind", "int8", "expected"),
    [
        (Method.LORA, "cuda", False, BaseForm("bf16", "bf16")),
        (Method.LORA, "cuda", True, BaseForm("int8", "int8")),
        (Method.LORA, "cpu", False, None),
        (Method.LORA, "cpu", True, BaseForm("int8", "int8")),
        (Method.QLORA, "cuda", False, BaseForm("nf4", "bf16")),
        (Method.QLORA, "cuda", True, BaseForm("nf4", "int8")),
        (Method.QLORA, "cpu", False, None),
        (Method.FULL, "cuda", True, None),
    ],
)
def test_the_form_of_a_base(
    method: Method, kind: str, int8: bool, expected: BaseForm | None
) -> None:
    def form(dtype: torch.dtype = torch.bfloat16, is_dora: bool = False) -> BaseForm | None:
        return form_of(method, kind=kind, dtype=dtype, wants_int8=int8, is_dora=is_dora)

    assert form() == expected
    assert form(torch.float32) is None and form(is_dora=True) is None


def _recipe(*, dora: bool = False) -> Any:
    class Part:
        train = TrainSection(precision="int8")
        lora = LoraSection(dora=dora)

    return Part


def test_what_int8_cannot_be_had_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, bf16 = torch.device("cuda"), torch.bfloat16
    with pytest.raises(ModelError, match=r"no form of lora\.dora"):
        base_form(_recipe(dora=True), Method.LORA, device=torch.device("cpu"), dtype=bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(engine, "has_int8", lambda device: False)
    with pytest.raises(ModelError, match=r"8\.0 or later \(Ampere\), and this is one of 7\.5"):
        base_form(_recipe(), Method.LORA, device=cuda, dtype=bf16)
    monkeypatch.setattr(engine, "has_int8", lambda device: True)
    form = base_form(_recipe(), Method.LORA, device=cuda, dtype=bf16)
    assert form == BaseForm("int8", "int8")


def test_what_int8_cannot_be_had_for_is_refused_before_the_base_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(method, "load_model", load)
    fields = {"lora": {"dora": True}, "train": {"precision": "int8"}}
    recipe = Recipe.model_validate({"model": "any", "data": {"train": "any.jsonl"}, **fields})
    with pytest.raises(ModelError, match=r"no form of lora\.dora"):
        method.load_for_training(
            recipe, Method.LORA, dtype=torch.bfloat16, device=torch.device("cpu"), seed=0
        )


@pytest.mark.parametrize(
    ("storage", "says"),
    [
        ("int8", r"train\.precision: int8 needs .* of 16, and .*up_proj is 32 -> 40; set bf16"),
        ("fp8", r"embedded\.base_storage: fp8 needs .*up_proj is 32 -> 40; set dense"),
    ],
)
def test_sizes_that_8_bit_products_do_not_take_are_refused(storage: Any, says: str) -> None:
    model = tiny_model("llama").bfloat16()
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 40, bias=False).bfloat16()
    build(model, Method.LORA, LoraSection(rank=4), seed=0)
    with pytest.raises(ModelError, match=says):
        fuse(model, storage, storage, torch.device("cpu"))


def test_sums_that_32_bits_do_not_hold_are_refused() -> None:
    def layers(*sizes: int) -> dict[str, Any]:
        made = [torch.nn.Linear(64, size, bias=False, device="meta") for size in sizes]
        return {str(at): layer for at, layer in enumerate(made)}

    check_sizes(layers(66_560, 66_560), "int8")
    check_sizes(layers(66_576, 66_576), "fp8")
    with pytest.raises(ModelError, match=r"int8 sums over 133,144 numbers .* have 133,152; set"):
        check_sizes(layers(66_576, 66_576), "int8")


@pytest.mark.parametrize(
    ("wanted", "kind", "steps", "expected"),
    [
        ("auto", "cuda", 100, True),
        ("auto", "cuda", 99, False),
        ("always", "cuda", 1, True),
        ("never", "cuda", 1000, False),
        ("always", "cpu", 1000, False),
    ],
)
def test_long_runs_on_a_gpu_are_compiled(
    wanted: Compile, kind: str, steps: int, expected: bool
) -> None:
    assert compiles(wanted, kind, steps) == expected


@pytest.mark.parametrize(
    ("written", "read"), [(True, "full"), (False, "none"), ("selective", "selective")]
)
def test_checkpointing_may_be_true_or_false(written: Any, read: str) -> None:
    assert TrainSection(activation_checkpointing=written).activation_checkpointing == read
