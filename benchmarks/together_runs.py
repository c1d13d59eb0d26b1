"""One run of benchmarks/h200_together.py: a group of adapters over an 8B shape, or a peer.

`Run.rows` adapters with `Run.length` tokens each in a step; adapter n has rank RANKS[n % 4], and
rows of random tokens of its own, every token supervised. What is timed is the group's own step
(`Group.step`), figures read as it reads them: one step late, so that a call takes as long as the
step before it.

`looped` is what mLoRA (https://github.com/TUDB-Labs/mLoRA) does with several adapters, over our
layers and our base: one product with the base for all, then each adapter's slice by itself in a
Python loop, nothing compiled or captured.
"""

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.training_runs import LEARNING_RATE, NUM_LOSSES, WARM_UP, Run, pick, versions

RANKS = (8, 16, 32, 64)
NUM_ROWS = 2
"""Of each adapter, which take turns."""


def ranks_of(run: Run) -> list[int]:
    """Of each adapter. `options`: "rank", the same for all, and "most", what a tiny shape takes."""
    same, most = run.options.get("rank"), run.options.get("most", max(RANKS))
    return [same or min(most, RANKS[at % len(RANKS)]) for at in range(run.rows)]


def rows_of(adapter: int, length: int, vocabulary: int) -> Any:
    """(NUM_ROWS, length) token ids of one adapter."""
    draw = np.random.default_rng(adapter)
    return draw.integers(3, vocabulary, (NUM_ROWS, length)).astype(np.int32)


def measure_group(run: Run, folder: Path) -> dict[str, Any]:
    """Train in this process on `folder`'s weights, and say what it took."""
    import torch

    from tunefork.data.example import Encoded
    from tunefork.model.bank import BankAdapter
    from tunefork.model.device import pick_device, pick_dtype
    from tunefork.recipe import LoraSection
    from tunefork.train.member import Member, MemberStep
    from tunefork.train.together_build import group_of, load_for_group

    num_steps = run.options["steps"] + WARM_UP
    recipe, device = _recipe(run, folder, num_steps), pick_device()
    dtype = pick_dtype(recipe.train.precision, device)
    adapters = [
        BankAdapter(LoraSection(rank=rank, alpha=32), seed)
        for seed, rank in enumerate(ranks_of(run))
    ]
    is_cold = not any(Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", "-")).glob("*"))
    started = time.perf_counter()
    every = np.ones(run.length, dtype=np.bool_)
    vocabulary = run.options["vocabulary"]
    members = []
    for at, adapter in enumerate(adapters):
        rows = rows_of(at, run.length, vocabulary)
        members.append(
            Member(
                f"a{at}",
                adapter.lora,
                adapter.seed,
                [Encoded(f"row {i}", row, every) for i, row in enumerate(rows)],
                [[step % NUM_ROWS] for step in range(num_steps)],
                [LEARNING_RATE] * num_steps,
                max_grad_norm=1e9,  # measured, as always, and never reached: peers do not clip
            )
        )
    with _read_onto(device):
        bank = load_for_group(
            recipe,
            recipe.method,
            adapters,
            dtype=dtype,
            device=device,
            examples=members[0].examples,
        )
    load_s = time.perf_counter() - started
    is_looped = run.options.get("looped", False)
    with patch("tunefork.model.bank_linear.grouped", Looped(bank)) if is_looped else nullcontext():
        group = group_of(bank, members, recipe, pad_id=0)
        if run.options.get("keeps_operands"):  # else made again (`model/layers.py`)
            torch._functorch.config.cse = True
        steps_s, losses = list[float](), {"a0": list[float](), f"a{run.rows - 1}": list[float]()}
        while group.is_at_work:
            begin = time.perf_counter()
            events = group.step()
            if device.type == "cuda" and len(steps_s) < WARM_UP:
                torch.cuda.synchronize()
            steps_s.append(time.perf_counter() - begin)
            for event in events:
                if isinstance(event, MemberStep) and event.name in losses:
                    losses[event.name].append(event.record.loss)
    timed = steps_s[WARM_UP + 1 : -1]  # the first has no step before it to wait for
    median = statistics.median(timed)
    gpu = torch.cuda.is_available()
    parameters = sum(la.rows_a.numel() + la.rows_b.numel() for la in bank.layers.values())
    return {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "step_s": median,
        "tokens_per_s": run.rows * run.length / median,
        "spread": (max(timed) - min(timed)) / median,
        "timed_steps": len(timed),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if gpu else None,
        "load_s": load_s,
        "first_step_s": steps_s[0],
        "is_captured": bool(group.runner.graphs),
        "compile_cache": "cold" if is_cold else "warm",
        "losses": losses["a0"][:NUM_LOSSES],
        "last_adapters_losses": losses[f"a{run.rows - 1}"][:NUM_LOSSES],
        "ranks": ranks_of(run),
        "adapter_parameters": parameters,
        "adapter_gib": {
            "weights_fp32": 4 * parameters / 2**30,
            "gradients_fp32": 4 * parameters / 2**30,
            "moments_fp32": 8 * parameters / 2**30,
        },
        "process_s": time.perf_counter() - started,
        "versions": versions(),
    }


def _recipe(run: Run, folder: Path, num_steps: int) -> Any:
    from tunefork.recipe_file import parse

    train: dict[str, Any] = {
        "batch_size": 1,
        "micro_batch_tokens": run.rows * run.length,
        "epochs": num_steps,
        "max_steps": num_steps,
        "precision": "int8",
        "compile": "never" if run.options.get("looped") else "always",
        "packing": False,  # a row is an example, as the peers' are
    }
    train |= run.options.get("train", {})
    data = {"train": "random tokens", "max_length": max(8, run.length)}
    return parse({"model": str(folder), "data": data, "train": train}, "benchmark")


@contextmanager
def _read_onto(device: Any) -> Iterator[None]:
    """Weights go to the GPU as they are read: by way of host memory 16 GB take seconds more."""
    from tunefork.model.load import load_model

    def read(*sections: Any, **options: Any) -> Any:
        with pick():
            return load_model(*sections, **options)

    if device.type != "cuda":
        yield
        return
    with patch("tunefork.train.method.load_model", read):
        yield


class Looped:
    """`kernels.bank.grouped` as a loop over adapters, each a product of its own."""

    def __init__(self, bank: Any) -> None:
        self.bank = bank
        self.ranks = {layer.kind: layer.ranks for layer in bank.layers.values()}

    def __call__(
        self,
        x_sd: Any,
        ends_g: Any,
        rows_a: Sequence[Any],
        rows_b: Sequence[Any],
        kinds: Sequence[int],
        padded: Sequence[Any],
        is_even: bool,
    ) -> tuple[Any, ...]:
        """As `grouped`; segments' ends are those that the host knows."""
        import torch

        from tunefork.kernels.bank import spans

        routing, found = self.bank.routing, []
        for a, b, kind in zip(rows_a, rows_b, kinds, strict=True):
            a, b = a.to(x_sd.dtype), b.to(x_sd.dtype)
            parts = []
            slots = zip(spans(self.ranks[kind]), routing.bounds, routing.scales, strict=True)
            for (start, end), (first, last), scale in slots:
                parts.append(((x_sd[first:last] @ a[start:end].t()) @ b[start:end]) * scale)
            found.append(torch.cat(parts))
        return tuple(found)
