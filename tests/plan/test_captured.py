"""Programs on the disk are what was captured, and are not taken for another question's."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from tunefork.plan.built import Build
from tunefork.plan.capture import Layer
from tunefork.plan.captured import remembered
from tunefork.plan.program import Kernel, Program, Size
from tunefork.recipe import FullSection, LoraSection, Method

CONFIG = LlamaConfig(hidden_size=64, num_hidden_layers=4, num_attention_heads=4)
MADE = Build(
    method=Method.LORA,
    lora=LoraSection(),
    full=FullSection(),
    dtype=torch.bfloat16,
    checkpointing="none",
    device="cuda",
    is_compiled=True,
)


def _layer(bytes_a_token: float) -> Layer:
    kernel = Kernel(
        "attention", (("a", Size(bytes_a_token)),), Size(1.0, 2.0), query=(4, 2, 16), share=2.5
    )
    program = Program((kernel,), ("x",), ("a", None), {"x": Size(fixed=3.0)})
    return Layer(program, program, 1, program, program, ("a",))


def _refuse() -> None:
    pytest.fail("was captured again")


def test_what_was_captured_is_read_back() -> None:
    layers = [_layer(1.0), _layer(2.0), _layer(1.0)]
    assert remembered(CONFIG, MADE, lambda: layers) == layers
    assert remembered(CONFIG, MADE, _refuse) == layers
    # How the layers run around their programs is another thing.
    assert remembered(CONFIG, replace(MADE, checkpointing="offload"), _refuse) == layers


def test_that_there_is_nothing_is_remembered_too() -> None:
    assert remembered(CONFIG, MADE, lambda: None) is None
    assert remembered(CONFIG, MADE, _refuse) is None


@pytest.mark.parametrize(
    "other",
    [
        replace(MADE, lora=LoraSection(rank=8)),
        replace(MADE, method=Method.QLORA),
        replace(MADE, checkpointing="selective"),
        replace(MADE, wants_int8=True),
    ],
    ids=["rank", "method", "selective", "int8"],
)
def test_another_question_has_another_answer(other: Build) -> None:
    remembered(CONFIG, MADE, lambda: [_layer(1.0)])
    assert remembered(CONFIG, other, lambda: [_layer(2.0)]) == [_layer(2.0)]


def test_a_torn_file_is_made_anew_and_no_folder_is_no_fault(home: Path) -> None:
    remembered(CONFIG, MADE, lambda: [_layer(1.0)])
    (file,) = (home / "captured").glob("*.json")
    file.write_text("{")
    assert remembered(CONFIG, MADE, lambda: [_layer(2.0)]) == [_layer(2.0)]
    assert remembered(CONFIG, MADE, _refuse) == [_layer(2.0)]
    file.unlink()
    file.parent.rmdir()
    file.parent.write_text("in the way")
    assert remembered(CONFIG, MADE, lambda: [_layer(1.0)]) == [_layer(1.0)]
