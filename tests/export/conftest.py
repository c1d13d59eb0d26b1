"""Runs as training leaves them, over a tiny llama in bf16 or fp32, without the training."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.folders import save_model
from tests.registry.conftest import save_run, trained
from tunefork.model.device import pick_device
from tunefork.model.load import load_model
from tunefork.recipe import Method, ModelSection

MakeRun = Callable[..., Path]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models are too small for a GPU to matter."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Write a run of `method` over a base in `dtype`; returns its folder."""

    def make(
        method: Method = Method.LORA,
        *,
        dtype: torch.dtype = torch.bfloat16,
        architecture: str = "llama",
        name: str = "run",
    ) -> Path:
        base = tmp_path / f"base-{architecture}"
        if not base.exists():
            save_model(base, architecture).to(dtype).save_pretrained(base)
        section = ModelSection(id=str(base))
        model = load_model(section, dtype=dtype, device=pick_device())
        torch.manual_seed(sum(map(ord, name)))
        save_run(tmp_path / name, trained(model, method), base, method)
        return tmp_path / name

    return make
