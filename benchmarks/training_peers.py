"""How benchmarks/h200_training.py runs tunefork's peers, each by its own public means."""

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.training_runs import (
    ALPHA,
    LEARNING_RATE,
    NUM_LOSSES,
    RANK,
    Run,
    pick,
    read_batches,
)

_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peft(run: Run, folder: Path) -> dict[str, Any]:
    """PEFT + transformers, or transformers alone for full fine-tuning; with Liger or without.

    `defaults`: PEFT's fp32 adapters under autocast. Otherwise bf16 adapters and no autocast.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    started = time.perf_counter()
    if run.tool == "peft_liger":
        import_module("liger_kernel.transformers").apply_liger_kernel_to_llama()
    is_qlora, is_full = run.options.get("nf4", False), run.options.get("full", False)
    more: dict[str, Any] = {}
    if is_qlora:
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    if torch.cuda.is_available():
        more["device_map"] = {"": 0}
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa", use_cache=False, **more
    )
    if run.options.get("checkpointing"):
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    defaults = run.options.get("defaults", False)
    if not is_full:
        model = _with_adapter(model, run, defaults)
    autocast = defaults and not is_full
    return {"load_s": time.perf_counter() - started} | _train(model, folder, autocast)


def _with_adapter(model: Any, run: Run, defaults: bool) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    model.requires_grad_(False)
    if run.options.get("checkpointing"):
        model.enable_input_require_grads()
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=_TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, config, autocast_adapter_dtype=defaults)
    if not defaults:  # over NF4, PEFT leaves them in fp32
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    return model


def unsloth(run: Run, folder: Path) -> dict[str, Any]:
    """Unsloth as its notebooks set it up; `checkpointing` is its own, with offload."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1")
    fast_language_model = import_module("unsloth").FastLanguageModel  # patches later imports
    import torch

    started = time.perf_counter()
    model, _ = fast_language_model.from_pretrained(
        str(folder),
        max_seq_length=2048,
        dtype=torch.bfloat16,
        load_in_4bit=run.options.get("nf4", False),
    )
    model = fast_language_model.get_peft_model(
        model,
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth" if run.options.get("checkpointing") else False,
        target_modules=_TARGETS,
    )
    return {"load_s": time.perf_counter() - started} | _train(model, folder, autocast=True)


def _train(model: Any, folder: Path, autocast: bool) -> dict[str, Any]:
    """The peers' loop: forward, backward and AdamW over tokens that are on the device already."""
    import torch

    device, is_cuda = pick(), torch.cuda.is_available()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    rows, order = read_batches(folder)
    tokens = torch.from_numpy(rows).long().to(device)
    steps_s, losses = list[float](), list[float]()
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    for chosen in torch.from_numpy(order).to(device):
        begin = time.perf_counter()
        ids = tokens[chosen]
        with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if is_cuda:
            torch.cuda.synchronize()
        steps_s.append(time.perf_counter() - begin)
    return {
        "first_step_s": steps_s[0],
        "steps_s": steps_s,
        "losses": losses[:NUM_LOSSES],
        "trained_parameters": sum(p.numel() for p in trained),
        "trained_dtype": "+".join(sorted({str(p.dtype).removeprefix("torch.") for p in trained})),
    }


PEERS: dict[str, Callable[[Run, Path], dict[str, Any]]] = {
    "unsloth": unsloth,
    "peft": peft,
    "peft_liger": peft,
}
