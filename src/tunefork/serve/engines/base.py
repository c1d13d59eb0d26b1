"""The base that is served, in the form that was asked for, and slots for adapters over it."""

from typing import Any, Literal

import torch

from tunefork.export.dense import merge_deltas
from tunefork.model.bank import Bank, add_serving_bank
from tunefork.model.build import quantize_nf4
from tunefork.model.fused import fuse
from tunefork.model.load import load_model
from tunefork.registry.peft_format import load_adapter
from tunefork.serve.engine import ServedAdapter
from tunefork.serve.settings import ServeSettings


def load_base(
    settings: ServeSettings, device: torch.device, dtype: torch.dtype, merged: ServedAdapter | None
) -> tuple[Any, Bank | None]:
    """The model, frozen on `device`, and its bank. `merged`: with that adapter in its weights, and
    no bank. Raises ModelError or AdapterError."""
    ours = settings.embedded
    is_nf4, is_fp8 = ours.base_storage == "nf4", ours.base_storage == "fp8"
    model = load_model(settings.base, dtype=dtype, device=device, in_host_memory=is_nf4)
    if merged is not None:
        load_adapter(model, merged.folder)
        merge_deltas(model, dtype)
    if is_nf4:
        quantize_nf4(model, device)
    model.to(device).eval().requires_grad_(False)
    bank = None
    if merged is None:
        # Beside bf16 on a CPU, A in fp32 is the quicker one (`kernels/bank_stretches.py`).
        wide = torch.float32 if device.type == "cpu" else dtype
        # Tensor cores and grouped products take ranks in steps of 16.
        rank = ours.max_rank if device.type == "cpu" else -(-ours.max_rank // 16) * 16
        bank = add_serving_bank(model, slots=ours.slots, rank=rank, dtype_a=wide)
    can_fuse = device.type == "cuda" and dtype == torch.bfloat16 and not is_nf4
    if is_fp8 or (can_fuse and ours.fuse):
        form: Literal["bf16", "fp8"] = "fp8" if is_fp8 else "bf16"
        groups = fuse(model, form, form, device)
        if bank is not None:
            bank.to(device)
            for group in groups:
                group.join_banks()
    return model, bank
