"""One run of benchmarks/h200_training.py: a tool trains the same model on the same batches.

Every tool loads the same random weights from one folder, takes the same batches of random tokens in
the same order, all of them supervised, and AdamW at one constant rate without decay or clipping.
Each is run in a process of its own, because tools patch transformers and memory is not given back.

tunefork's figure is of its real loop (`train_method`): batches laid out, gradients measured and the
loss read in each step. The peers' loop does less: tokens are on the device, nothing is clipped.
"""

import itertools
import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

LEARNING_RATE = 1e-4
RANK, ALPHA = 16, 32
WARM_UP = 3
"""Steps that are not timed: kernels are loaded, compiled and captured in them."""
NUM_LOSSES = 20
BATCHES = "batches.npz"
_PACKAGES = (
    *("torch", "triton", "transformers", "peft", "bitsandbytes", "liger-kernel"),
    *("unsloth", "unsloth_zoo", "tunefork"),
)


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama with random weights."""

    width: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


EIGHT_B = Shape(4096, 14_336, 32, 32, 8, 128_256)
TINY = Shape(64, 96, 2, 4, 2, 256)


@dataclass(frozen=True, slots=True)
class Run:
    """What one process trains, and how."""

    name: str
    tool: str
    rows: int
    length: int
    options: dict[str, Any] = field(default_factory=dict)
    """tunefork: recipe fields (`train.precision`); peers: what `training_peers.py` reads."""


def make_model(folder: Path, shape: Shape) -> None:
    """Write the weights that every tool loads: normal, standard deviation 0.02, bf16."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=8192,
        initializer_range=0.02,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    with pick():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    words = {f"t{i}": i for i in range(shape.vocabulary)}
    tokenizer = PreTrainedTokenizerFast(  # Unsloth loads none without one
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t3")),
        bos_token="t0",
        eos_token="t1",
        pad_token="t2",
        unk_token="t3",
    )
    tokenizer.save_pretrained(folder)


NO_GPU = 7
"""Exit status of a run that would have taken hours on a CPU."""


def need_gpu(folder: Path) -> None:
    """End here where `folder`'s model is no tiny one and there is no GPU, or none any more."""
    import torch

    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    if width > TINY.width and not torch.cuda.is_available():
        raise SystemExit(NO_GPU)


def draw_batches(run: Run, num_steps: int, vocabulary: int) -> dict[str, Any]:
    """Two batches' rows of random tokens, and which rows each step takes."""
    from tunefork.data.loader import steps

    draw = np.random.default_rng(0)
    rows = draw.integers(3, vocabulary, (2 * run.rows, run.length)).astype(np.int32)
    order = steps(len(rows), batch_size=run.rows, epochs=num_steps, max_steps=num_steps, seed=0)
    return {"rows": rows, "order": np.array(order)}


def measure(run: Run, folder: Path) -> dict[str, Any]:
    """Train in this process, on `folder`'s weights and its batches, and say what it took."""
    start = time.perf_counter()
    if run.tool == "tunefork":
        found = ours(run, folder)
    else:
        from benchmarks.training_peers import PEERS

        found = PEERS[run.tool](run, folder)
    steps_s = found.pop("steps_s")[WARM_UP:]
    median = statistics.median(steps_s)
    import torch

    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "step_s": median,
        "tokens_per_s": run.rows * run.length / median,
        "spread": (max(steps_s) - min(steps_s)) / median,
        "timed_steps": len(steps_s),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if gpu else None,
        **found,
        "process_s": time.perf_counter() - start,
        "versions": versions(),
    }


def ours(run: Run, folder: Path) -> dict[str, Any]:
    """tunefork: what `tunefork train` calls, from the recipe on, with no evaluation or saving."""
    import torch

    from tunefork.data.example import Encoded
    from tunefork.model.device import pick_device, pick_dtype
    from tunefork.train.method import load_for_training, train_method

    rows, order = read_batches(folder)
    recipe = recipe_of(run, folder, num_steps=len(order))
    device, method = pick_device(), recipe.method
    dtype = pick_dtype(recipe.train.precision, device)
    is_cold = not any(Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", "-")).glob("*"))
    every = np.ones(run.length, dtype=np.bool_)
    examples = [Encoded(f"row {i}", row, every) for i, row in enumerate(rows)]
    started = time.perf_counter()
    with _read_onto(device):
        model = load_for_training(
            recipe, method, dtype=dtype, device=device, seed=0, examples=examples
        )
    ends, losses = [time.perf_counter()], list[float]()

    def on_step(record: Any) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        losses.append(record.loss)

    train_method(
        model,
        examples,
        recipe,
        method,
        learning_rate=LEARNING_RATE,
        seed=0,
        pad_id=0,
        on_step=on_step,
    )
    return {
        "load_s": ends[0] - started,
        "first_step_s": ends[1] - ends[0],
        "compile_cache": "cold" if is_cold else "warm",
        "compiled": _compiled_graphs(),
        "steps_s": [b - a for a, b in itertools.pairwise(ends)],
        "losses": losses[:NUM_LOSSES],
    }


def _compiled_graphs() -> dict[str, int]:
    """How many graphs came from the compiler's cache, and how many were compiled."""
    from torch._dynamo.utils import counters

    found = counters["inductor"]
    return {"cached": found["fxgraph_cache_hit"], "anew": found["fxgraph_cache_miss"]}


def _read_onto(device: Any) -> AbstractContextManager[Any]:
    """Weights go to the GPU as they are read: by way of host memory 16 GB take seconds more."""
    from tunefork.model.load import load_model

    def read(*sections: Any, **options: Any) -> Any:
        with device:
            return load_model(*sections, **options)

    is_cuda = device.type == "cuda"
    return patch("tunefork.train.method.load_model", read) if is_cuda else nullcontext()


def recipe_of(run: Run, folder: Path, *, num_steps: int) -> Any:
    """The recipe of one of our runs; its options over what all of them share."""
    from tunefork.recipe_file import parse

    fields: dict[str, Any] = {
        "model": str(folder),
        "data": {"train": "random tokens", "max_length": run.length},
        "lora": {"rank": RANK, "alpha": ALPHA},
        "train": {
            "batch_size": run.rows,
            "micro_batch_tokens": run.rows * run.length,
            "epochs": num_steps,
            "max_steps": num_steps,
            "learning_rate": LEARNING_RATE,
            "schedule": "constant",
            "warmup_share": 0.0,
            "max_grad_norm": 1e9,  # measured, as always, and never reached: peers do not clip
            "packing": False,  # a row is an example, as the peers' are
        },
    }
    for key, value in run.options.items():
        *path, last = key.split(".")
        at = fields
        for name in path:
            at = at.setdefault(name, {})
        at[last] = value
    return parse(fields, "benchmark")


def versions() -> dict[str, str]:
    """Of what this process may have used."""
    return dict(_installed())


def _installed() -> Iterator[tuple[str, str]]:
    import platform

    yield "python", platform.python_version()
    for package in _PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def read_batches(folder: Path) -> tuple[Any, Any]:
    """The rows (N, length), and the rows of each step (steps, batch)."""
    with np.load(folder / BATCHES) as file:
        return file["rows"], file["order"]


def pick() -> Any:
    """The GPU, where there is one."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
