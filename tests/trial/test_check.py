"""What is found wrong before any weight is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, OPTConfig

from tests.folders import save_model, save_tokenizer
from tests.tiny import CONFIGS
from tunefork.errors import BadInputError, ModelError, RecipeError
from tunefork.recipe import Method, Recipe
from tunefork.trial.check import check_recipe
from tunefork.trial.trial import train_run

Make = Callable[..., Recipe]
SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _save(folder: Path, kind: Any, **fields: Any) -> str:
    folder.mkdir()
    config = kind(**{"vocab_size": save_tokenizer(folder)} | SIZE | fields)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def _check(recipe: Recipe, *methods: Method) -> list[str]:
    """The warnings."""
    said: list[str] = []
    check_recipe(recipe, methods or (Method.FULL,), said.append, ignore_plan=True)
    return said


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("tunefork.trial.training.load_for_training", fail)
    monkeypatch.setattr("tunefork.trial.trial.load_model", fail)


def test_a_sound_recipe_has_no_warnings(make_recipe: Make) -> None:
    assert _check(make_recipe(), *Method) == []


def test_int8_on_a_cpu_is_said_to_be_slow(make_recipe: Make) -> None:
    recipe = make_recipe(train={"precision": "int8"})
    [said] = _check(recipe, Method.LORA)
    assert said.startswith("warning: train.precision: int8 on a CPU") and "set bf16" in said
    assert _check(recipe, Method.FULL) == []


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"evaluate": {"forgetting": "gone.txt"}}, r"evaluate\.forgetting: .*gone\.txt"),
        ({"lora": {"rank": 99}}, r"method lora: lora\.rank: 99 is above the size"),
        (
            {
                "method": "full",
                "full": {"gradient_release": True},
                "train": {"max_grad_norm": None, "batch_size": 12, "micro_batch_tokens": 128},
            },
            r"full\.gradient_release: step 1 of 1 takes \d+ micro-batches",
        ),
    ],
)
def test_a_run_is_checked_before_its_folder_is_made(
    make_recipe: Make, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInputError, match=message):
        train_run(make_recipe(**sections), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Methods on layers


def test_experts_refuse_qlora_where_lora_names_its_layers(
    make_recipe: Make, tmp_path: Path
) -> None:
    experts = {"num_local_experts": 2, "intermediate_size": 16, "num_key_value_heads": 2}
    model = _save(tmp_path / "moe", MixtralConfig, max_position_embeddings=256, **experts)
    recipe = make_recipe(model=model, lora={"targets": ["q_proj", "v_proj"]})
    assert _check(recipe, Method.LORA, Method.FULL) == []
    with pytest.raises(ModelError, match=r"method qlora: .*leave qlora out of compare\.methods"):
        _check(recipe, *Method)
    with pytest.raises(ModelError, match=r"experts") as caught:
        _check(recipe, Method.QLORA)
    assert "compare.methods" not in str(caught.value)


def test_bf16_weights_need_bf16_precision(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(full={"weights": "bf16"})
    with pytest.raises(RecipeError, match=r"full\.weights: bf16 cannot .*precision: fp32; set"):
        _check(recipe, Method.FULL)
    assert _check(recipe, Method.LORA) == []
    assert _check(make_recipe(full={"weights": "bf16"}, train={"precision": "bf16"})) == []
    recipe = make_recipe(full={"weights": "bf16"}, train={"precision": "auto"})
    monkeypatch.setattr("tunefork.trial.check.pick_dtype", lambda *_: torch.float32)
    with pytest.raises(RecipeError, match=r"precision: auto, which is fp32 on this machine"):
        _check(recipe, Method.FULL)


# Tokens and positions


@pytest.mark.parametrize("kind", [GPT2Config, OPTConfig])
def test_learned_positions_end(make_recipe: Make, tmp_path: Path, kind: Any) -> None:
    sizes = {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 128}
    model = _save(tmp_path / "model", kind, **sizes)
    assert _check(make_recipe(model=model)) == []
    with pytest.raises(ModelError, match=r"data\.max_length: .*129 tokens.*learned 128 positions"):
        _check(make_recipe(model=model, data={"max_length": 129}))
    generated = {"metrics": ["exact_match"], "max_new_tokens": 128}
    with pytest.raises(ModelError, match=r"evaluate\.max_new_tokens: .*learned 128 positions"):
        _check(make_recipe(model=model, evaluate=generated))


def test_learned_positions_end_for_a_longer_label_too(make_recipe: Make, tmp_path: Path) -> None:
    model = _save(tmp_path / "model", GPT2Config, max_position_embeddings=128)
    labels = ["fox", "dog", "a" * 99]
    with pytest.raises(ModelError, match=r"data\.max_length \(an evaluation prompt with a label\)"):
        _check(make_recipe(model=model, data={"labels": labels, "instruction": "Which?"}))


def test_sequences_over_a_rotary_context_are_said(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CONFIGS["llama"], "max_position_embeddings", 16)
    save_model(tmp_path / "short")
    (said,) = _check(make_recipe(model=str(tmp_path / "short")))
    assert "warning: data.max_length: 18 of 18 examples are longer than the 16 tokens" in said


def test_a_foreign_tokenizer_is_refused(make_recipe: Make, tmp_path: Path) -> None:
    model = _save(tmp_path / "model", GPT2Config, vocab_size=40, max_position_embeddings=128)
    with pytest.raises(
        ModelError, match=r"gives the id \d+, but the model's vocabulary ends at 39"
    ):
        _check(make_recipe(model=model))


def test_warnings_of_the_data_are_said(make_recipe: Make) -> None:
    recipe = make_recipe(data={"bad_rows": "drop"})
    with Path(recipe.data.train).open("a") as stream:
        stream.write("no JSON\n")
    (said,) = _check(recipe)
    assert said.startswith("warning: 1 of 19 rows cannot be used and are left out")
