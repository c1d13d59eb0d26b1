"""A model from whatever names one: a run folder, an adapter folder, a model's id."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunefork.errors import RunFolderError
from tunefork.model.build import quantize_nf4
from tunefork.model.device import pick_device, pick_dtype
from tunefork.model.load import load_model, load_tokenizer
from tunefork.recipe import DataSection, Method, ModelSection
from tunefork.recipe_file import load
from tunefork.registry.peft_format import CONFIG, base_section, load_adapter
from tunefork.registry.run import ADAPTER, MODEL, RECIPE, RunRecord, read_record


@dataclass(frozen=True, slots=True)
class Opened:
    """A model ready to be evaluated or talked to, frozen and in eval mode."""

    model: Any
    tokenizer: Any
    section: ModelSection
    """The base, or the fully fine-tuned model."""
    data: DataSection | None
    """How a run rendered its conversations; None for what is no run of tunefork's."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a target is made of: a base or whole model, and maybe an adapter over it."""

    section: ModelSection
    """The base, or the fully fine-tuned model."""
    adapter: Path | None = None
    is_nf4: bool = False
    """The adapter was trained on the base quantised to NF4."""
    data: DataSection | None = None
    run: Path | None = None
    """The folder of the run that made it."""


def open_model(target: str, *, precision: str = "auto") -> Opened:
    """Load what `target` names, in `precision` (as `train.precision`).

    A QLoRA run's adapter goes onto its base quantised as it was in training. Raises
    RunFolderError, ModelError or AdapterError.
    """
    parts = find_parts(target)
    device = pick_device()
    model = load_parts(parts, dtype=pick_dtype(precision, device), device=device)
    return Opened(model, load_tokenizer(parts.section), parts.section, parts.data)


def load_parts(parts: Parts, *, dtype: torch.dtype, device: torch.device) -> Any:
    """The model that `parts` make, frozen and in eval mode."""
    model = load_model(parts.section, dtype=dtype, device=device, in_host_memory=parts.is_nf4)
    if parts.is_nf4:
        quantize_nf4(model, device)
    if parts.adapter is not None:
        load_adapter(model, parts.adapter)
    return model.requires_grad_(False).eval()


def find_parts(target: str) -> Parts:
    """The files behind `target`: the one place where such a string becomes folders."""
    try:
        folder = Path(target).expanduser()
    except RuntimeError as error:
        raise RunFolderError(f"{target}: {error}") from error
    run = folder.parent if folder.name in (ADAPTER, MODEL) else folder
    record = read_record(run)
    if record is not None:
        return _parts_of_run(run, record)
    if (folder / CONFIG).is_file():
        return Parts(base_section(folder), adapter=folder)
    if (folder / RECIPE).is_file():
        inside = sorted(str(path.parent) for path in folder.rglob("run.json"))
        raise RunFolderError(
            f"{target}: holds no finished run of its own"
            + (f"; give one of {', '.join(inside)}" if inside else "")
        )
    return Parts(ModelSection(id=target))


def _parts_of_run(run: Path, record: RunRecord) -> Parts:
    base = ModelSection(id=record.model_id, revision=record.model_revision)
    data = _data_section(run)
    if record.artifact is None:
        return Parts(base, data=data, run=run)
    artifact = run / record.artifact
    if not artifact.is_dir():
        raise RunFolderError(f"{run}: its {record.artifact} folder is gone")
    if record.method is Method.FULL:
        return Parts(ModelSection(id=str(artifact)), data=data, run=run)
    is_nf4 = record.method is Method.QLORA
    return Parts(base, adapter=artifact, is_nf4=is_nf4, data=data, run=run)


def _data_section(run: Path) -> DataSection | None:
    """Of the recipe in the run's folder or, for a comparison's run, in the comparison's."""
    for folder in (run, *run.parents[:2]):
        if (folder / RECIPE).is_file():
            return load(folder / RECIPE).data
    return None
