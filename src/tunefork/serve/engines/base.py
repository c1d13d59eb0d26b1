"""The base that is served, in the form that was asked for, and slots for adapters over it."""

from collections.abc import Sequence
from typing import Any, Literal

import torch

from tunefork.export.dense import merge_deltas
from tunefork.kernels.bank_tables import TERMS
from tunefork.model.add_bank import add_serving_bank
from tunefork.model.bank import Bank
from tunefork.model.bank_linear import BankLinear
from tunefork.model.build import quantize_nf4
from tunefork.model.fused import FusedGroup, fuse
from tunefork.model.load import load_model
from tunefork.model.own_rows import keep_rows
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
        # Tensor cores and grouped products take ranks in steps of 16, and so do rows.
        rank = -(-ours.max_rank // TERMS) * TERMS
        bank = add_serving_bank(model, slots=ours.slots, rank=rank)
    has_kernels = device.type == "cuda" and dtype == torch.bfloat16
    groups = []
    if is_fp8 or (ours.fuse and not is_nf4 and (has_kernels or device.type == "cpu")):
        form: Literal["bf16", "fp8"] = "fp8" if is_fp8 else "bf16"
        groups = fuse(model, form, form, device)
    if bank is not None:
        bank.to(device)
        if has_kernels:
            for group in groups:
                group.join_banks()
        else:
            keep_as_rows(bank, groups)
    if groups and device.type == "cpu":
        _let_files_go(model)
    return model, bank


def _let_files_go(model: Any) -> None:
    """Groups have copies of their weights; views of the mapped files would keep all of these."""
    for module in model.modules():
        if not isinstance(module, BankLinear):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.data = tensor.data.clone()


def keep_as_rows(bank: Bank, groups: Sequence[FusedGroup]) -> None:
    """On a CPU, or in fp32, adapters are kept in rows: those of a group's layers together."""
    for group in groups:
        group.keep_rows()
    for layer in bank.layers.values():
        if layer.kept is None:
            keep_rows([layer])
