"""A model from whatever names one: a run or adapter folder, a version in the store, a model's id.

Before any weight is loaded it is compared with what was recorded of it: an adapter's base, its
tokenizer and its chat template, a fully fine-tuned model's own.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from tunefork.errors import AdapterError, RunFolderError
from tunefork.model.build import quantize_nf4
from tunefork.model.device import pick_device, pick_dtype
from tunefork.model.fingerprint import check_identity, check_rendering, identify
from tunefork.model.identity import Identity
from tunefork.model.load import load_model, load_tokenizer
from tunefork.recipe import DataSection, Method, ModelSection
from tunefork.recipe_file import load_of_run
from tunefork.registry.peft_format import CONFIG, base_section, load_adapter
from tunefork.registry.provenance import FILE, Provenance, read_provenance
from tunefork.registry.run import ADAPTER, MODEL, RECIPE, RunRecord, read_record
from tunefork.registry.store import Store


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
    identity: Identity | None = None
    """What the run's record says that `section` was."""
    run: Path | None = None
    """The folder of the run that made it."""


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def open_model(
    target: str, *, precision: str = "auto", say: Callable[[str], None] = _to_stderr
) -> Opened:
    """Load what `target` names, in `precision` (as `train.precision`); `say` gets warnings.

    A QLoRA run's adapter goes onto its base quantised as it was in training. Raises
    RunFolderError, ModelError or AdapterError; IdentityError where it belongs to another base.
    """
    parts = find_parts(target)
    check_parts(parts, target, say)
    device = pick_device()
    model = load_parts(parts, dtype=pick_dtype(precision, device), device=device)
    return Opened(model, tokenizer_of(parts), parts.section, parts.data)


def tokenizer_of(parts: Parts) -> Any:
    """The tokenizer saved beside the adapter, which may have tokens of its own, else the base's."""
    folder = parts.adapter
    has_one = folder is not None and (folder / "tokenizer_config.json").is_file()
    return load_tokenizer(parts.section, folder if has_one else None)


def load_parts(parts: Parts, *, dtype: torch.dtype, device: torch.device) -> Any:
    """The model that `parts` make, frozen and in eval mode."""
    model = load_model(parts.section, dtype=dtype, device=device, in_host_memory=parts.is_nf4)
    if parts.is_nf4:
        quantize_nf4(model, device)
    if parts.adapter is not None:
        load_adapter(model, parts.adapter)
    return model.requires_grad_(False).eval()


def check_parts(parts: Parts, target: str, say: Callable[[str], None] = _to_stderr) -> None:
    """Compare what was recorded with what is there; a line where an adapter has no record.

    Raises IdentityError where they differ.
    """
    base = parts.section.id
    recorded = [] if parts.identity is None else [parts.identity]
    if parts.adapter is not None:
        if (provenance := read_provenance(parts.adapter)) is not None:
            recorded.append(provenance.identity)
        elif not recorded:
            say(
                f"warning: {target}: records no identity of its base, so that nothing shows "
                f"whether {base} is the one it was trained on; where you know that it is: "
                f"tunefork adapters adopt {parts.adapter}"
            )
        check_rendering(parts.adapter, parts.section)
    elif (folder := Path(base)).is_dir():
        provenance = read_provenance(folder)
        if provenance is not None and provenance.own is not None:
            recorded.append(provenance.own)
    if recorded:
        found = identify(parts.section)
        for identity in recorded:
            check_identity(identity, found, what=target, base=base)


def find_parts(target: str) -> Parts:
    """The files behind `target`: the one place where such a string becomes folders."""
    try:
        folder = Path(_published(target)).expanduser()
    except RuntimeError as error:
        raise RunFolderError(f"{target}: {error}") from error
    run = folder.parent if folder.name in (ADAPTER, MODEL) else folder
    record = read_record(run)
    if record is not None:
        return _parts_of_run(run, record)
    if (folder / CONFIG).is_file():
        return _parts_of_adapter(folder)
    if (folder / RECIPE).is_file():
        inside = sorted(str(path.parent) for path in folder.rglob("run.json"))
        raise RunFolderError(
            f"{target}: holds no finished run of its own"
            + (f"; give one of {', '.join(inside)}" if inside else "")
        )
    if (
        folder / "config.json"
    ).is_file():  # merged or trained by tunefork, it says how it was asked
        return Parts(ModelSection(id=str(folder)), data=_data_of(read_provenance(folder), folder))
    return Parts(ModelSection(id=target))


def _published(target: str) -> str:
    """The folder of the version that `target` names (support/acme:v3), or `target` itself."""
    if ":" not in target or Path(target).exists():
        return target
    with Store.open() as store:
        return str(store.resolve(target).intact())


def _parts_of_adapter(folder: Path) -> Parts:
    """Of an adapter away from its run: it says itself how it was trained and what it rendered."""
    provenance = read_provenance(folder)
    is_nf4 = provenance is not None and provenance.method is Method.QLORA
    data = _data_of(provenance, folder)
    return Parts(base_section(folder), adapter=folder, is_nf4=is_nf4, data=data)


def _data_of(provenance: Provenance | None, folder: Path) -> DataSection | None:
    if provenance is None or provenance.recipe is None:
        return None
    try:
        return DataSection.model_validate(provenance.recipe["data"])
    except (KeyError, ValidationError) as error:
        raise AdapterError(f"{folder / FILE}: recipe.data: is none of this version's") from error


def _parts_of_run(run: Path, record: RunRecord) -> Parts:
    if record.status == "failed":
        raise RunFolderError(f"{run}: its training failed, and it has no artefact: {record.error}")
    base = ModelSection(id=record.model_id, revision=record.model_revision)
    data = _data_section(run)
    if record.artifact is None:
        return Parts(base, data=data, identity=record.identity, run=run)
    artifact = run / record.artifact
    if not artifact.is_dir():
        raise RunFolderError(f"{run}: its {record.artifact} folder is gone")
    if record.method is Method.FULL:
        return Parts(ModelSection(id=str(artifact)), data=data, run=run)
    is_nf4 = record.method is Method.QLORA
    return Parts(base, artifact, is_nf4, data, record.identity, run)


def _data_section(run: Path) -> DataSection | None:
    """Of the recipe in the run's folder or, for a comparison's run, in the comparison's."""
    for folder in (run, *run.parents[:2]):
        if (folder / RECIPE).is_file():
            return load_of_run(folder / RECIPE).data
    return None
