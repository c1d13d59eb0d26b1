"""The base of a vLLM that has no GPU, which must be asked for as an adapter that changes nothing.

vLLM marks tokens of the base with slot -1. Its kernels for GPUs pass over those; the plain PyTorch
ones for CPUs index with it, which is the last slot (lora/ops/torch_ops/lora_ops.py of 0.32):
once that slot is filled, answers of the base in a batch with adapters are made with whatever
adapter lies there. So on such a build the base gets a slot of its own, of zeros.
"""

import asyncio
import json
import re
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from tunefork.model.load import load_skeleton
from tunefork.recipe import ModelSection
from tunefork.serve.engine import ServedAdapter

ZERO_ID = "tunefork-base:v0"
"""Versions of the store begin with 1."""

_READ_VERSION = (
    "import importlib.util as u, pathlib as p; s = u.find_spec('torch'); "
    "print(p.Path(s.origin).with_name('version.py').read_text() if s else '')"
)
_LOOK_S = 60.0


async def is_built_for_cpus(python: Path) -> bool:
    """Whether the PyTorch of `python` knows no accelerator. It is read, not imported."""
    process = await asyncio.create_subprocess_exec(
        str(python), "-I", "-c", _READ_VERSION, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL
    )
    async with asyncio.timeout(_LOOK_S):
        told, _ = await process.communicate()
    values = re.findall(r"^(?:cuda|hip|rocm|xpu)\b[^=]*= *(.+)$", told.decode(), re.MULTILINE)
    return bool(values) and all(value.strip() == "None" for value in values)


def save_zeros(section: ModelSection, folder: Path) -> ServedAdapter:
    """An adapter of rank 1 on one layer whose delta is nothing."""
    layers = load_skeleton(section).named_modules()
    name, layer = next(
        (name, module)
        for name, module in layers
        if isinstance(module, nn.Linear) and "layers" in name
    )
    folder.mkdir(parents=True, exist_ok=True)
    prefix = f"base_model.model.{name}"
    tensors = {
        f"{prefix}.lora_A.weight": torch.zeros(1, layer.in_features),
        f"{prefix}.lora_B.weight": torch.zeros(layer.out_features, 1),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 1,
        "lora_alpha": 1,
        "target_modules": [name.rsplit(".", 1)[-1]],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return ServedAdapter(ZERO_ID, folder, 1, 0)
