"""From settings to what the engine's loop runs: the base, its slots, its cache, its passes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch

from tunefork.errors import ModelError
from tunefork.kernels.draw import draw
from tunefork.model.device import has_fp8, pick_device, pick_dtype, use_device
from tunefork.model.load import load_tokenizer
from tunefork.serve.engine import ServedAdapter
from tunefork.serve.engines.adapter_file import read_adapter
from tunefork.serve.engines.base import load_base
from tunefork.serve.engines.cache import Cache, bytes_a_token, layer_shapes, takes_flash
from tunefork.serve.engines.checked import Checks
from tunefork.serve.engines.core import Core, Parcel
from tunefork.serve.engines.cores import use_one_core
from tunefork.serve.engines.embedded_settings import EmbeddedSettings
from tunefork.serve.engines.grammar import Grammars, is_available
from tunefork.serve.engines.passes import Passes
from tunefork.serve.engines.slots import BankSlots
from tunefork.serve.engines.tiers import Tiers
from tunefork.serve.engines.trial import ROOM, TRIED
from tunefork.serve.settings import ServeSettings

_GPU_SHARE = 0.85
"""Of free GPU memory for the cache; passes need the rest."""
_CPU_CACHE_BYTES = 4 * 2**30
_MOST_CACHE_TOKENS = {"cuda": 1 << 20, "cpu": 1 << 17}
_MANY_KV_HEADS = 4
"""With so many, attention over many rows has enough to do without cutting long ones into pieces."""
_PREFILL_TOKENS = {"cuda": 2048, "cpu": 256}


@dataclass(slots=True)
class Assembled:
    """A loaded engine."""

    core: Core
    tokenizer: Any
    grammars: Grammars | None
    model: Any
    max_model_len: int
    vocabulary: int
    info: dict[str, Any]


def assemble(
    settings: ServeSettings,
    post: Callable[[list[Parcel]], None],
    merged: ServedAdapter | None = None,
) -> Assembled:
    """Load everything. `merged`: the base takes this adapter's place, and has no slots.

    Raises TuneforkError.
    """
    ours = settings.embedded
    device = pick_device() if ours.device == "auto" else torch.device(ours.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"embedded.device: {ours.device}: there is no such CUDA device; set cpu or auto"
        )
    use_device(device)
    dtype = pick_dtype(ours.dtype, device)
    if ours.base_storage == "fp8" and not (has_fp8(device) and dtype == torch.bfloat16):
        raise ModelError(
            f"embedded.base_storage: fp8 needs a GPU that has it, and bf16; not {device}"
        )
    tokenizer = load_tokenizer(settings.base)
    model, bank = load_base(settings, device, dtype, merged)
    slots = None if bank is None else BankSlots(bank)
    layers = layer_shapes(model)
    own_limit = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 8192)
    cache_tokens = _cache_tokens(ours, bytes_a_token(layers, dtype), own_limit, device)
    cache = Cache(layers, cache_tokens, dtype, device)
    # What has no room in an empty cache would wait for ever.
    max_model_len = min(ours.max_model_len or own_limit, own_limit, cache.total)
    prefill_tokens = ours.prefill_tokens or _PREFILL_TOKENS[device.type]
    flash = takes_flash(layers, dtype, device)
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    max_rows, graphs = max(ours.max_requests, TRIED), flash and ours.cuda_graphs
    groups = {la.groups for la in layers if la.groups > 1 and la.kv_heads >= _MANY_KV_HEADS}
    checks, few = Checks(device, dtype), 0
    if bank is not None and device.type == "cpu":
        checks.rows(bank)
    if graphs and slots is not None and slots.takes_tiles and slots.few:
        few = slots.few if checks.mixes(slots.bank, max_rows + TRIED) else 0
    passes = Passes(
        model,
        _ignore if slots is None else slots.route,
        max_tokens=max(prefill_tokens, ROOM),
        max_rows=max_rows,
        max_model_len=max_model_len,
        flash=flash,
        graphs=graphs,
        compiles=flash and ours.compile,
        groups=groups,
        apart=graphs and bool(groups) and checks.reads_apart(layers, groups),
        few=few,
        tries=slots is not None,
        draw_by=checks.draw(vocabulary) if device.type == "cuda" else draw,
    )
    passes.warm(has_slots=slots is not None)
    if passes.graphs is not None and passes.graphs.captured_tokens:
        checks.captured(passes, cache, has_slots=slots is not None)
        if slots is not None and passes.graphs.captured_tokens:
            passes.rows_are_alike = checks.rows_are_alike(passes, cache)
    make_tiers = None
    if bank is not None and slots is not None:
        read = partial(
            read_adapter,
            skeleton=bank.skeleton,
            max_rank=ours.max_rank,
            most=slots.most,
        )
        begin = use_one_core if device.type == "cpu" else None
        make_tiers = partial(_tiers, slots, read, ours.host_memory_bytes, begin)
    core = Core(
        passes,
        cache,
        tokenizer,
        post,
        make_tiers,
        max_requests=ours.max_requests,
        prefill_tokens=prefill_tokens,
        ahead=ours.ahead,
    )
    grammars = Grammars(tokenizer, vocabulary) if is_available() else None
    info = {
        "engine": "embedded",
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "base_storage": ours.base_storage,
        "attention": "flash" if flash else "sdpa",
        "cuda_graphs": passes.graphs is not None and passes.graphs.is_on,
        "compiled": passes.graphs is not None and passes.graphs.compiled is not None,
        "captured_tokens": 0 if passes.graphs is None else passes.graphs.captured_tokens,
        "without": ", ".join(checks.without) or "nothing",
        "torch": torch.__version__,
    }
    return Assembled(core, tokenizer, grammars, model, max_model_len, vocabulary, info)


def _tiers(
    slots: BankSlots,
    read: Any,
    host_memory_bytes: int,
    begin: Callable[[], None] | None,
    wake: Callable[[], None],
) -> Tiers:
    return Tiers(
        slots,
        read,
        host_memory_bytes=host_memory_bytes,
        wake=wake,
        clock=time.monotonic,
        begin=begin,
    )


def _ignore(*_: Any, **__: Any) -> None:
    """There are no slots to choose among."""


def _cache_tokens(
    settings: EmbeddedSettings, token_bytes: int, own_limit: int, device: torch.device
) -> int:
    if settings.cache_tokens is not None:
        return settings.cache_tokens
    longest = min(settings.max_model_len or own_limit, own_limit)
    most = min(_MOST_CACHE_TOKENS[device.type], settings.max_requests * longest + 64)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        room = int(_GPU_SHARE * (free + unused))
    else:
        room = min(_CPU_CACHE_BYTES, psutil.virtual_memory().available // 2)
    tokens = min(most, room // token_bytes)
    if tokens < 256:
        raise ModelError(
            f"embedded.cache_tokens: {device} has room for {tokens} tokens beside the base; use a "
            "device with more memory, fewer slots or base_storage: nf4"
        )
    return tokens
