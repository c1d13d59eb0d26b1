"""A run folder: what one training run was and what it left.

recipe.yaml    the resolved recipe
run.json       the record below, written last and atomically: a folder without it is unfinished
steps.jsonl    one line an optimiser step
adapter/       the adapter in the PEFT format (lora, qlora), or
model/         the model as a Hugging Face folder (full)
columns.npz    one value an evaluation example, from which every interval is computed
"""

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from tunefork.errors import RunFolderError, is_disk_full
from tunefork.recipe import Method, Recipe, dump, load

RECORD = "run.json"
RECIPE = "recipe.yaml"
STEPS = "steps.jsonl"
COLUMNS = "columns.npz"
ADAPTER = "adapter"
MODEL = "model"


class RunRecord(BaseModel):
    """What one run was, how it ended and what it cost."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    status: Literal["ok", "interrupted"]
    method: Method | None
    """None: the untouched base was evaluated."""
    seed: int
    learning_rate: float | None
    """Peak."""
    model_id: str
    model_revision: str | None
    total_params: int
    trainable_params: int
    num_steps: int
    tokens: int
    """Tokens trained on, prompts included, padding not."""
    supervised_tokens: int
    train_s: float
    """Optimiser steps only: neither loading nor evaluation."""
    tokens_per_s: float | None
    peak_memory_bytes: int | None
    """While training, weights included."""
    memory_kind: Literal["cuda_allocated", "resident"]
    artifact: str | None
    """Folder of what was trained, within the run folder."""
    artifact_bytes: int | None
    evaluate_s: float
    metrics: dict[str, tuple[float, float, float]]
    """Name -> value, low, high (95 % over the evaluation examples)."""
    majority_share: float | None
    """Accuracy of always giving the training data's most frequent label."""
    created: str
    """ISO 8601, UTC."""
    device: dict[str, str | int]
    versions: dict[str, str]


def claim(folder: Path, recipe: Recipe) -> None:
    """Make `folder` this recipe's; raises RunFolderError if it holds another one's run."""
    file = folder / RECIPE
    try:
        if file.exists():
            if load(file) != recipe:
                raise RunFolderError(
                    f"{folder}: holds a run of another recipe ({file}); give another folder with "
                    "--out, or remove this one"
                )
            return
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunFolderError(
                f"{folder}: exists and is no run folder; give an empty or new folder with --out"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, dump(recipe))
    except OSError as error:
        if is_disk_full(error):  # no fault of the name that was given
            raise
        raise RunFolderError(f"{folder}: cannot be written: {error}") from error


def write_record(folder: Path, record: RunRecord) -> None:
    """Write run.json; the run counts as finished from here on."""
    write_atomically(folder / RECORD, record.model_dump_json(indent=2) + "\n")


def read_record(folder: Path) -> RunRecord | None:
    """The record of a finished run, or None where `folder` holds none.

    Raises RunFolderError for a run.json that is damaged or another program's.
    """
    file = folder / RECORD
    if not file.is_file():
        return None
    try:
        return RunRecord.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(
            f"{file}: is not a run's record; move it or its folder away ({error})"
        ) from error


def find_runs(folder: Path) -> list[tuple[Path, RunRecord]]:
    """Finished runs anywhere below `folder`, in path order; raises as `read_record` does."""
    found = []
    for file in sorted(folder.rglob(RECORD)):
        record = read_record(file.parent)
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
