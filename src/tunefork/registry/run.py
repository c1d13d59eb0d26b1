"""A run folder: what one training run was and what it left.

recipe.yaml    the resolved recipe
claim.json     what the folder is for: `registry/claim.py` (a comparison's folder has both too)
run.json       the record below, written atomically when the artefact is saved, and again when it
               is evaluated: what a folder without it holds is unfinished
events.jsonl   what happens in it, step by step: `train/events.py`
adapter/       the adapter in the PEFT format (lora, qlora), or
model/         the model as a Hugging Face folder (full)
columns.npz    one value an evaluation example, from which every interval is computed
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tunefork.errors import RunFolderError, fault_in
from tunefork.model.identity import Identity
from tunefork.recipe import Checkpointing, Method
from tunefork.train.precision_choice import PrecisionChoice

RECORD = "run.json"
RECIPE = "recipe.yaml"
STEPS = "steps.jsonl"
"""What runs of tunefork 0.1.0 have for events.jsonl: a line an optimiser step."""
COLUMNS = "columns.npz"
ADAPTER = "adapter"
MODEL = "model"


Content = TypeVar("Content", bound=BaseModel)


class RunRecord(BaseModel):
    """What one run was, how it ended and what it cost."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    status: Literal["trained", "ok", "interrupted", "failed"]
    """`trained`: saved, its evaluation is still to come. `ok`: evaluated too. `interrupted`:
    training was stopped; what it had learnt is saved, and not evaluated. `failed`: training ended
    in an error, and there is no artefact; its checkpoints may hold the last good state."""
    method: Method | None
    """None: the untouched base was evaluated."""
    seed: int
    learning_rate: float | None
    """Peak."""
    model_id: str
    model_revision: str | None
    identity: Identity | None = None
    """What the model was when the run began. None: written by an older tunefork."""
    total_params: int
    trainable_params: int
    num_steps: int
    artifact_step: int | None = None
    """After which step the artefact's weights were; None: the last (`train.keep: last`)."""
    validation_loss: float | None = None
    """The lowest that was measured, mean over supervised tokens, nats; None: none was."""
    tokens: int
    """Tokens trained on, prompts included, padding not."""
    supervised_tokens: int
    train_s: float
    """Optimiser steps only: neither loading nor evaluation."""
    tokens_per_s: float | None
    precision: PrecisionChoice | None = None
    """What `train.precision: auto` came to, and why; None: nothing was to be decided (a CPU's run,
    `full`, a precision that the recipe names)."""
    activation_checkpointing: Checkpointing | None = None
    """How activations were kept: what the recipe says, or what its `auto` came to. None: nothing
    was trained, or by an older tunefork."""
    peak_memory_bytes: int | None
    """While training, weights included."""
    predicted_memory_bytes: float | None = None
    """What `peak_memory_bytes` was predicted to be, before the run."""
    predicted_step_s: float | None = None
    """Seconds of an optimiser step, likewise."""
    memory_kind: Literal["cuda_allocated", "resident"]
    artifact: str | None
    """Folder of what was trained, within the run folder."""
    artifact_bytes: int | None
    evaluate_s: float
    metrics: dict[str, tuple[float, float, float]]
    """Name -> value, low, high (95 % over the evaluation examples)."""
    majority_share: float | None
    """Accuracy of always giving the training data's most frequent label."""
    error: str | None = None
    """Why it failed."""
    created: str
    """ISO 8601, UTC."""
    device: dict[str, str | int]
    versions: dict[str, str]


def write_record(folder: Path, record: RunRecord) -> None:
    """Write run.json; from here on the run holds what the record's status says."""
    write_atomically(folder / RECORD, record.model_dump_json(indent=2) + "\n")


def read_record(folder: Path) -> RunRecord | None:
    """The record of a run whose artefact is saved, or None where `folder` holds none.

    Raises RunFolderError for a run.json that is damaged or another program's.
    """
    file = folder / RECORD
    if not file.is_file():
        return None
    return read_json(RunRecord, file, "is not a run's record; move it or its folder away")


def read_json(kind: type[Content], file: Path, otherwise: str, hint: str = "") -> Content:
    """`file` as a `kind`.

    Raises RunFolderError, which says `otherwise` for what is none, and `hint` for what cannot be
    read.
    """
    try:
        return kind.model_validate_json(file.read_bytes())
    except OSError as error:
        raise RunFolderError(f"{file}: cannot be read ({error.strerror}){hint}") from error
    except ValidationError as error:
        raise RunFolderError(f"{file}: {fault_in(error, f'{otherwise} (', ')')}") from error


def find_runs(folder: Path, say: Callable[[str], None] = print) -> list[tuple[Path, RunRecord]]:
    """Runs with a record anywhere below `folder`, in path order.

    A run.json that is damaged or another program's is left out, and `say` gets a line about it.
    """
    found = []
    for file in sorted(folder.rglob(RECORD)):
        try:
            record = read_record(file.parent)
        except RunFolderError as error:
            say(f"warning: {error}")
            continue
        if record is not None:
            found.append((file.parent, record))
    return found


def write_atomically(file: Path, text: str) -> None:
    """Replace `file`'s content in one rename: a reader sees the old text or the new one.

    Raises OSError, and leaves the old text and nothing else, where the new one cannot be written.
    """
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with scratch.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
