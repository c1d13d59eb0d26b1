"""A sweep on a GPU, where a step's figures come one step late: nothing is lost, each as alone."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.folders import save_tokenizer
from tests.recipes import rows
from tests.tiny import CONFIGS
from tunefork.recipe import Recipe
from tunefork.recipe_file import load, parse
from tunefork.registry.run import read_record
from tunefork.sweep.sweep import sweep
from tunefork.train.events import EVENTS, read_steps
from tunefork.trial.trial import train_run

pytestmark = pytest.mark.gpu


def _recipe(folder: Path, **train: Any) -> Recipe:
    (folder / "base").mkdir()
    config = copy.deepcopy(CONFIGS["llama"])
    config.update({"hidden_size": 256, "intermediate_size": 512, "head_dim": 64})
    config.vocab_size = save_tokenizer(folder / "base")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    for name, given in (("train", rows(60)), ("eval", rows(20, 500))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    return parse(
        {
            "model": str(folder / "base"),
            "data": {
                "train": str(folder / "train.jsonl"),
                "eval": str(folder / "eval.jsonl"),
                "max_length": 128,
            },
            "train": {"max_steps": 12, "batch_size": 4, "epochs": 4, "precision": "bf16"} | train,
            "evaluate": {"forgetting": None, "bootstrap_samples": 200},
            "sweep": {
                "rank": [4, 16],
                "learning_rate": [1e-4, 3e-3],
                "validation_share": 0.3,
                "halving": {"rungs": 1},
                "together": 3,
            },
        }
    )


@pytest.mark.parametrize(
    "train",
    [
        {"compile": "never"},
        {"compile": "always"},
        {"compile": "always", "activation_checkpointing": "full"},
        {"compile": "never", "checkpoint_every_steps": 2},
    ],
)
def test_variants_end_as_alone(tmp_path: Path, train: dict[str, Any]) -> None:
    result = sweep(_recipe(tmp_path, **train), tmp_path / "out", say=lambda line: None)
    assert sorted(v.status for v in result.variants) == ["dropped", "dropped", "ok", "ok"]
    assert result.tokens_per_s is not None and result.peak_memory_bytes
    for variant in result.variants:
        folder = tmp_path / "out" / variant.folder
        steps = read_steps(folder / EVENTS)
        assert [s.step for s in steps] == list(range(1, variant.num_steps + 1))
        assert variant.num_steps == (12 if variant.status == "ok" else 6)
        if variant.status == "ok":
            alone = tmp_path / variant.name
            record = train_run(load(folder / "recipe.yaml"), alone, say=lambda line: None)
            own = read_record(folder)
            assert own is not None and own.tokens == record.tokens
            assert own.metrics["loss"][0] == pytest.approx(record.metrics["loss"][0], rel=0.05)
            losses = [s.loss for s in read_steps(alone / EVENTS)]
            assert [s.loss for s in steps] == pytest.approx(losses, rel=0.05)
