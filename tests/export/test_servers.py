"""What vLLM and SGLang take, asked before an export and before training."""

from typing import Any

import pytest

from tunefork.errors import RecipeError
from tunefork.export.servers import (
    SERVERS,
    ServerName,
    command,
    complaints,
    plain_scale,
    step_above,
)
from tunefork.recipe import LoraSection
from tunefork.recipe_file import parse
from tunefork.registry.peft_format import adapter_settings
from tunefork.trial.check import check_servers

PLAIN = adapter_settings(LoraSection(rank=24))


@pytest.mark.parametrize("name", SERVERS)
def test_plain_lora_is_taken_at_any_rank_below_the_highest(name: ServerName) -> None:
    assert complaints(PLAIN, name) == []
    assert complaints({**PLAIN, "r": 513}, "vllm") and not complaints({**PLAIN, "r": 513}, "sglang")


@pytest.mark.parametrize("name", SERVERS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "biases of the deltas"),
        ({"bias": "all"}, "trained biases"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"rank_pattern": {"q_proj": 8}}, "ranks that differ"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed weights"),
        ({"init_lora_weights": "olora"}, "changed weights"),
    ],
)
def test_what_it_lacks_is_named(name: ServerName, settings: dict[str, Any], message: str) -> None:
    [complaint] = complaints(PLAIN | settings, name)
    assert message in complaint


def test_the_command_has_room_for_the_rank() -> None:
    assert [step_above(rank, "vllm") for rank in (1, 4, 16, 24, 300)] == [1, 8, 16, 32, 320]
    assert step_above(24, "sglang") == 24
    run = command("vllm", base="b", adapter="a", folder="/a", rank=24)
    assert run == "vllm serve b --enable-lora --max-lora-rank 32 --lora-modules a=/a"


def test_sglang_is_given_rsloras_scale_as_a_plain_one() -> None:
    rslora = {"r": 16, "lora_alpha": 8, "use_rslora": True}
    plain = plain_scale(rslora, "sglang")
    assert plain == {"r": 16, "lora_alpha": 32, "use_rslora": False}  # 8 / sqrt(16) = 32 / 16
    assert plain_scale(rslora, "vllm") == rslora


def test_a_recipe_is_refused_before_training() -> None:
    fields: dict[str, Any] = {"model": "m", "data": {"train": "rows.jsonl"}}
    check_servers(parse(fields | {"lora": {"rank": 1024}}))
    check_servers(parse(fields | {"lora": {"rank": 512, "serve_with": ["vllm", "sglang"]}}))
    recipe = parse(fields | {"lora": {"rank": 1024, "serve_with": ["vllm"]}})
    with pytest.raises(RecipeError, match="lora.serve_with: rank 1024 is above vLLM's highest"):
        check_servers(recipe)
