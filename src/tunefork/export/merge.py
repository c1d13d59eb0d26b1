"""`tunefork merge`: an adapter and its base become one Hugging Face folder.

A LoRA adapter is merged into the very base that it was trained on. A QLoRA adapter was trained on
weights that had been rounded to NF4, and there are two bases to choose from: those weights,
dequantised, or the original ones. Both are made and measured against the adapter on its quantised
base, and the one that loses least is kept; the proof and the card hold both figures.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tunefork.errors import RunFolderError
from tunefork.export.card import write_card
from tunefork.export.dense import expand, merge_deltas
from tunefork.export.origin import write_origin
from tunefork.export.prompts import find_prompts
from tunefork.export.proof import Agreement, Gate, Proof, Reference
from tunefork.export.publish import publish, staged
from tunefork.model.device import pick_device
from tunefork.model.load import load_config, load_model, without_progress_bars
from tunefork.recipe import ModelSection, Recipe
from tunefork.registry.opening import Parts, check_parts, find_parts, load_parts, tokenizer_of

DEQUANTISED = "the base dequantised from NF4"
ORIGINAL = "the original base"


@dataclass(frozen=True, slots=True)
class Subject:
    """What is to be exported, measured once."""

    target: str
    parts: Parts
    tokenizer: Any
    reference: Reference


def open_subject(target: str, gate: Gate, recipe: Recipe | None = None) -> Subject:
    """Find and load `target`, and read the prompts with it. Raises BadInputError."""
    parts = find_parts(target)
    check_parts(parts, target)
    tokenizer = tokenizer_of(parts)
    prompts = find_prompts(parts, tokenizer, recipe, num_tokens=gate.num_tokens)
    model = load_reference(parts)
    name = "the model" if parts.adapter is None else "the adapter on its base"
    reference = Reference(
        model,
        tokenizer,
        prompts,
        gate,
        name=name + (", quantised to NF4 as in training" if parts.is_nf4 else ""),
        recipe=recipe,
    )
    return Subject(target, parts, tokenizer, reference)


def base_dtype(parts: Parts) -> torch.dtype:
    """The dtype that the base's checkpoint is in."""
    dtype = load_config(parts.section).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def load_reference(parts: Parts) -> Any:
    """What was trained, computing in fp32 on the weights as they were in training."""
    if not parts.is_nf4:
        return load_parts(parts, dtype=torch.float32, device=pick_device())
    # Quantised from the checkpoint's own dtype, since the codes depend on it; then in fp32.
    model = load_parts(parts, dtype=base_dtype(parts), device=pick_device())
    expand(model)
    return model.float()


def merge(target: str, out: Path, *, gate: Gate, recipe: Recipe | None = None) -> Proof:
    """Write `target`, merged, to the folder `out`, with a card and its proof.

    Raises ExportFailedError where the proof fails, BadInputError for a target without adapter.
    """
    with staged(out) as folder:
        subject = open_subject(target, gate, recipe)
        if subject.parts.adapter is None:
            raise RunFolderError(f"{target}: has no adapter, so there is nothing to merge")
        proof = prove_merged(subject, folder)
        write_origin(folder, subject.parts, whole=subject.tokenizer)
        write_card(folder, subject.parts, subject.target, kind="merged", proof=proof)
        publish(folder, out, proof)
    return proof


def prove_merged(subject: Subject, folder: Path) -> Proof:
    """Write the merged model into the empty `folder`, read it back and prove it."""
    name, others = write_merged(subject, folder)
    return subject.reference.prove(load_folder(folder), name=name, alternatives=others)


def write_merged(subject: Subject, folder: Path) -> tuple[str, dict[str, Agreement]]:
    """Write the merged model and tokenizer into the empty `folder`.

    Returns what it was merged into, and how near the other ways came.
    """
    found: dict[str, Agreement] = {}
    for name, parts in _ways(subject.parts):
        attempt = folder.with_name(f"attempt-{len(found)}")
        _write(parts, base_dtype(parts), attempt)
        if not subject.parts.is_nf4:
            best, kept = name, attempt
            break
        found[name] = subject.reference.compare(load_folder(attempt))
        if found[name].mean_kl == min(a.mean_kl for a in found.values()):
            best, kept = name, attempt
    folder.rmdir()
    kept.rename(folder)
    for attempt in folder.parent.glob("attempt-*"):
        shutil.rmtree(attempt)
    with without_progress_bars():
        subject.tokenizer.save_pretrained(folder)
    found.pop(best, None)
    is_whole = subject.parts.adapter is None
    return "the model's folder" if is_whole else f"the adapter merged into {best}", found


def load_folder(folder: Path) -> Any:
    """A model folder as transformers reads it, in fp32."""
    section = ModelSection(id=str(folder))
    model = load_model(section, dtype=torch.float32, device=pick_device())
    return model.requires_grad_(False).eval()


def _ways(parts: Parts) -> Iterator[tuple[str, Parts]]:
    """(base to merge into, what to load for that)."""
    if parts.is_nf4:
        yield DEQUANTISED, parts
    yield ORIGINAL, replace(parts, is_nf4=False)


def _write(parts: Parts, dtype: torch.dtype, folder: Path) -> None:
    model = load_parts(parts, dtype=dtype, device=pick_device())
    if parts.adapter is not None:
        merge_deltas(model, dtype)
    with without_progress_bars():
        model.save_pretrained(folder)
