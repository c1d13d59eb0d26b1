"""`tunefork.json` beside an artefact's weights: what it belongs to and how it was made.

It lies inside the adapter/ or model/ folder, so that it goes wherever the folder goes; PEFT and
transformers leave files that they do not know alone.
"""

import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunefork.errors import AdapterError, fault_in
from tunefork.installed import OWN_VERSION, version
from tunefork.model.identity import Identity
from tunefork.recipe import Method
from tunefork.registry.run import write_atomically

FILE = "tunefork.json"
_MAX_BYTES = 16 * 2**20
"""A recipe with a hundred thousand labels takes less."""


class Provenance(BaseModel):
    """Where an adapter or a model comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    identity: Identity
    """Of the base that it was trained on."""
    own: Identity | None = None
    """Of a fully fine-tuned model itself, with the tokenizer that it was trained with."""
    method: Method | None = None
    """None: made elsewhere and adopted."""
    recipe: dict[str, Any] | None = None
    """The resolved recipe, with the learning rate and the seed of this very run, the format that
    its rows came to and, of a classifier, the labels that its instruction lists."""
    asked_sha256: str | None = None
    """What the trainer made of fixed texts (`model/asked.py`); None: it asked nothing of a text."""
    data_sha256: str | None = None
    """`Data.fingerprint` of what it was trained and evaluated on."""
    parent: str | None = None
    """The run or version that its training went on from."""
    created: str = Field(default_factory=lambda: now())
    """ISO 8601, UTC."""
    versions: dict[str, str] = Field(default_factory=lambda: versions())
    metrics: dict[str, tuple[float, float, float]] = {}
    """Name -> value, low, high (95 % over the evaluation examples); empty until evaluated."""


def write_provenance(folder: Path, provenance: Provenance) -> None:
    """Write `folder`'s tunefork.json in one rename; raises OSError."""
    write_atomically(folder / FILE, provenance.model_dump_json(indent=2) + "\n")


def read_provenance(folder: Path) -> Provenance | None:
    """What `folder`'s tunefork.json says, or None where it has none.

    Raises AdapterError for a file that is damaged, too large, or another program's.
    """
    file = folder / FILE
    try:
        with file.open("rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise AdapterError(f"{file}: cannot be read ({error.strerror})") from error
    if len(content) > _MAX_BYTES:
        raise AdapterError(f"{file}: is larger than {_MAX_BYTES} bytes, so no file of tunefork's")
    try:
        return Provenance.model_validate_json(content)
    except ValidationError as error:
        before = "does not say where the artefact comes from ("
        after = (
            "); restore it, or remove it and record its base again: tunefork adapters adopt "
            f"{folder}"
        )
        raise AdapterError(f"{file}: {fault_in(error, before, after)}") from error


def now() -> str:
    """This second, as records write it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """What a figure's reproduction needs."""
    packages = ("torch", "transformers", "bitsandbytes", "numpy")
    own = {"python": platform.python_version(), "tunefork": OWN_VERSION}
    return own | {name: version(name) for name in packages}
