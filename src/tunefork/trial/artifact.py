"""What training leaves on the disk: an adapter or a model folder, with where it comes from."""

import shutil
from pathlib import Path
from typing import Any

from tunefork.data.loader import Data
from tunefork.export.card import CARD, render
from tunefork.model.asked import asked_sha256
from tunefork.model.fingerprint import identify_trained
from tunefork.model.load import without_progress_bars
from tunefork.recipe import Method, Recipe
from tunefork.registry.history import remember_run
from tunefork.registry.opening import find_parts
from tunefork.registry.peft_format import save_adapter
from tunefork.registry.provenance import Provenance, write_provenance
from tunefork.registry.run import (
    ADAPTER,
    MODEL,
    RunRecord,
    folder_bytes,
    write_atomically,
    write_record,
)
from tunefork.train.checkpoint import sync
from tunefork.train.interrupt import Interrupt


def save(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    record: RunRecord,
    folder: Path,
    data: Data,
) -> RunRecord:
    """Write the artefact and its record, which is returned with what it lacked.

    A signal meanwhile is heeded once both are written: it would cost all the training.
    """
    name = MODEL if record.method is Method.FULL else ADAPTER
    assert record.method is not None
    with Interrupt() as interrupt:
        # Of an interrupted run, or half of one that was killed here. It goes first, as a disk may
        # not hold a model twice; the checkpoints are there until the new one is.
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            shutil.rmtree(folder / name)
        write_artifact(model, tokenizer, recipe, record.method, folder / name)
        write_provenance(folder / name, _provenance(recipe, record, folder / name, tokenizer, data))
        saved = {
            "trainable_params": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "artifact": name,
            "artifact_bytes": folder_bytes(folder / name),
        }
        record = record.model_copy(update=saved)
        for path in (*(folder / name).iterdir(), folder / name, folder):
            sync(path)  # the checkpoints go once this is on the disk
        write_record(folder, record)
        write_run_card(folder, record)
        remember_run(folder, record)
    if interrupt.requested:
        raise KeyboardInterrupt
    return record


def write_run_card(folder: Path, record: RunRecord) -> None:
    """Write the card of the run's artefact, which says `record`'s figures."""
    if record.artifact is None:
        return
    kind = "merged" if record.method is Method.FULL else "peft"
    text = render(find_parts(str(folder)), folder.name, kind=kind, record=record, proof=None)
    write_atomically(folder / record.artifact / CARD, text)


def _provenance(
    recipe: Recipe, record: RunRecord, artifact: Path, tokenizer: Any, data: Data
) -> Provenance:
    """What the artefact, whose weights and tokenizer are written, came from."""
    assert record.identity is not None
    own = identify_trained(artifact, tokenizer) if record.method is Method.FULL else None
    train = recipe.train.model_copy(
        update={"learning_rate": record.learning_rate, "seed": record.seed}
    )
    # A server reads no file that an adapter names, so that what was read from them goes along.
    update = {"method": record.method, "train": train, "data": data.section}
    resolved = recipe.model_copy(update=update)
    return Provenance(
        identity=record.identity,
        own=own,
        method=record.method,
        recipe=resolved.model_dump(mode="json"),
        asked_sha256=asked_sha256(data),
        data_sha256=data.fingerprint(),
        created=record.created,
        versions=record.versions,
    )


def write_artifact(
    model: Any, tokenizer: Any, recipe: Recipe, method: Method, target: Path
) -> None:
    """Write what `method` trained in `model` to `target`: an adapter, or a whole model."""
    if method is Method.FULL:
        with without_progress_bars():
            model.save_pretrained(target)
    else:
        save_adapter(
            model, target, recipe.lora, base=recipe.model.id, revision=recipe.model.revision
        )
    tokenizer.save_pretrained(target)
