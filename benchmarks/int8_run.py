"""One run of benchmarks/int8_gate.py: train by a method in a precision from a seed; evaluate."""

import argparse
import base64
import gc
import hashlib
import io
import json
import pickle
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.training_runs import versions
from tunefork.data.chat import Renderer
from tunefork.data.loader import load_data
from tunefork.evaluate.evaluate import evaluate, pad_id
from tunefork.evaluate.statistics import estimate
from tunefork.model.device import pick_device, pick_dtype
from tunefork.model.load import load_tokenizer
from tunefork.recipe import Recipe
from tunefork.recipe_file import parse
from tunefork.train.method import load_for_training, train_method

METHODS, PRECISIONS = ("lora", "qlora"), ("bf16", "int8")
YARDSTICKS = ("fp32", "bf16_cut")
"""Runs that differ from bf16's harmlessly: how far apart such runs end is what chance alone does.
`bf16_cut` is bf16 with its steps cut into smaller micro-batches, so that sums round otherwise."""
_CUT, _SMALLER_CUT = 8192, 2048
"""Tokens of a micro-batch."""
_MAX_LENGTH = 128
_EVALUATION_TOKENS = 16_384


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of the gate."""

    method: str
    precision: str
    seed: int

    @property
    def name(self) -> str:
        """What its line is known by."""
        return f"{self.method}_{self.precision}_{self.seed}"


def recipe_of(arguments: argparse.Namespace, trial: Trial) -> Recipe:
    """The recipe of a trial: all but method and precision is shared."""
    fields: dict[str, Any] = {
        "model": str(arguments.model),
        "method": trial.method,
        "data": {
            "train": str(arguments.data / "train.jsonl"),
            "eval": str(arguments.data / "eval.jsonl"),
            "system": "Name the section of the dictionary that this definition belongs to.",
            "instruction": "Definition:",
            "max_length": _MAX_LENGTH,
            "max_train_examples": arguments.max_train_examples,
            "max_eval_examples": arguments.max_eval_examples,
        },
        "train": {
            "batch_size": arguments.batch_size,
            "micro_batch_tokens": _SMALLER_CUT if trial.precision == "bf16_cut" else _CUT,
            "epochs": 100.0,
            "max_steps": arguments.steps,
            "learning_rate": arguments.learning_rate,
            "precision": trial.precision.removesuffix("_cut"),
        },
        "evaluate": {"metrics": ["loss", "accuracy"], "forgetting": None},
    }
    for override in arguments.set:
        key, _, value = override.partition("=")
        *path, last = key.split(".")
        at = fields
        for name in path:
            at = at.setdefault(name, {})
        at[last] = json.loads(value)
    return parse(fields, "gate")


def encode(arguments: argparse.Namespace, trial: Trial) -> Path:
    """Have the data tokenised once for all processes that `load` them: a file beside them."""
    data, _ = load(arguments, trial)
    file = _encoded(arguments, recipe_of(arguments, trial))
    # Without the renderer, whose tokenizer another version of transformers may not read.
    scratch = file.with_suffix(".part")
    scratch.write_bytes(pickle.dumps(replace(data, renderer=None)))
    return scratch.replace(file)


def _encoded(arguments: argparse.Namespace, recipe: Recipe) -> Path:
    """`encode`'s file: another one for all that the sequences follow from."""
    section, digest = recipe.data, hashlib.sha256(arguments.model.name.encode())
    digest.update(section.model_dump_json(exclude={"train", "eval"}).encode())
    digest.update(str(recipe.data_seed).encode())
    for name in ("train", "eval"):
        digest.update((arguments.data / f"{name}.jsonl").read_bytes())
    return Path(arguments.data / f"encoded-{digest.hexdigest()[:16]}.pickle")


def load(arguments: argparse.Namespace, trial: Trial) -> Any:
    """The data and the tokenizer, the same for every trial."""
    began = time.monotonic()
    recipe = recipe_of(arguments, trial)
    tokenizer = load_tokenizer(recipe.model)
    file = _encoded(arguments, recipe)
    if file.exists():
        kept = pickle.loads(file.read_bytes())
        data = replace(kept, renderer=Renderer(tokenizer, recipe.data))
    else:
        data = load_data(recipe, tokenizer, is_checked=True)
    sizes = f"{len(data.train)} training and {len(data.eval)} evaluation examples"
    print(
        f"{sizes}, {len(data.labels or ())} labels [{time.monotonic() - began:.0f} s]", flush=True
    )
    return data, tokenizer


def run(arguments: argparse.Namespace, trial: Trial, loaded: Any) -> dict[str, Any]:
    """Train and evaluate."""
    data, tokenizer = loaded
    recipe, device = recipe_of(arguments, trial), pick_device()
    method, began = recipe.method, time.perf_counter()
    dtype = pick_dtype(recipe.train.precision, device)
    model = load_for_training(
        recipe, method, dtype=dtype, device=device, seed=trial.seed, examples=data.train
    )
    loaded_s, losses = time.perf_counter() - began, list[float]()
    result = train_method(
        model,
        data.train,
        recipe,
        method,
        learning_rate=arguments.learning_rate,
        seed=trial.seed,
        pad_id=pad_id(tokenizer),
        on_step=lambda record: losses.append(record.loss),
    )
    row: dict[str, Any] = {
        "method": trial.method,
        "precision": trial.precision,
        "seed": trial.seed,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "load_s": loaded_s,
        "train_s": result.seconds,
        "steps": len(losses),
        "train_examples": min(len(data.train), arguments.steps * arguments.batch_size),
        "train_losses": [round(loss, 5) for loss in losses],
        "shared": shared(arguments),
        "versions": versions(),
    }
    row |= _evaluated(model, tokenizer, data, recipe, "")
    if trial.precision == "int8":
        trained = adapter(model)
        del model
        forget()
        plain = recipe_of(arguments, Trial(trial.method, "bf16", trial.seed))
        dtype = pick_dtype("bf16", device)
        model = load_for_training(plain, method, dtype=dtype, device=device, seed=trial.seed)
        put_adapter(model, trained)
        row |= _evaluated(model, tokenizer, data, plain, "served_")
    return row


def adapter(model: Any) -> dict[str, Any]:
    """What was trained, by name, in host memory."""
    named = model.named_parameters()
    return {name: p.detach().cpu().clone() for name, p in named if p.requires_grad}


def put_adapter(model: Any, trained: dict[str, Any]) -> None:
    """Give the model another one's deltas; raises ValueError where it has not the same."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if own.keys() != trained.keys():
        raise ValueError(f"other deltas: {sorted(own.keys() ^ trained.keys())[:4]}")
    for name, parameter in own.items():
        parameter.data.copy_(trained[name])


def _evaluated(model: Any, tokenizer: Any, data: Any, recipe: Any, prefix: str) -> dict[str, Any]:
    section = recipe.train.model_copy(update={"micro_batch_tokens": _EVALUATION_TOKENS})
    measured = evaluate(model, tokenizer, data, recipe.model_copy(update={"train": section}))
    found: dict[str, Any] = {
        f"{prefix}{metric}": estimate(metric, [measured.columns], samples=200).value
        for metric in ("loss", "accuracy")
    }
    said = " ".join(f"{name} {value:.5f}" for name, value in found.items())
    print(f"  {said} [{measured.seconds:.0f} s]", flush=True)
    found[f"{prefix}evaluate_s"] = measured.seconds
    found[f"{prefix}majority_share"] = measured.majority_share
    return found | {f"{prefix}columns": pack_columns(measured.columns)}


def shared(arguments: argparse.Namespace) -> dict[str, Any]:
    """What all runs that are compared must have alike."""
    return {
        "model": arguments.model.name,
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
        "max_train_examples": arguments.max_train_examples,
        "max_eval_examples": arguments.max_eval_examples,
        "set": arguments.set,
    }


def pack_columns(columns: dict[str, Any]) -> str:
    """Columns as text: a run is one line of a file."""
    stream = io.BytesIO()
    np.savez_compressed(stream, allow_pickle=False, **columns)
    return base64.b64encode(stream.getvalue()).decode("ascii")


def unpack_columns(text: str) -> dict[str, Any]:
    """What `pack_columns` was given."""
    with np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def forget() -> None:
    """Give memory back between runs."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
