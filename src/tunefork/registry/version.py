"""A version of an artefact, as the store hands it out, and the folder that shows its files."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from tunefork.errors import StoreError
from tunefork.registry.database import as_store_error, connect
from tunefork.registry.lineage import Lineage
from tunefork.registry.locks import together
from tunefork.registry.objects import Objects, StoredFile, is_intact
from tunefork.registry.rows import files_of


@dataclass(frozen=True, slots=True)
class Version:
    """One published state of a named adapter or model; it never changes, but for its tags."""

    name: str
    number: int
    digest: str
    """Of its files' names and contents."""
    bytes: int
    base: str | None
    revision: str | None
    method: str | None
    note: str
    created: str
    """When it was published: ISO 8601, UTC."""
    tags: tuple[str, ...]
    """That were on it when it was looked up."""
    id: int = field(repr=False)
    """Within this store."""
    root: Path = field(repr=False)
    """Where this store lies."""

    def __str__(self) -> str:
        return f"{self.name}:v{self.number}"

    def folder(self) -> Path:
        """A folder of its files, read only, as `load_adapter`, PEFT and transformers take it.

        It stays for as long as the version does. Raises StoreError where that is gone.
        """
        with (
            as_store_error(self.root),
            together(self.root),
            closing(connect(self.root)) as database,
        ):
            files = files_of(database, self.id)
            if not files:
                raise StoreError(f"{self}: was removed from the store")
            return linked(self.root, self.digest, files)

    def intact(self) -> Path:
        """`folder()`, after its files were read and are what was published (0.6 s a GB). Raises
        StoreError for one that a disk or a hand has changed since."""
        folder = self.folder()
        with as_store_error(self.root), closing(connect(self.root)) as database:
            changed = changed_files(folder, files_of(database, self.id))
        if changed:
            raise StoreError(
                f"{self}: {changed[0]} in the store is not what was published; publish "
                "the same files anew, which replaces it"
            )
        return folder


@dataclass(frozen=True, slots=True)
class Details:
    """All that the store knows of a version."""

    version: Version
    files: tuple[StoredFile, ...]
    lineage: Lineage
    identity: dict[str, str]
    """Fingerprints of its base."""
    metrics: dict[str, tuple[float, float, float]]
    """Name -> value, low, high."""
    holds: tuple[str, ...]
    """Who holds it now."""
    history: tuple[tuple[str, int | None, str], ...]
    """Moves of the name's tags, oldest first: tag, version number (None: taken off), when."""


def changed_files(folder: Path, files: Sequence[StoredFile]) -> list[str]:
    """Those of `files` that `folder` does not hold as they were published. Raises OSError."""
    return [file.path for file in files if not is_intact(folder / file.path, file)]


def linked(root: Path, digest: str, files: Sequence[StoredFile]) -> Path:
    """The folder that shows `files`, made where it is not whole; the caller holds `together`."""
    folder = views(root) / digest
    if not all(_has_size(folder / file.path, file.bytes) for file in files):
        Objects(root).link(files, folder)
    return folder


def views(root: Path) -> Path:
    """Where the folders of all versions lie."""
    return root / "versions"


def _has_size(file: Path, size: int) -> bool:
    try:
        return file.stat().st_size == size
    except OSError:
        return False
