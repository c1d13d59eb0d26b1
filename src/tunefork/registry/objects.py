"""Files by their content: each lies once, under its sha256, and is never changed.

A file is written to scratch, flushed to the disk, renamed to its name, and the rename flushed: a
process killed at any point leaves a whole file or a scratch file, which garbage collection takes
away. The database is told of a file only afterwards.
"""

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tunefork.errors import StoreError

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a version."""

    path: str
    """Within the version's folder."""
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Objects:
    """The content-addressed files below `root`."""

    root: Path

    @property
    def folder(self) -> Path:
        """Where the files lie."""
        return self.root / "objects"

    @property
    def scratch(self) -> Path:
        """Where unfinished ones lie."""
        return self.root / "scratch"

    def prepare(self) -> None:
        """Make the folders."""
        for folder in (self.folder, self.scratch):
            folder.mkdir(parents=True, exist_ok=True)

    def at(self, sha256: str) -> Path:
        """Where the file of this content lies, if it is there."""
        return self.folder / sha256[:2] / sha256

    def add(self, stream: BinaryIO, path: str, *, limit: int) -> StoredFile:
        """Take in `stream`; raises StoreError where it has more than `limit` bytes.

        It is durable after `sync`.
        """
        scratch = self.new_scratch()
        try:
            stored = self._write(stream, scratch, path, limit)
            target = self.at(stored.sha256)
            target.parent.mkdir(exist_ok=True)
            if not is_intact(target, stored):  # one that the disk has damaged is replaced
                scratch.replace(target)
        finally:
            scratch.unlink(missing_ok=True)
        return stored

    def sync(self, files: Iterable[StoredFile]) -> None:
        """Flush the names of `files` to the disk."""
        for folder in {self.at(file.sha256).parent for file in files}:
            sync_folder(folder)
        sync_folder(self.folder)

    def new_scratch(self) -> Path:
        """A name in scratch that no one else has."""
        return self.scratch / f"{os.getpid()}-{secrets.token_hex(8)}"

    def link(self, files: Iterable[StoredFile], target: Path) -> None:
        """Make the folder `target` of these files, or make it whole: hard links, else copies."""
        scratch = self.new_scratch()
        for file in files:
            place = scratch / file.path
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(self.at(file.sha256), place)
            except FileNotFoundError as error:
                raise StoreError(
                    f"{self.at(file.sha256)}: is gone from the store; push the version again from "
                    "where it still is, or publish it anew"
                ) from error
            except OSError:  # another file system, or too many links
                shutil.copyfile(self.at(file.sha256), place)
        target.parent.mkdir(exist_ok=True)
        if target.exists():  # damaged: a whole one comes in its place
            target.rename(self.new_scratch())
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            shutil.rmtree(scratch)  # another process was faster

    def _write(self, stream: BinaryIO, scratch: Path, path: str, limit: int) -> StoredFile:
        digest, size = hashlib.sha256(), 0
        with scratch.open("xb") as out:
            while chunk := stream.read(_CHUNK):
                size += len(chunk)
                if size > limit:
                    raise StoreError(f"{path}: has more than the {limit:,} bytes that are allowed")
                digest.update(chunk)
                out.write(chunk)
            out.flush()
            os.fchmod(out.fileno(), 0o444)  # its hard links are what readers see
            os.fsync(out.fileno())
        return StoredFile(path, digest.hexdigest(), size)


def is_intact(place: Path, file: StoredFile) -> bool:
    """Whether `place` holds exactly what `file` says."""
    try:
        if place.stat().st_size != file.bytes:
            return False
        with place.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == file.sha256
    except FileNotFoundError:
        return False


def digest_of(files: Iterable[StoredFile]) -> str:
    """One digest of a version: of its files' names and contents."""
    lines = sorted(f"{file.sha256}  {file.path}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
