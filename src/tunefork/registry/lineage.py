"""Where an artefact comes from: its base, recipe, data and parent, read as whatever it carries.

In this order, a later source filling what the earlier one leaves open: tunefork.json in the
artefact's folder (`registry/provenance.py`), the run folder it lies in, PEFT's adapter_config.json.
All three are foreign text: read with a bound on their size, kept as plain JSON, never acted upon.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tunefork.errors import StoreError
from tunefork.recipe_file import absolute, read_fields
from tunefork.registry.claim import CLAIM
from tunefork.registry.intake import ADAPTER_CONFIG
from tunefork.registry.provenance import FILE
from tunefork.registry.run import RECIPE, read_record

_MAX_BYTES = 1 << 24


class Fingerprints(BaseModel):
    """Fingerprints of a base; empty where they are not known."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    weights_sha256: str | None = None
    tokenizer_sha256: str | None = None
    template_sha256: str | None = None


class Lineage(BaseModel):
    """What a version is made of; None where nothing says so."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    base: str | None = None
    revision: str | None = None
    identity: Fingerprints | None = None
    method: str | None = None
    recipe: dict[str, Any] | None = None
    data_sha256: str | None = None
    parent: str | None = None
    """The run (its folder) or the version that it was made from."""
    metrics: dict[str, tuple[float, float, float]] | None = None
    created: str | None = None
    versions: dict[str, str] | None = None

    def filled(self, other: "Lineage") -> "Lineage":
        """This one, with what it leaves open taken from `other`."""
        open_fields = {
            name: value
            for name in Lineage.model_fields
            if not getattr(self, name) and (value := getattr(other, name))
        }
        return self.model_copy(update=open_fields)


def read_lineage(folder: Path, *, run: Path | None = None) -> Lineage:
    """What `folder` and the run folder it lies in tell; raises StoreError for damaged files."""
    found = _of_provenance(folder / FILE)
    if run is not None:
        found = found.filled(_of_run(run))
    return found.filled(_of_config(folder / ADAPTER_CONFIG))


def _of_provenance(file: Path) -> Lineage:
    content = _read(file)
    if content is None:
        return Lineage()
    try:
        found = Lineage.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        at = ".".join(map(str, first["loc"]))
        raise StoreError(f"{file}: {at}: {first['msg']}") from error
    model = (found.recipe or {}).get("model")
    if not isinstance(model, dict):
        return found
    return found.filled(Lineage(base=_text(model.get("id")), revision=_text(model.get("revision"))))


def _of_run(run: Path) -> Lineage:
    record = read_record(run)
    if record is None:
        return Lineage()
    recipe, claim = None, None
    for folder in (run, *run.parents[:2]):  # a comparison's run has both in the comparison's folder
        if (folder / RECIPE).is_file():
            recipe = absolute(read_fields(folder / RECIPE), folder.resolve())
            claim = _read(folder / CLAIM) or {}
            break
    return Lineage(
        base=record.model_id,
        revision=record.model_revision,
        identity=None
        if record.identity is None
        else Fingerprints.model_validate(record.identity.model_dump()),
        method=record.method,
        recipe=recipe,
        data_sha256=_text((claim or {}).get("data_sha256")),
        parent=str(run.resolve()),
        metrics=record.metrics,
        created=record.created,
        versions=record.versions,
    )


def _of_config(file: Path) -> Lineage:
    config = _read(file) or {}
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    return Lineage(base=_text(base), revision=_text(revision))


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _read(file: Path) -> dict[str, Any] | None:
    """A small JSON object; None where there is no such file."""
    try:
        with file.open("rb") as stream:
            text = stream.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    if len(text) > _MAX_BYTES:
        raise StoreError(f"{file}: is larger than the {_MAX_BYTES:,} bytes that are read of it")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{file}: is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise StoreError(f"{file}: must hold a JSON object")
    return content
