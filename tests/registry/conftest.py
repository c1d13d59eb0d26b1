"""Records and run folders as training leaves them, without the training."""

from pathlib import Path
from typing import Any

import pytest

from tests.folders import save_model
from tunefork.model.build import build
from tunefork.model.identity import Identity
from tunefork.model.linear import LoraLinear
from tunefork.recipe import LoraSection, Method, Recipe
from tunefork.recipe_file import parse
from tunefork.registry.claim import Claim, claimed
from tunefork.registry.peft_format import save_adapter
from tunefork.registry.run import ADAPTER, MODEL, RunRecord, write_record

LORA = LoraSection(rank=4)
IDENTITY = Identity(weights_sha256="a" * 64, tokenizer_sha256="b" * 64, template_sha256=None)
CLAIM = Claim(verb="train", data_sha256="0" * 64)


def make_record(**fields: Any) -> RunRecord:
    """A finished LoRA run's, but for `fields`."""
    record = {
        "status": "ok",
        "method": "lora",
        "seed": 0,
        "learning_rate": 2e-4,
        "model_id": "owner/name",
        "model_revision": None,
        "total_params": 100,
        "trainable_params": 10,
        "num_steps": 3,
        "tokens": 300,
        "supervised_tokens": 30,
        "train_s": 1.5,
        "tokens_per_s": 200.0,
        "peak_memory_bytes": 2**30,
        "memory_kind": "resident",
        "artifact": "adapter",
        "artifact_bytes": 1000,
        "evaluate_s": 0.5,
        "metrics": {"loss": [1.25, 1.0, 1.5], "perplexity": [3.5, 2.7, 4.5]},
        "majority_share": None,
        "created": "2026-11-24T12:00:00+00:00",
        "device": {"name": "a CPU", "threads": 2, "memory_bytes": 2**33},
        "versions": {"torch": "2.13.0"},
    }
    return RunRecord.model_validate(record | fields)


def trained(model: Any, method: Method) -> Any:
    """`model` with deltas that are no longer zero, as training by `method` leaves it."""
    build(model, method, LORA, seed=0)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.lora_b.data.normal_(std=0.1)
    return model.requires_grad_(False).eval()


def save_run(folder: Path, model: Any, base: Path, method: Method, **data: Any) -> Recipe:
    """A finished run of `method` over `base` in `folder`; returns its recipe."""
    recipe = parse({"model": str(base), "data": {"train": "rows.jsonl"} | data, "method": method})
    with claimed(folder, recipe, CLAIM):
        pass
    artifact = MODEL if method is Method.FULL else ADAPTER
    if method is Method.FULL:
        save_model(folder / artifact, seed=1)
    else:
        save_adapter(model, folder / artifact, LORA, base=str(base))
    write_record(folder, make_record(method=method, model_id=str(base), artifact=artifact))
    return recipe


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama's folder."""
    folder = tmp_path_factory.mktemp("base")
    save_model(folder)
    return folder
