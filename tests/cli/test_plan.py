"""`tunefork plan` as a user calls it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Call

Write = Callable[..., Path]


def test_methods_side_by_side(tunefork: Call, write_recipe: Write) -> None:
    ended = tunefork("plan", write_recipe(), "--gpu", "h200")
    assert ended.status == 0, ended.err
    for words in ("LoRA", "QLoRA", "full", "peak memory (process)", "1 x h200", "12 examples"):
        assert words in ended.out
    # Both ends of an interval, where they are not alike; of tensors they are.
    memory = [line for line in ended.out.splitlines() if line.startswith("peak memory")]
    assert len(re.findall(r" [MG]B -\d+/\+\d+ %", memory[0])) == 3 and memory[1].count(" ± ") == 3


def test_json_for_programs(tunefork: Call, write_recipe: Write) -> None:
    ended = tunefork("plan", write_recipe(), "--gpu", "l4", "--gpu", "l4", "--json")
    assert ended.status == 0, ended.err
    plan: dict[str, Any] = json.loads(ended.out)
    assert plan["machine"]["count"] == 2
    assert plan["methods"].keys() == {"lora", "qlora", "full"}
    for method in plan["methods"].values():
        assert method["fits"] is True and method["trainable_params"] > 0
        for peak in ("peak_tensor_bytes", "peak_process_bytes"):
            assert method[peak]["low"] < method[peak]["mid"] < method[peak]["high"]
        assert method["phases"].keys() == {
            "load", "forward_backward", "optimizer", "evaluate", "save",
        }  # fmt: skip
        assert min(method[name] for name in ("step_s", "total_s", "cost_usd")) > 0
        assert method["artifact_bytes"] > 0


def test_this_machine_and_one_method(tunefork: Call, write_recipe: Write) -> None:
    ended = tunefork("plan", write_recipe(), "--method", "qlora", "--json")
    assert ended.status == 0, ended.err
    plan = json.loads(ended.out)
    assert list(plan["methods"]) == ["qlora"] and plan["machine"]["gpu"] == "cpu"
    ended = tunefork("plan", write_recipe(), "--method", "qlora", "--set", "train.precision=int8")
    assert "int8 on a CPU computes what defines" in " ".join(ended.out.split())


def test_numbers_in_the_place_of_data(tunefork: Call, write_recipe: Write, tmp_path: Path) -> None:
    recipe = write_recipe()
    (tmp_path / "train.jsonl").unlink()
    missing = tunefork("plan", recipe)
    assert missing.status == 2 and "--examples and --tokens" in missing.err
    options = ("--examples", "1000", "--tokens", "90000", "--method", "lora", "--json")
    plan = json.loads(tunefork("plan", recipe, "--gpu", "a100-80", *options).out)
    assert plan["work"]["tokens"] == 90_000
    assert plan["work"]["steps"] == 2, "the recipe's train.max_steps"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gpu", "h20"), "h200"),
        (("--method", "qlorra"), "--method: qlorra is no method; did you mean 'qlora'?"),
        (("--examples", "10"), "give both, or neither"),
        (("--examples", "10", "--tokens", "5"), "less than two for each"),
        (("--examples", "10", "--tokens", "5000"), "more than data.max_length (128)"),
        (("--catalogue", "nowhere.yaml"), "nowhere.yaml: cannot be read"),
    ],
)
def test_wrong_options(
    tunefork: Call, write_recipe: Write, options: tuple[str, ...], message: str
) -> None:
    ended = tunefork("plan", write_recipe(), *options)
    assert ended.status == 2 and message in ended.err


def test_nothing_to_plan(tunefork: Call) -> None:
    ended = tunefork("plan")
    assert ended.status == 2 and "give a RECIPE" in ended.err


def test_a_finished_run_shows_what_was_predicted(
    tunefork: Call, write_recipe: Write, tmp_path: Path
) -> None:
    ended = tunefork("train", write_recipe(), "--out", tmp_path / "run")
    assert ended.status == 0, ended.err
    assert "predicted: " in ended.out
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["predicted_memory_bytes"] > 0 and record["predicted_step_s"] > 0
