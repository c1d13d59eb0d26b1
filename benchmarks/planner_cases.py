"""The planner's grid on one H200: which runs, and which of them no fit sees.

A third of the cases, chosen by a salted hash of their names, and one whole model size are held out
from the fit. The list of them is a file, `planner_h200_held_out.txt`, committed before the grid is
measured; `planner_h200.py fit` refuses a list that differs from the hash's.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def _llama(
    width: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        **more,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "135m": _llama(576, 1536, 30, 9, 3, 49_152),
    "360m": _llama(960, 2560, 32, 15, 5, 49_152),
    "0.6b": _llama(1024, 3072, 28, 16, 8, 151_936, model_type="qwen3", head_dim=128),
    "1b": _llama(2048, 8192, 16, 32, 8, 128_256),
    "1.7b": _llama(2048, 6144, 28, 16, 8, 151_936, model_type="qwen3", head_dim=128),
    "3b": _llama(3072, 8192, 28, 24, 8, 128_256),
    "8b": _llama(4096, 14_336, 32, 32, 8, 128_256, tie_word_embeddings=False),
    "tiny": _llama(64, 160, 4, 4, 2, 512),
}
"""SmolLM2-135M and -360M, Qwen3-0.6B, Llama-3.2-1B, Qwen3-1.7B, Llama-3.2-3B, Llama-3.1-8B; and one
to try the script on a CPU with."""

HELD_OUT_SHAPE = "1.7b"
"""A size that no run had been measured of when the model of time and memory was settled."""
SALT = "tunefork planner, third grid"
HELD_OUT_FILE = Path(__file__).with_name("planner_h200_held_out.txt")

CASES = [
    "8b-lora-8x2048-int8",
    "8b-lora-8x2048",
    "8b-lora-8x64-int8",
    "8b-qlora-8x1024-int8-offload",
    "8b-full-4x2048-bf16-8bit-full-eager",
    "8b-full-4x2048-bf16-full-released",
    "1.7b-lora-4x1536-int8",
    "1.7b-qlora-8x1024-full",
    "1.7b-full-4x2048-adamwbf16-full",
    "1.7b-lora-8x1536-full-eager",
    "8b-lora-4x2048-int8-full",
    "8b-lora-4x1536-r64-int8-selective",
    "8b-lora-2x2048-eager",
    "8b-qlora-4x2048-full-eager",
    "8b-qlora-4x2048-int8",
    "1b-lora-8x1024",
    "1b-qlora-8x768-int8-offload",
    "1b-lora-4x4096-full-eager",
    "1b-full-8x768-eager",
    "3b-lora-8x1024-offload",
    "3b-qlora-2x2048-eager",
    "3b-full-4x2048-bf16-full-eager",
    "0.6b-lora-4x1024-packed",
    "0.6b-full-8x768",
    "360m-lora-8x1024-int8-full",
    "360m-full-8x512-8bit-eager",
    "135m-lora-16x768",
    "135m-full-8x512",
    "135m-qlora-12x1024-packed-eager",
    "360m-qlora-8x1024-packed-eager",
    "360m-lora-12x768-packed-eager",
    "135m-full-16x512-8bit-eager",
    "0.6b-full-4x512-8bit-eager",
    "135m-full-8x512-bf16-eager",
    "360m-full-8x512-bf16-eager",
    "0.6b-full-4x512-bf16-eager",
    "0.6b-lora-4x512-eager",
    "0.6b-qlora-4x512-eager",
]
"""In the order in which they are measured: should time be short, what matters most is there.
Compiled, and captured where the engine would, unless the name ends in `eager`. The last nine are at
the host's pace, of which the others tell too little."""
CHECKPOINTING = ("selective", "full", "offload")
OPTIMIZERS = {"8bit": "adamw_8bit", "adamwbf16": "adamw_bf16"}
TIMED, TIMED_SMALL, TIMED_LAUNCHED = 6, 20, 60
"""Steps whose median is the figure; more where the host may set the pace, and most where Python
starts every operation: such steps scatter by a third and more."""
_SMALL = ("135m", "360m", "0.6b")


@dataclass(frozen=True, slots=True)
class Case:
    """One run."""

    name: str
    shape: str
    method: str
    rows: int
    length: int
    rank: int
    checkpointing: str
    compiled: bool
    int8: bool
    packed: bool
    """Examples of many lengths share rows."""
    weights: str
    optimizer: str
    released: bool
    """Each weight is updated, and its gradient let go, within the backward pass."""

    @property
    def held_out(self) -> bool:
        """Chosen before anything was measured."""
        digest = hashlib.sha256(f"{SALT}: {self.name}".encode()).digest()
        return self.shape == HELD_OUT_SHAPE or digest[0] % 3 == 0


def read_case(name: str) -> Case:
    """The run that a name stands for."""
    shape, method, size, *options = name.split("-")
    rows, length = size.split("x")
    ranks = [int(option[1:]) for option in options if re.fullmatch(r"r\d+", option)]
    return Case(
        name=name,
        shape=shape,
        method=method,
        rows=int(rows),
        length=int(length),
        rank=ranks[0] if ranks else 16,
        checkpointing=next((o for o in options if o in CHECKPOINTING), "none"),
        compiled="eager" not in options,
        int8="int8" in options,
        packed="packed" in options,
        weights="bf16" if {"bf16", "adamwbf16"} & set(options) else "fp32",
        optimizer=next((kind for name, kind in OPTIMIZERS.items() if name in options), "adamw"),
        released="released" in options,
    )


def config(shape: str) -> Any:
    """The transformers configuration of a shape."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**SHAPES[shape])


def lengths(case: Case) -> list[list[int]]:
    """Tokens of each step's examples."""
    import numpy as np

    from tunefork.plan.short_run import WARM_UP

    draw = np.random.default_rng(0)
    steps = []
    is_small = case.shape in _SMALL or case.rows * case.length <= 1024
    many = TIMED_SMALL if case.compiled else TIMED_LAUNCHED
    few = TIMED if case.compiled or case.method == "full" else TIMED_SMALL
    timed = many if is_small else few
    for _ in range(WARM_UP + timed):
        if case.packed:
            drawn = draw.integers(case.length // 8, case.length // 2, 4 * case.rows)
            steps.append(drawn[np.cumsum(drawn) < 0.85 * case.rows * case.length].tolist())
        else:
            steps.append([case.length] * case.rows)
    return steps


def build_of(case: Case) -> Any:
    """How the planner describes the case's model."""
    import torch

    from tunefork.plan.built import Build
    from tunefork.recipe import FullSection, LoraSection, Method

    return Build(
        method=Method(case.method),
        lora=LoraSection(rank=case.rank),
        full=FullSection(
            weights=case.weights,  # type: ignore[arg-type]
            optimizer=case.optimizer,  # type: ignore[arg-type]
            gradient_release=case.released,
        ),
        dtype=torch.bfloat16,
        checkpointing=case.checkpointing,  # type: ignore[arg-type]
        device="cuda",
        wants_int8=case.int8,
        is_compiled=case.compiled,
    )


def held_out() -> list[str]:
    """Names of the cases that no fit sees."""
    return [name for name in CASES if read_case(name).held_out]
