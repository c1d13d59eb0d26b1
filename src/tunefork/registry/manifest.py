"""What a remote place says that a version holds: the JSON beside its files, read with suspicion."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunefork.errors import StoreError, fault_in
from tunefork.registry.intake import check_count, check_kind, check_path
from tunefork.registry.names import check_name
from tunefork.registry.objects import StoredFile, digest_of
from tunefork.registry.rows import files_of
from tunefork.registry.store import Store
from tunefork.registry.version import Version

MAX_BYTES = 1 << 22
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ManifestFile(BaseModel):
    """A file of the version."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    path: Annotated[str, Field(max_length=1000)]
    sha256: Sha256
    bytes: Annotated[int, Field(ge=0)]


class Manifest(BaseModel):
    """A version as it is pushed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1]
    name: Annotated[str, Field(max_length=300)]
    number: Annotated[int, Field(ge=1)]
    """Where it was pushed from; the store that pulls it gives it a number of its own."""
    digest: Sha256
    created: Annotated[str, Field(max_length=100)]
    note: Annotated[str, Field(max_length=10_000)]
    files: list[ManifestFile]


def manifest_of(store: Store, version: Version) -> Manifest:
    """What is written beside a version's files."""
    files = [
        ManifestFile(path=file.path, sha256=file.sha256, bytes=file.bytes)
        for file in files_of(store.database, version.id)
    ]
    return Manifest(
        format=1,
        name=version.name,
        number=version.number,
        digest=version.digest,
        created=version.created,
        note=version.note,
        files=files,
    )


def read_manifest(text: bytes, where: str) -> Manifest:
    """The manifest in `text`, held to the store's rules. Raises StoreError, naming `where`."""
    if len(text) > MAX_BYTES:
        raise StoreError(f"{where}: is larger than the {MAX_BYTES:,} bytes a manifest may have")
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        told = fault_in(error, "is no manifest of a version: ")
        raise StoreError(f"{where}: {told}") from error
    check_name(manifest.name)
    check_count(len(manifest.files), where)
    paths = [file.path for file in manifest.files]
    if len({path.casefold() for path in paths}) < len(paths):
        raise StoreError(f"{where}: names a file twice")
    for file in manifest.files:
        if file.bytes > (limit := check_path(file.path, where)):
            raise StoreError(
                f"{where}: {file.path}: {file.bytes:,} bytes are more than the {limit:,} allowed"
            )
    check_kind(set(paths), where)
    if digest_of(stored(manifest)) != manifest.digest:
        raise StoreError(f"{where}: its digest is not that of its files")
    return manifest


def stored(manifest: Manifest) -> list[StoredFile]:
    """Its files as the store has them."""
    return [StoredFile(file.path, file.sha256, file.bytes) for file in manifest.files]
